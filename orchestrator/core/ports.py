"""What the executor loop asks of a scheduler and of an engine, and the messages between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from orchestrator.core.kv_state import KVBlockCounts
from orchestrator.core.kv_transfer import KVTransfer
from orchestrator.core.latency import BatchShape, LatencyProfile
from orchestrator.core.latency_correction import StepErrors
from orchestrator.core.request import FinishReason, Request, RequestSpec


class Clock(Protocol):
    """Source of the node's time."""

    def now_s(self) -> float:
        """Return seconds on a clock that never goes back."""
        ...


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """Limits of an engine. Whatever is scheduled stays within all of them."""

    block_size_tokens: int
    num_device_blocks: int
    num_host_blocks: int
    max_num_batched_tokens: int
    """New tokens in one step, over all requests."""

    max_num_seqs: int
    """Requests in one step."""

    max_model_len: int
    """Prompt and output tokens of one request."""

    num_layer_groups: int = 1
    """Onboarded blocks arrive in so many parts, each in time for the first layer that reads it."""

    reserves_prompts: bool = False
    """The engine takes the blocks of all tokens of a request with its first chunk, not only those
    of the chunk."""

    grammar_obstacle: str | None = "its engine does not choose tokens by a grammar"
    """Why requests with a grammar cannot be served; None if they can."""


@dataclass(slots=True)
class ScheduledRequest:
    """One request's part of a step: compute tokens [num_computed_tokens, +num_new_tokens).

    Read-only for everyone but its maker. Not frozen, nor is `RequestEvent`: some hundreds of each
    are made in every step, and a frozen dataclass takes three times as long to make.
    """

    request: Request
    """Read-only for the engine, whose `step` looks at its spec and its lists of tokens alone: those
    do not change while it runs, whereas the rest may, if the next step is planned meanwhile."""

    num_computed_tokens: int
    """Tokens already in the KV cache when the step begins."""

    num_new_tokens: int
    """At least 1."""

    block_ids: Sequence[int]
    """Device blocks of the request in token order, enough for the tokens of this step. A live
    view: entries are only ever appended while the request keeps its blocks."""

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def token_ids(self) -> Sequence[int]:
        """The new tokens, in order."""
        start = self.num_computed_tokens
        return self.request.all_token_ids[start : start + self.num_new_tokens]

    @property
    def is_sampled(self) -> bool:
        """True if the step reaches the request's last known token, so that a new one is drawn."""
        return self.num_computed_tokens + self.num_new_tokens == len(self.request.all_token_ids)


