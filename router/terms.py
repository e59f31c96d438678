"""Which service class and which objectives a request has: by its body, its headers, its client."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Self, TypeVar

from starlette.datastructures import Headers

from orchestrator.core.slo import PriorityClass, Slo
from router.clients import ClientConfig
from router.config import ServiceClassConfig
from router.errors import Refused, cut
from router.schema import (
    MAX_OBJECTIVE_MS,
    MAX_WAIT_MS,
    MIN_OBJECTIVE_MS,
    GenerationBody,
    SloBody,
)

PRIORITY_HEADER = "X-ProServe-Priority"
TTFT_HEADER = "X-ProServe-TTFT-MS"
TPOT_HEADER = "X-ProServe-TPOT-MS"
MAX_WAIT_HEADER = "X-ProServe-Max-Wait-MS"

TERMS_HEADERS = (PRIORITY_HEADER, TTFT_HEADER, TPOT_HEADER, MAX_WAIT_HEADER)
"""All that say what a body could say too."""

T = TypeVar("T")


class ServiceTerms:
    """The service classes on offer to one client, or to everybody.

    A request may name a class that is worth less than its client's, and ask for more time than
    its client is promised; never the other way round.
    """

    def __init__(
        self,
        classes: Sequence[PriorityClass],
        *,
        default_class: str,
        all_classes: Sequence[str],
        client: str | None = None,
        promised: Slo | None = None,
    ) -> None:
        """Offer `classes` of a router that has `all_classes`.

        `promised` are the shortest objectives that a request may have; None lets it have any.
        """
        by_value = sorted(classes, key=lambda c: -c.weight)
        self._classes: Mapping[str, PriorityClass] = {c.name: c for c in by_value}
        self._default_class = default_class
        self._all_classes = frozenset(all_classes)
        self._client = client
        self._promised = promised

    @classmethod
    def of_everybody(cls, classes: Sequence[ServiceClassConfig], *, default_class: str) -> Self:
        """Return the terms where there are no clients: any class, any objective."""
        return cls(
            [c.to_priority_class() for c in classes],
            default_class=default_class,
            all_classes=[c.name for c in classes],
        )

    @classmethod
    def of_client(cls, client: ClientConfig, classes: Sequence[ServiceClassConfig]) -> Self:
        """Return the terms of `client`, which was checked against `classes`."""
        (ceiling,) = [c.to_priority_class() for c in classes if c.name == client.priority_class]
        promised = Slo(
            ttft_s=ceiling.slo.ttft_s if client.ttft_ms is None else client.ttft_ms / 1000,
            tpot_s=ceiling.slo.tpot_s if client.tpot_ms is None else client.tpot_ms / 1000,
        )
        weight = ceiling.weight if client.weight is None else client.weight
        allowed = client.allowed_classes or [c.name for c in classes if c.weight <= ceiling.weight]
        return cls(
            [
                _limited(c.to_priority_class(), weight, promised, is_own=c.name == ceiling.name)
                for c in classes
                if c.name in allowed
            ],
            default_class=client.default_class or client.priority_class,
            all_classes=[c.name for c in classes],
            client=client.name,
            promised=promised,
        )

    @property
    def least_class(self) -> PriorityClass:
        """The least valuable class on offer."""
        return list(self._classes.values())[-1]

    def of(self, body: GenerationBody, headers: Headers) -> tuple[PriorityClass, Slo]:
        """Return the class of a request and the objectives it is held to.

        Raises:
            RequestRejected: unknown class, invalid objective, body and header disagree, or the
                request asks for more than its client has.
        """
        slo = body.slo or SloBody()
        named = agreed(("priority", body.priority), _header(headers, PRIORITY_HEADER, str))
        ttft_ms = agreed(("slo.ttft_ms", slo.ttft_ms), _header(headers, TTFT_HEADER, _objective_ms))
        tpot_ms = agreed(("slo.tpot_ms", slo.tpot_ms), _header(headers, TPOT_HEADER, _objective_ms))
        name = self._default_class if named is None else named
        priority_class = self._classes.get(name)
        if priority_class is None:
            field = "priority" if body.priority is not None else PRIORITY_HEADER
            raise self._class_refusal(field, name)
        default = priority_class.slo
        asked = Slo(
            ttft_s=default.ttft_s if ttft_ms is None else ttft_ms / 1000,
            tpot_s=default.tpot_s if tpot_ms is None else tpot_ms / 1000,
        )
        if self._promised is not None:
            if asked.ttft_s < self._promised.ttft_s:
                field = TTFT_HEADER if slo.ttft_ms is None else "slo.ttft_ms"
                raise self._objective_refusal(field, asked.ttft_s, self._promised.ttft_s)
            if asked.tpot_s < self._promised.tpot_s:
                field = TPOT_HEADER if slo.tpot_ms is None else "slo.tpot_ms"
                raise self._objective_refusal(field, asked.tpot_s, self._promised.tpot_s)
        return priority_class, asked

    def _class_refusal(self, field: str, name: str) -> Refused:
        offer = f"these, most valuable first: {', '.join(self._classes)}"
        if name not in self._all_classes:
            return Refused(
                f"{field} is {cut(repr(name))}, it must be one of {offer}",
                field=field,
                code="invalid_value",
            )
        return Refused(
            f"{field} is {name!r}, client {self._client!r} may use {offer}; name one, "
            "leave it out, or ask the operator for another class",
            field=field,
            status=403,
            code="class_not_allowed",
        )

    def _objective_refusal(self, field: str, asked_s: float, promised_s: float) -> Refused:
        if math.isinf(promised_s):
            limit = "is promised none; leave it out"
        else:
            limit = f"is promised {promised_s * 1000:g}; ask for that or more, or leave it out"
        return Refused(
            f"{field} is {asked_s * 1000:g}, client {self._client!r} {limit}, or ask the operator "
            "for a shorter objective",
            field=field,
            status=403,
            code="objective_not_allowed",
        )


def _limited(
    priority_class: PriorityClass, weight: float, promised: Slo, *, is_own: bool
) -> PriorityClass:
    """Return a class as a client has it that is worth `weight` and `promised` so much at best."""
    if is_own:
        return dataclasses.replace(priority_class, weight=weight, slo=promised)
    return dataclasses.replace(
        priority_class,
        weight=min(weight, priority_class.weight),
        slo=Slo(
            ttft_s=max(promised.ttft_s, priority_class.slo.ttft_s),
            tpot_s=max(promised.tpot_s, priority_class.slo.tpot_s),
        ),
    )


def max_wait_s(body: GenerationBody, headers: Headers) -> float | None:
    """Return how long a request may be without a node; None if it does not say.

    Raises:
        RequestRejected: the header is no such time, or body and header disagree.
    """
    wait_ms = agreed(("max_wait_ms", body.max_wait_ms), _header(headers, MAX_WAIT_HEADER, _wait_ms))
    return None if wait_ms is None else wait_ms / 1000


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
    return _milliseconds(text, MIN_OBJECTIVE_MS, MAX_OBJECTIVE_MS)


def _wait_ms(text: str) -> float:
    return _milliseconds(text, 0, MAX_WAIT_MS)


def _milliseconds(text: str, least: float, most: float) -> float:
    expected = f"a number of milliseconds, at least {least} and at most {most}"
    try:
        value = float(text)
    except ValueError:
        raise ValueError(expected) from None
    if not least <= value <= most:  # NaN is not either.
        raise ValueError(expected)
    return value
