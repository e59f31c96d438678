"""Where log lines go: one JSON object a line to standard error, or coloured text to a terminal."""

from __future__ import annotations

import logging
import sys

import msgspec
import structlog


def configure_logging(*, component: str) -> None:
    """Send the log lines of structlog and of the standard library to standard error."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    is_terminal = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer()
    )
    # Our own lines go straight to the stream: through the standard library each costs 100 us.
    structlog.configure(
        processors=[*shared, renderer if is_terminal else _render_json],
        logger_factory=_stderr_logger if is_terminal else _stderr_bytes_logger,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("orchestrator", "router", "engines"):
        logging.getLogger(name).setLevel(logging.INFO)
    structlog.contextvars.bind_contextvars(component=component)


def _render_json(
    _: structlog.typing.WrappedLogger, __: str, event: structlog.typing.EventDict
) -> bytes:
    return msgspec.json.encode(event, enc_hook=repr)


def _stderr_logger(*_: object) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)


def _stderr_bytes_logger(*_: object) -> structlog.BytesLogger:
    return structlog.BytesLogger(sys.stderr.buffer)