@dataclass(frozen=True, slots=True)
class ScheduleReasons:
    """Why a step looks as it does, for logs, metrics and tests."""

    latency_budget_s: float = 0.0
    """`B` of equation (19); infinite where the scheduler has no time budget."""

    load_s: float = 0.0
    """`Phi` of equation (20): how long the queue needs at that budget; 0 if not computed."""

    num_urgent: int = 0
    """Requests on the urgent side of the sliding boundary."""

    num_normal: int = 0
    """Requests on the other side."""

    num_starved: int = 0
    """Requests moved to the front because they waited far beyond their deadline."""

    skipped: Mapping[str, str] = field(default_factory=dict)
    """request_id -> why it was passed over although there was room in the step."""

    copy_budget_blocks: int | None = None
    """KV blocks that might come back from the host in this step; None if nobody asked."""

    num_prefix_tokens: int = 0
    """Tokens that need not be computed, because requests with the same beginning were."""

    num_kept_tokens: int = 0
    """Tokens of preempted requests that need not be computed again."""

    num_recomputed_tokens: int = 0
    """Tokens of this step that were computed before and lost."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step: what the engine computes, and what it may forget."""

    step_id: int
    scheduled: tuple[ScheduledRequest, ...]
    """In scheduling order. Empty only if there is nothing to compute, or everything waits for
    copies; the engine then waits until a copy ends, if any is on its way."""

    preempted_ids: tuple[str, ...]
    """Requests that lost their KV blocks to make room for this step."""

    finished_ids: tuple[str, ...]
    """Requests that ended since the step before; the engine drops what it keeps of them."""

    transfers: tuple[KVTransfer, ...]
    """Copies to start with this step, before it computes. Blocks of an `onboard` may be read by
    this very step: the engine makes each layer wait for its part of them. Blocks of an `offload`
    are full, and nobody writes to them before the engine has reported the copy."""

    predicted_step_s: float
    reasons: ScheduleReasons
    shape: BatchShape = field(default_factory=BatchShape)
    """What the prediction was made from; empty if the plan's maker predicts nothing."""

    waits_for_transfers: bool = False
    """Nothing is computed before the copies of this step have ended: what a node without
    asynchronous copies would do, to compare with."""

    @property
    def num_new_tokens(self) -> int:
        """Tokens that go through the model in this step."""
        return sum(part.num_new_tokens for part in self.scheduled)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position, natural logarithm, of the distribution before
    temperature and truncation."""

    token_logprob: float
    """Of the token that was chosen."""

    top: tuple[tuple[int, float], ...]
    """(token_id, logprob), most likely first; as many as the request asked for."""


@dataclass(frozen=True, slots=True)
class CopyFigures:
    """Copies that ended with a step."""

    offloaded_bytes: int = 0
    onboarded_bytes: int = 0
    copy_s: float = 0.0
    """Time the copies took, each direction by itself, summed."""

    exposed_s: float = 0.0
    """Time in which the step waited for copies instead of computing."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step produced."""

    step_id: int
    new_token_ids: Mapping[str, tuple[int, ...]]
    """request_id -> tokens, for each sampled request of the step that did not fail."""

    step_s: float
    """Measured duration."""

    model_s: float | None = None
    """Part of `step_s` in which the model computed; None if the engine cannot tell it apart."""

    logprobs: Mapping[str, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    """request_id -> one entry per new token, for requests that asked."""

    completed_transfers: tuple[int, ...] = ()
    """Copies that have ended. Each copy is reported once, here or in `failed_transfers`: an
    `onboard` with the step that starts it, an `offload` with that one or any later one; copies of
    a step that failed with the next one that does not."""

    failed_transfers: Mapping[int, str] = field(default_factory=dict)
    """transfer_id -> message; what the copy wrote is worth nothing. A scheduled request whose
    `onboard` failed is not in `new_token_ids`, nor in `failed`: it can be computed again."""

    copies: CopyFigures = CopyFigures()
    failed: Mapping[str, str] = field(default_factory=dict)
    """request_id -> message, for requests that this step ends with an error."""


@dataclass(slots=True)
class RequestEvent:
    """News of one request, in order. The one with a `finish_reason` is its last. Read-only."""

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Set if and only if `finish_reason` is `error` or `lost`."""


@dataclass(frozen=True, slots=True)
class SchedulerLoad:
    """What a scheduler holds at one moment."""

    num_waiting: int
    """Requests without KV blocks."""

    num_running: int
    """Requests with KV blocks."""

    num_decoding: int
    """Requests that have produced output."""

    num_queued_prompt_tokens: int
    """Prompt tokens not yet computed, over requests that have not produced output."""

    num_free_device_blocks: int
    """Blocks that can be had at once, whatever they still hold."""

    num_device_blocks: int
    kv_blocks: KVBlockCounts = field(default_factory=KVBlockCounts)
    """Blocks by what they are doing."""


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """What one more request would meet at a scheduler, for routers.

    The first four columns are about prefills: requests without output, and those that lost their
    KV or had it on another node, in the order of their deadlines. Each entry stands for one of
    them, or for neighbours where they are many.
    """

    due_in_s: tuple[float | None, ...]
    """Until the first deadline of the entry, ascending; negative if overdue. Those without a
    deadline come last and have None."""

    weight: tuple[float, ...]
    """Gain of the next tokens of the entry."""

    work_s: tuple[float, ...]
    """Predicted cost of what comes before those tokens, without the constants of steps."""

    num_prefills: tuple[int, ...]
    """Requests that the entry stands for."""

    decode_context_tokens: int
    """Cached tokens, over all other requests."""

    decode_weight: float
    """Gain of one token of every one of them."""

    min_decode_tpot_s: float | None
    """Their tightest TPOT objective; None if they have none."""

    max_weight: float
    """Of a live request; 0 if there is none."""

    latency_budget_s: float | None
    """`B` of equation (19) in the last step; None if there was none or it had no such budget."""

    latency_profile: LatencyProfile
    """As corrected by what steps really take."""


class Scheduler(Protocol):
    """Decides the content of every step. Pure: time comes in as an argument.

    Calls alternate: `schedule`, then `update_from_output` with that step's result; requests
    are added and aborted in between.
    """

    def add_request(self, request: Request) -> None:
        """Take in a new request.

        Raises:
            RequestRejected: it can never run here (too long, id already in use).
        """
        ...

    def abort_request(self, request_id: str) -> RequestEvent | None:
        """End a request and free its blocks; None if it is unknown or has already ended."""
        ...

    def schedule(self, now_s: float) -> SchedulerOutput:
        """Plan the next step. `scheduled` is empty only if there is nothing to compute."""
        ...

    def update_from_output(
        self, plan: SchedulerOutput, output: StepOutput, now_s: float
    ) -> list[RequestEvent]:
        """Account for a finished step and return the news, in scheduling order."""
        ...

    def load(self) -> SchedulerLoad:
        """Return what is queued and running now."""
        ...

    def queue_summary(self, now_s: float) -> QueueSummary:
        """Return what one more request would meet now; dearer than `load`."""
        ...

    def step_errors(self) -> tuple[StepErrors, ...]:
        """Return how far off recent predictions were, for each batch class seen so far."""
        ...

    @property
    def has_requests(self) -> bool:
        """True while any request has not ended."""
        ...


class AheadScheduler(Scheduler, Protocol):
    """A scheduler that can plan a step while the one before runs.

    Calls are then, for each step: `schedule`, before the step before has ended; once that is
    accounted for with `update_from_output`, `revise`; when what is left has started, `begin`.
    """

    def begin(self, plan: SchedulerOutput, expected_end_s: float) -> None:
        """Take a step that has just started as done at that time, but for the values of its
        tokens, which are not known yet: the next `schedule` builds on it."""
        ...

    def revise(self, plan: SchedulerOutput) -> SchedulerOutput | None:
        """Return what is left of a plan that `schedule` made before the step before had ended:
        without requests that have ended or lost their KV since. None if nothing is left to do."""
        ...


class Engine(Protocol):
    """Runs steps on a model."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Fixed from load to close."""
        ...

    def step(self, plan: SchedulerOutput) -> StepOutput:
        """Start the step's copies, compute it, and return when its tokens are known.

        Raises:
            EngineStepError: the step failed; the engine can go on without the named requests.
                What became of its copies is told with the next step that does not fail; none
                of its onboards is on its way any more.
            EngineLost: no step can run any more; what follows is `close`.
        """
        ...

    def close(self) -> None:
        """Release memory and threads. No call follows."""
        ...


@runtime_checkable
class LaunchesAhead(Protocol):
    """What an engine can do besides, if it computes asynchronously."""

    def launch_ahead(self, plan: SchedulerOutput) -> bool:
        """Begin a step behind the one that runs, whose tokens are not known yet: the device takes
        them from where it draws them (`Request.has_pending_token` tells of whom). False, and
        nothing was begun, if the engine has to know them. Any thread may call it while another is
        in `step`, whose next call is for what `AheadScheduler.revise` has left of this plan, and
        waits for its tokens; or for another plan, and they are forgotten."""
        ...


@dataclass(frozen=True, slots=True)
class EngineIteration:
    """One step of an engine that schedules by itself, as far as the engine tells of it."""

    step_id: int
    step_s: float
    """Measured duration; 0 if it was not measured."""

    num_scheduled: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preempted: int
    num_running: int
    """Requests with KV blocks."""

    num_free_device_blocks: int


class RequestEngine(Protocol):
    """Runs whole requests by a scheduler of its own: there is no step to plan, only an order in
    which requests are started. Beside our schedulers, to compare with."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Fixed from load to close."""
        ...

    def start(self, spec: RequestSpec) -> None:
        """Hand over a request whose id is not in use.

        Raises:
            RequestRejected: the engine cannot do what the request asks.
            EngineError: the engine cannot go on.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request that has not ended; `collect` tells nothing more of it."""
        ...

    def collect(self, timeout_s: float) -> list[RequestEvent]:
        """Return the news since the last call, waiting for some at most `timeout_s`. The last
        event of each request, and no other, has a `finish_reason`.

        Raises:
            EngineError: the engine cannot go on.
        """
        ...

    def take_iterations(self) -> list[EngineIteration]:
        """Return the steps since the last call, oldest first."""
        ...

    def close(self) -> None:
        """Release memory and threads. No call follows."""
        ...
