"""Every error this project raises on purpose.

ProServeError
|-- ConfigError               a YAML file or a flag says something impossible
|-- BuildError                a step of an engine build failed
|-- RequestRejected           a client asked for something we do not serve      -> HTTP 4xx
|-- NodeUnavailable           no node can take the request now                  -> HTTP 503
|-- EngineError
|   |-- EngineDirectoryError  an engine directory is missing, damaged or foreign
|   |-- EngineStepError       a step failed; names the requests it ends         -> HTTP 500
|   `-- EngineLost            an engine can run no more steps
`-- KVIntegrityError          block accounting is wrong: a bug of ours
"""

from __future__ import annotations

from collections.abc import Sequence


class ProServeError(Exception):
    """Base of all errors raised on purpose; its text is fit for a user to read."""


class ConfigError(ProServeError):
    """A configuration names an impossible or unknown setting."""


class BuildError(ProServeError):
    """A step of an engine build failed; the steps before it need not be run again."""


class RequestRejected(ProServeError):
    """A request asks for something that is invalid or over a limit.

    The message names the value, the limit and the way out. `field` is the
    request field at fault, in the client's own words, or None for the whole request.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NodeUnavailable(ProServeError):
    """No node can take, or finish, the request now; trying again later may work."""


class EngineError(ProServeError):
    """An engine cannot be loaded or cannot run."""


class EngineDirectoryError(EngineError):
    """An engine directory is missing, damaged, or made for something else."""


class EngineStepError(EngineError):
    """A step failed. `request_ids` are the requests whose results are lost."""

    def __init__(self, message: str, *, request_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.request_ids = tuple(request_ids)


class EngineLost(EngineError):
    """An engine can run no more steps; only a new process can."""


class KVIntegrityError(ProServeError):
    """The KV block accounting contradicts itself; the message lists each contradiction."""
