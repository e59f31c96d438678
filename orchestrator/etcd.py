"""The little of etcd that a registry needs, over its JSON gateway (`/v3/`, etcd 3.4 and later).

Over httpx, which is here anyway: the maintained Python clients bring gRPC along, or know one server
only. Calls go on at the next server when one does not answer.
"""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import httpx
import msgspec
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from orchestrator.core.errors import ConfigError, ProServeError
from orchestrator.peers import ServiceUrl

CALL_TIMEOUT_S = 2.0

_MAX_SHOWN_CHARACTERS = 300
"""Of a server's answer, in an error."""

_HAS_LEADER = {"Grpc-Metadata-hasleader": "true"}
"""Has a server that has lost the others end a watch; without it the watch is stale for ever."""


_NO_ANSWER = (httpx.HTTPError, TimeoutError)


class EtcdUnavailable(ProServeError):
    """No server of etcd answers as it should; the text says why."""


class WatchBehind(EtcdUnavailable):
    """What a watch was to begin with is forgotten already; list again."""


class RegistryConfig(BaseModel):
    """etcd, in which nodes register themselves and routers find them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    endpoints: Annotated[tuple[ServiceUrl, ...], Field(min_length=1)]
    """The servers of one etcd cluster, as http://HOST:2379."""

    prefix: Annotated[str, StringConstraints(pattern=r"^/[!-.0-~/]{0,99}[!-.0-~]$")] = "/proserve"
    """Beginning of all keys; the same for the nodes and routers of one deployment."""

    lease_s: Annotated[int, Field(ge=2, le=3600)] = 10
    """A node that has not renewed its registration for this long is gone. Nodes renew it three
    times as often."""

    ca_file: Path | None = None
    """Certificates of those who may certify the servers; by default those of the system."""

    cert_file: Path | None = None
    """Certificate that this client shows, with `key_file`."""

    key_file: Path | None = None
    """Its private key."""

    username: Annotated[str, Field(min_length=1)] | None = None
    """User of etcd, with `password_file`."""

    password_file: Path | None = None
    """File with the user's password; white space around it does not count."""

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        for first, second in (("cert_file", "key_file"), ("username", "password_file")):
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise ValueError(f"{first} and {second} go together; set both, or neither")
        is_secure = all(url.startswith("https://") for url in self.endpoints)
        if not is_secure and (self.ca_file or self.cert_file):
            raise ValueError("ca_file and cert_file are read with https:// endpoints only")
        return self

    def read_password(self) -> str:
        """Return the user's password, empty without a user.

        Raises:
            ConfigError: it cannot be read.
        """
        if self.password_file is None:
            return ""
        try:
            return self.password_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"password_file {self.password_file}: {error}") from error

    def tls(self) -> ssl.SSLContext:
        """Return how servers are trusted, and what they are shown.

        Raises:
            ConfigError: a file cannot be read.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.cert_file is not None:
                context.load_cert_chain(self.cert_file, self.key_file)
        except OSError as error:  # as ssl's errors are
            raise ConfigError(
                f"registry: ca_file, cert_file or key_file cannot be used: {error}"
            ) from error
        return context


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key that is there."""

    key: str
    value: bytes
    mod_revision: int
    """Of etcd's history, when it was written last."""


@dataclass(frozen=True, slots=True)
class KeyGone:
    """A key that was deleted, or whose lease has ended."""

    key: str


