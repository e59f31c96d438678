"""Which service class and which objectives a request has: by its body, its headers, its class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from starlette.datastructures import Headers

from orchestrator.core.slo import PriorityClass, Slo
from router.config import ServiceClassConfig
from router.errors import Refused, cut
from router.schema import MAX_OBJECTIVE_MS, MIN_OBJECTIVE_MS, GenerationBody, SloBody

PRIORITY_HEADER = "X-ProServe-Priority"
TTFT_HEADER = "X-ProServe-TTFT-MS"
TPOT_HEADER = "X-ProServe-TPOT-MS"

T = TypeVar("T")


class ServiceTerms:
    """The service classes on offer."""

    def __init__(self, classes: Sequence[ServiceClassConfig], *, default_class: str) -> None:
        self._classes = {c.name: c.to_priority_class() for c in classes}
        self._default_class = default_class

    def of(self, body: GenerationBody, headers: Headers) -> tuple[PriorityClass, Slo]:
        """Return the class of a request and the objectives it is held to.

        Raises:
            RequestRejected: unknown class, invalid objective, or body and header disagree.
        """
        slo = body.slo or SloBody()
        name = agreed(("priority", body.priority), _header(headers, PRIORITY_HEADER, str))
        ttft_ms = agreed(("slo.ttft_ms", slo.ttft_ms), _header(headers, TTFT_HEADER, _objective_ms))
        tpot_ms = agreed(("slo.tpot_ms", slo.tpot_ms), _header(headers, TPOT_HEADER, _objective_ms))
        priority_class = self._classes.get(self._default_class if name is None else name)
        if priority_class is None:
            field = "priority" if body.priority is not None else PRIORITY_HEADER
            raise Refused(
                f"{field} is {cut(repr(name))}, it must be one of: {', '.join(self._classes)}",
                field=field,
                code="invalid_value",
            )
        default = priority_class.slo
        return priority_class, Slo(
            ttft_s=default.ttft_s if ttft_ms is None else ttft_ms / 1000,
            tpot_s=default.tpot_s if tpot_ms is None else tpot_ms / 1000,
        )


def agreed(*named_values: tuple[str, T | None]) -> T | None:
    """Return the one value that a client gave by several names; None if it gave none."""
    given = [(name, value) for name, value in named_values if value is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise Refused(
                f"{given[0][0]} is {cut(repr(given[0][1]))} and {name} is {cut(repr(value))}; "
                "send one of them, or the same value",
                field=given[0][0],
                code="contradiction",
            )
    return given[0][1] if given else None


def _header(headers: Headers, name: str, parse: Callable[[str], T]) -> tuple[str, T | None]:
    values = headers.getlist(name)
    if len(set(values)) > 1:
        raise Refused(
            f"{name} is sent {len(values)} times with different values; send one",
            field=name,
            code="contradiction",
        )
    if not values:
        return name, None
    try:
        return name, parse(values[0])
    except ValueError as error:
        raise Refused(
            f"{name} is {cut(repr(values[0]))}, it must be {error}",
            field=name,
            code="invalid_value",
        ) from error


def _objective_ms(text: str) -> float:
    expected = (
        f"a number of milliseconds, at least {MIN_OBJECTIVE_MS} and at most {MAX_OBJECTIVE_MS}"
    )
    try:
        value = float(text)
    except ValueError:
        raise ValueError(expected) from None
    if not MIN_OBJECTIVE_MS <= value <= MAX_OBJECTIVE_MS:  # NaN is not either.
        raise ValueError(expected)
    return value
