"""The clients file: who may use a router, with which keys, in which class, how much."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)

from orchestrator.core.errors import ConfigError
from orchestrator.yaml_config import Problem, parse_yaml_model, problems_error
from router.config import Name, ServiceClassConfig
from router.keys import ID_PATTERN, SHA256_PATTERN, redacted
from router.rate_limits import Limits, Rate
from router.schema import ObjectiveMs


def _check_sha256(value: str) -> str:
    # The message must not repeat the value, which could be a key written here by mistake.
    if not re.fullmatch(SHA256_PATTERN, value):
        raise ValueError("must be 64 hexadecimal digits; let `proserve keys add` write it")
    return value


class KeyConfig(BaseModel):
    """An API key of a client, as `proserve keys add` writes it. The key itself is nowhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    key_id: Annotated[str, Field(pattern=f"^{ID_PATTERN}$")]
    """The eight letters in the key; `proserve keys revoke` takes it."""

    sha256: Annotated[str, AfterValidator(_check_sha256)]
    """Of the whole key, in hexadecimal digits."""

    expires_at: AwareDatetime | None = None
    """From then on the key is refused; with a time zone, as 2027-01-31T00:00:00Z. None: never."""

    def has_expired(self, now: datetime) -> bool:
        """Return whether it is refused at `now`."""
        return self.expires_at is not None and now >= self.expires_at


class LimitsConfig(BaseModel):
    """How much one client may use. They hold for each router by itself, over all its
    workers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    requests_per_s: Annotated[FiniteFloat, Field(gt=0)] | None = None
    """Generation requests a second in the long run. None is no limit, here as below."""

    request_burst: PositiveInt | None = None
    """Requests that may come at once after a pause; by default one second's, at least 1."""

    tokens_per_min: PositiveInt | None = None
    """Prompt and output tokens a minute in the long run. A request is let in if its prompt and
    the longest answers it may get (`max_tokens` of each) are free; when it has ended, what it did
    not use is free again."""

    token_burst: PositiveInt | None = None
    """Tokens that may be used at once after a pause, and so by one request; by default one
    minute's."""

    max_concurrent_sequences: PositiveInt | None = None
    """Answers that are made at the same time; a request with `n` 4 counts four."""

    @model_validator(mode="after")
    def _check_bursts(self) -> Self:
        for burst, rate in (("request_burst", "requests_per_s"), ("token_burst", "tokens_per_min")):
            if getattr(self, burst) is not None and getattr(self, rate) is None:
                raise ValueError(f"{burst} needs {rate}, which is not set")
        return self

    def to_limits(self) -> Limits:
        """Return the form that is counted with."""
        requests = tokens = None
        if self.requests_per_s is not None:
            burst = self.request_burst or max(1, math.ceil(self.requests_per_s))
            requests = Rate(self.requests_per_s, burst)
        if self.tokens_per_min is not None:
            tokens = Rate(self.tokens_per_min / 60, self.token_burst or self.tokens_per_min)
        return Limits(requests, tokens, self.max_concurrent_sequences)


class ClientConfig(BaseModel):
    """Somebody who sends requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Name
    """Stands in log lines and metric labels."""

    priority_class: str
    """The most valuable service class that its requests may have."""

    default_class: str | None = None
    """Class of requests that name none; by default `priority_class`."""

    allowed_classes: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Classes that its requests may name; by default all that are not worth more than
    `priority_class`."""

    weight: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """Gain of one output token in time, in place of that of `priority_class`; larger is more
    valuable. In another class the lesser of the two counts."""

    ttft_ms: ObjectiveMs | None = None
    """Objective for the first token, in place of that of `priority_class`. A request may ask for a
    longer one, never for a shorter one. In another class the longer of the two counts."""

    tpot_ms: ObjectiveMs | None = None
    """Objective for each later token, likewise."""

    limits: LimitsConfig = LimitsConfig()
    """How much it may use."""

    keys: tuple[KeyConfig, ...] = ()
    """Its API keys; any of them will do, so that they can be changed one after the other."""


class ClientsConfig(BaseModel):
    """A clients file. Where a router has one, only these may use it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    clients: tuple[ClientConfig, ...]
    """Whoever may send requests."""

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        problems = list(self._repetitions())
        if info.context is not None:
            for index, client in enumerate(self.clients):
                problems += [
                    (("clients", index, *where), text)
                    for where, text in _class_problems(client, info.context)
                ]
        if problems:
            raise problems_error(type(self), problems)
        return self

    def _repetitions(self) -> Iterator[Problem]:
        names: set[str] = set()
        key_ids: set[str] = set()
        for index, client in enumerate(self.clients):
            if client.name in names:
                yield ("clients", index, "name"), f"there is another client {client.name!r}"
            names.add(client.name)
            for number, key in enumerate(client.keys):
                if key.key_id in key_ids:
                    where = ("clients", index, "keys", number, "key_id")
                    yield where, f"there is another key {key.key_id!r}"
                key_ids.add(key.key_id)


def parse_clients(
    content: bytes, *, path: Path, classes: Sequence[ServiceClassConfig] | None = None
) -> ClientsConfig:
    """Return a clients file, read from `path`; with `classes`, its class names are checked.

    Raises:
        ConfigError: every mistake, with line and without key material.
    """
    by_name = None if classes is None else {c.name: c for c in classes}
    try:
        return parse_yaml_model(content, ClientsConfig, path=path, context=by_name)
    except ConfigError as error:
        raise ConfigError(redacted(str(error))) from None


def _class_problems(
    client: ClientConfig, classes: Mapping[str, ServiceClassConfig]
) -> Iterator[Problem]:
    named: list[tuple[tuple[str | int, ...], str]] = [(("priority_class",), client.priority_class)]
    if client.default_class is not None:
        named.append((("default_class",), client.default_class))
    named += [
        (("allowed_classes", index), name)
        for index, name in enumerate(client.allowed_classes or ())
    ]
    ceiling = classes.get(client.priority_class)
    for where, name in named:
        if name not in classes:
            yield where, f"is {name!r}, the router's classes are {', '.join(classes)}"
        elif ceiling is not None and classes[name].weight > ceiling.weight:
            text = f"is {name!r}, which is worth more than priority_class {ceiling.name!r}"
            yield where, f"{text}; name a lesser class here, or this one there"
    default_class = client.default_class or client.priority_class
    if client.allowed_classes is not None and default_class not in client.allowed_classes:
        key = "priority_class" if client.default_class is None else "default_class"
        yield (key,), f"is {default_class!r}, which is not in allowed_classes"