class EtcdClient:
    """Calls to one etcd cluster. Belongs to one event loop."""

    def __init__(self, config: RegistryConfig) -> None:
        """Raises ConfigError: a file that the configuration names cannot be used."""
        self._endpoints = config.endpoints
        self._current = 0
        self._username, self._password = config.username, config.read_password()
        self._token: str | None = None
        # No proxies and credentials from the environment: servers are addressed as configured.
        self._http = httpx.AsyncClient(verify=config.tls(), timeout=CALL_TIMEOUT_S, trust_env=False)

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

    async def grant(self, ttl_s: int) -> str:
        """Return a new lease; it ends, and all its keys with it, `ttl_s` after the last renewal."""
        return str(_field(await self._call("lease/grant", {"TTL": ttl_s}), "ID"))

    async def renew(self, lease: str) -> bool:
        """Let a lease begin anew; return whether it is still there."""
        answer = await self._call("lease/keepalive", {"ID": lease})
        return int(answer.get("result", {}).get("TTL", 0)) > 0

    async def revoke(self, lease: str) -> None:
        """End a lease."""
        await self._call("lease/revoke", {"ID": lease})

    async def put(self, key: str, value: bytes, lease: str) -> None:
        """Write a key that ends with a lease."""
        await self._call("kv/put", _put(key, value, lease))

    async def put_if_unchanged(self, key: str, value: bytes, lease: str, revision: int) -> bool:
        """Write a key if it was written last at `revision`, or for 0 if it is not there; return
        whether it was."""
        compare = {"key": _text(key), "target": "MOD", "mod_revision": revision}
        body = {"compare": [compare], "success": [{"request_put": _put(key, value, lease)}]}
        return bool((await self._call("kv/txn", body)).get("succeeded"))

    async def get(self, key: str) -> KeyValue | None:
        """Return a key; None if it is not there."""
        found = (await self._call("kv/range", {"key": _text(key)})).get("kvs", ())
        return _key_value(found[0]) if found else None

    async def list(self, prefix: str) -> tuple[tuple[KeyValue, ...], int]:
        """Return all keys that begin so, and the revision at which that was true."""
        answer = await self._call("kv/range", _range(prefix))
        revision = int(_field(_field(answer, "header"), "revision"))
        return tuple(map(_key_value, answer.get("kvs", ()))), revision

    async def watch(
        self, prefix: str, *, from_revision: int, silence_s: float
    ) -> AsyncGenerator[tuple[KeyValue | KeyGone, ...]]:
        """Yield all changes of keys that begin so, in order, from a revision on, for ever.

        Raises:
            WatchBehind: `from_revision` is forgotten.
            EtcdUnavailable: the stream broke, or nothing was heard for `silence_s`.
        """
        request = _range(prefix) | {"start_revision": from_revision}
        timeout = httpx.Timeout(CALL_TIMEOUT_S, read=silence_s)
        url = f"{self._endpoints[self._current]}/v3/watch"
        try:
            async with self._http.stream(
                "POST",
                url,
                content=msgspec.json.encode({"create_request": request}),
                headers=_HAS_LEADER | await self._authorization(),
                timeout=timeout,
            ) as answer:
                async for line in answer.aiter_lines():
                    changes = _changes(line, url)
                    if changes:
                        yield changes
        except (*_NO_ANSWER, msgspec.DecodeError) as error:
            self._turn()
            raise EtcdUnavailable(f"{url}: {_reason(error)}") from error
        except WatchBehind:
            raise
        except EtcdUnavailable:
            self._turn()
            raise
        self._turn()
        raise EtcdUnavailable(f"{url}: the watch has ended")

    async def _call(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer of the first server that gives one."""
        failures = []
        for _ in self._endpoints:
            url = f"{self._endpoints[self._current]}/v3/{path}"
            try:
                return await self._ask(url, body, headers=await self._authorization())
            except (*_NO_ANSWER, msgspec.DecodeError) as error:
                failures.append(f"{url}: {_reason(error)}")
                self._turn()
        raise EtcdUnavailable("; ".join(failures))

    async def _ask(
        self, url: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> dict[str, Any]:
        async with asyncio.timeout(2 * CALL_TIMEOUT_S):
            answer = await self._http.post(url, content=msgspec.json.encode(body), headers=headers)
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            self._token = None  # It has ended; the next call gets another one.
        if answer.is_error:
            text = answer.text[:_MAX_SHOWN_CHARACTERS]
            raise httpx.HTTPStatusError(text, request=answer.request, response=answer)
        found: dict[str, Any] = msgspec.json.decode(answer.content, type=dict)
        return found

    async def _authorization(self) -> dict[str, str]:
        if self._username is None:
            return {}
        if self._token is None:
            url = f"{self._endpoints[self._current]}/v3/auth/authenticate"
            body = {"name": self._username, "password": self._password}
            self._token = str(_field(await self._ask(url, body, {}), "token"))
        return {"Authorization": self._token}

    def _turn(self) -> None:
        """Go on at the next server."""
        self._current = (self._current + 1) % len(self._endpoints)


def _field(answer: Mapping[str, Any], name: str) -> Any:
    """Return what every answer of etcd has.

    Raises:
        EtcdUnavailable: this one has not, so it is somebody else's.
    """
    if name not in answer:
        raise EtcdUnavailable(f"an answer without {name!r} is none of etcd's; check the endpoints")
    return answer[name]


def _changes(line: str, url: str) -> tuple[KeyValue | KeyGone, ...]:
    message: dict[str, Any] = msgspec.json.decode(line, type=dict)
    result = message.get("result", {})
    if int(result.get("compact_revision", 0)):
        raise WatchBehind(f"{url}: the history before {result['compact_revision']} is forgotten")
    if "error" in message or result.get("canceled"):
        raise EtcdUnavailable(f"{url}: {line[:_MAX_SHOWN_CHARACTERS]}")
    return tuple(
        KeyGone(_plain(event["kv"]["key"]).decode())
        if event.get("type") == "DELETE"
        else _key_value(event["kv"])
        for event in result.get("events", ())
    )


def _key_value(found: Mapping[str, Any]) -> KeyValue:
    return KeyValue(
        _plain(found["key"]).decode(), _plain(found.get("value", "")), int(found["mod_revision"])
    )


def _put(key: str, value: bytes, lease: str) -> dict[str, Any]:
    return {"key": _text(key), "value": b64encode(value).decode(), "lease": lease}


def _range(prefix: str) -> dict[str, Any]:
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)  # The first key that does not begin so.
    return {"key": _text(prefix), "range_end": _text(end)}


def _text(key: str) -> str:
    return b64encode(key.encode()).decode()


def _plain(text: str) -> bytes:
    return b64decode(text)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
