"""A trace made into requests: with service classes, objectives, and what each client asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from engines.simulated import STOP_TOKEN_ID, TEXT_TOKEN_ID
from orchestrator.core.request import Request, RequestSpec, SamplingParams
from orchestrator.core.slo import PriorityClass
from orchestrator.simulation.trace import Trace


class PrioritiesPer(StrEnum):
    """What a service class is drawn for."""

    REQUEST = "request"
    """Every request by itself."""

    CLIENT = "client"
    """Every client once, as in a contract; makes classes bursty and unequal."""


@dataclass(frozen=True, slots=True)
class ClassShare:
    """A service class and how often it is drawn."""

    priority_class: PriorityClass
    share: float
    """In proportion to the other classes' shares."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """Beginnings that prompts have in common."""

    index: NDArray[np.int64]
    """Which beginning each request has, (num_requests,)."""

    num_tokens: int
    """Of each beginning."""

    def prompt(self, request_index: int, num_tokens: int) -> tuple[int, ...]:
        """Return a request's prompt: its beginning, a token of its own, and text."""
        num_shared = min(self.num_tokens, num_tokens - 1)
        # Ids of beginnings are below 0, no text has them.
        beginning = (-1 - int(self.index[request_index]),) * num_shared
        own = STOP_TOKEN_ID + TEXT_TOKEN_ID + 1 + request_index
        return (*beginning, own, *(TEXT_TOKEN_ID,) * (num_tokens - num_shared - 1))


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests in order of arrival. Output lengths are the simulation's secret: schedulers and
    routers see `max_tokens`."""

    trace: Trace
    max_tokens: NDArray[np.int64]
    """What each client asks for at most, (num_requests,)."""

    classes: tuple[PriorityClass, ...]
    class_index: NDArray[np.int64]
    """Into `classes`, (num_requests,)."""

    shared_prefix: SharedPrefix | None = None
    """None: prompts have no content, only lengths."""

    def __len__(self) -> int:
        return len(self.trace)

    def class_of(self, index: int) -> PriorityClass:
        """Return the service class of request `index`."""
        return self.classes[int(self.class_index[index])]

    def request(self, index: int) -> Request:
        """Return request `index` as a node receives it, with a prompt of its length."""
        priority_class = self.class_of(index)
        num_tokens = int(self.trace.num_input_tokens[index])
        prompt = (TEXT_TOKEN_ID,) * num_tokens
        if self.shared_prefix is not None:
            prompt = self.shared_prefix.prompt(index, num_tokens)
        return Request(
            RequestSpec(
                request_id=request_id(index),
                prompt_token_ids=prompt,
                sampling=SamplingParams(
                    max_tokens=int(self.max_tokens[index]),
                    seed=index,
                    temperature=0.0,
                    stop_token_ids=(STOP_TOKEN_ID,),
                ),
                priority_class=priority_class.name,
                weight=priority_class.weight,
                slo=priority_class.slo,
                client_id=self.trace.clients[index],
                cache_salt=self.trace.clients[index],
            ),
            arrival_s=float(self.trace.arrival_s[index]),
        )

    def output_lengths(self) -> dict[str, int]:
        """Return request_id -> output tokens, for the engines alone."""
        return {request_id(i): int(n) for i, n in enumerate(self.trace.num_output_tokens)}


def request_id(index: int) -> str:
    """Return the id of request `index`; ids sort like indices."""
    return f"{index:07d}"


def make_workload(
    trace: Trace,
    shares: Sequence[ClassShare],
    *,
    per: PrioritiesPer,
    max_model_len: int,
    max_output_tokens: int,
    random: np.random.Generator,
) -> Workload:
    """Return the workload of a trace whose lengths have been capped to the same limits.

    Every client asks for `max_output_tokens`, or for what its prompt leaves of the context.
    """
    chances = np.array([s.share for s in shares], dtype=np.float64)
    chances /= chances.sum()
    if per is PrioritiesPer.REQUEST:
        class_index = random.choice(len(shares), size=len(trace), p=chances)
    else:
        clients = sorted(set(trace.clients))
        of_client = dict(
            zip(clients, random.choice(len(shares), size=len(clients), p=chances), strict=True)
        )
        class_index = np.array([of_client[client] for client in trace.clients])
    return Workload(
        trace,
        max_tokens=np.minimum(max_output_tokens, max_model_len - trace.num_input_tokens),
        classes=tuple(s.priority_class for s in shares),
        class_index=class_index.astype(np.int64),
    )
