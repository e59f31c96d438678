"""What a client asked (`RequestSpec`) and how far a node has come with it (`Request`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

from orchestrator.core.slo import DeadlineAnchor, Slo, token_deadline_s


class RequestStatus(StrEnum):
    """Where a request is on its node."""

    WAITING = "waiting"
    """Accepted, no part of it computed."""

    RUNNING = "running"
    """Holds KV blocks; may or may not be in the current step."""

    PREEMPTED = "preempted"
    """Lost its KV blocks to another request; will be computed again."""

    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended. Exactly one is reported for each accepted request."""

    STOP = "stop"
    """End-of-sequence or a stop token."""

    LENGTH = "length"
    """`max_tokens` reached."""

    ABORT = "abort"
    """The client or an operator asked for it."""

    ERROR = "error"
    """The engine failed on it; the event says how."""

    LOST = "lost"
    """The node can no longer finish it, another one may; the event says why."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    Values are valid by the time they get here: the router refuses what is out of range.
    """

    max_tokens: int
    """Output tokens at most; at least 1."""

    seed: int
    """Token i is drawn with a number that depends on `seed` and i alone, never on the batch."""

    temperature: float = 1.0
    """0 is greedy."""

    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""

    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    """End generation, reported as `stop`; the end-of-sequence ids are already among them,
    unless the client asked to ignore those."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); each id once."""

    grammar: str | None = None
    """What the whole output has to match, as llguidance writes it; None allows anything. A stop
    token is then drawn only where the output matches."""

    num_logprobs: int | None = None
    """Alternatives reported per token (0: the chosen token only); None reports nothing."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One sequence to generate, as the router sends it to a node."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority_class: str
    weight: float
    """Gain of one output token delivered in time; larger is more valuable."""

    slo: Slo
    client_id: str = ""
    """Whose request it is, for schedulers that are fair among clients."""

    cache_salt: str = ""
    """Only requests with the same one share the KV of equal beginnings."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """How far a sequence had come when its node was lost; another node goes on from there.

    Seed, token counts and limits follow from prompt and output, so this is all of its state.
    """

    output_token_ids: tuple[int, ...]
    """Tokens that were delivered; at least one, and fewer than `max_tokens`."""

    ttft_s: float
    """From the request's arrival to the first of them."""


@dataclass(slots=True, eq=False)
class Request:
    """Progress of one request on one node. Only the scheduler changes it.

    A request is catching up `num_computed_tokens` with its tokens: chunked prefill, resume
    after preemption and decode are the same thing.
    """

    spec: RequestSpec
    arrival_s: float
    """On the node's clock, with the seconds already spent before the node subtracted."""

    output_token_ids: list[int] = field(default_factory=list)
    all_token_ids: list[int] = field(init=False)
    """Prompt and output in one list."""

    num_computed_tokens: int = 0
    """Tokens whose KV is on the device."""

    has_pending_token: bool = False
    """The step that runs gives it a token whose value is not known yet. The properties below count
    it; the lists do not have it."""

    status: RequestStatus = RequestStatus.WAITING
    first_token_s: float | None = None
    num_preemptions: int = 0
    num_lost_tokens: int = 0
    """Tokens that were computed before the last loss of KV blocks."""

    def __post_init__(self) -> None:
        self.all_token_ids = [*self.spec.prompt_token_ids, *self.output_token_ids]

    @classmethod
    def received(
        cls, spec: RequestSpec, resume_from: ResumePoint | None, *, arrival_s: float
    ) -> Self:
        """Return a request that is new, or goes on from where another node has brought it."""
        if resume_from is None:
            return cls(spec, arrival_s=arrival_s)
        return cls.resumed(spec, resume_from, arrival_s=arrival_s)

    @classmethod
    def resumed(cls, spec: RequestSpec, point: ResumePoint, *, arrival_s: float) -> Self:
        """Return a request that goes on from `point`: decoding, with all KV to be computed."""
        return cls(
            spec,
            arrival_s=arrival_s,
            output_token_ids=list(point.output_token_ids),
            first_token_s=arrival_s + point.ttft_s,
        )

    @property
    def request_id(self) -> str:
        """The id that the router gave."""
        return self.spec.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.spec.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and output."""
        return len(self.all_token_ids) + self.has_pending_token

    @property
    def num_output_tokens(self) -> int:
        """Tokens produced so far."""
        return len(self.output_token_ids) + self.has_pending_token

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that still have to go through the model before the next one can be sampled."""
        return len(self.all_token_ids) + self.has_pending_token - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """True once a token was produced, whatever happened to the KV since (OC-11)."""
        return self.has_pending_token or bool(self.output_token_ids)

    def expect_token(self, at_s: float) -> None:
        """Count a token that is being produced, as if it came at that time."""
        self.has_pending_token = True
        if self.first_token_s is None:
            self.first_token_s = at_s

    def expect_nothing(self) -> None:
        """Take back `expect_token`, if there was one."""
        self.has_pending_token = False
        if not self.output_token_ids:
            self.first_token_s = None

    def append_output_token(self, token_id: int, now_s: float) -> None:
        """Add one produced token; the first one also sets `first_token_s`."""
        self.output_token_ids.append(token_id)
        self.all_token_ids.append(token_id)
        if self.first_token_s is None:
            self.first_token_s = now_s

    def next_token_deadline_s(self, anchor: DeadlineAnchor) -> float:
        """Return when the next output token is due, on the node's clock (equation 16)."""
        return token_deadline_s(
            self.spec.slo,
            self.num_output_tokens,
            arrival_s=self.arrival_s,
            first_token_s=self.first_token_s,
            anchor=anchor,
        )
