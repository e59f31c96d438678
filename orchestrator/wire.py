"""Messages between router and node (JSON over HTTP) and between a node's two processes (msgpack).

HTTP service of a node:

    POST /v1/generate        body GenerateRequest; answers lines of TokenEvent as
                             application/x-ndjson, the last one with a `finish_reason`.
                             Empty lines in between say that the request is alive.
                             Closing the connection aborts the request. A header `traceparent`
                             (W3C Trace Context) makes the node's spans part of a trace.
    GET  /v1/node            NodeDescription: what is served, its limits and latency profile
    GET  /v1/snapshot        NodeSnapshot: load now
    GET  /v1/snapshots       lines of NodeSnapshot as application/x-ndjson, one at once and one
                             whenever something has changed, until either side closes
    POST /v1/drain           finish what runs, refuse what comes
    GET  /v1/requests/ID     Story: what became of a recent request
    GET  /health             200 {"status": "ready"}, or 503 with a reason
    GET  /metrics            Prometheus text

HTTP service of a router, for nodes that register themselves; both want the header
`Authorization: Bearer SECRET`:

    POST   /internal/v1/nodes        body NodeRegistration; answers NodeLease. Registers the node,
                                     or renews its lease.
    DELETE /internal/v1/nodes/{endpoint_id}?instance_id=...
                                     the node is not to be used any more; 204

A node's errors are answered as ErrorBody with a 4xx or 5xx status. Clocks are never compared across
machines: a request carries the seconds already spent on it, not a point in time.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from orchestrator.core.latency import LatencyProfile
from orchestrator.core.latency_correction import StepErrors
from orchestrator.core.ports import (
    CopyFigures,
    EngineCapabilities,
    QueueSummary,
    RequestEvent,
    SchedulerLoad,
    TokenLogprobs,
)
from orchestrator.core.request import FinishReason, RequestSpec, ResumePoint, SamplingParams
from orchestrator.core.slo import Slo


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Body of POST /v1/generate: one sequence to generate."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority_class: str
    weight: float
    elapsed_s: float = 0.0
    """Seconds since the client's request arrived at the router."""

    ttft_s: float | None = None
    """None: no objective."""

    tpot_s: float | None = None
    client_id: str = ""
    """Whose request it is, for schedulers that are fair among clients."""

    cache_salt: str = ""
    """Only requests with the same one share KV."""

    heartbeat_s: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """The answer never pauses for longer while the request is alive: without news, the node sends
    an empty line. Silence therefore means that the node is dead, stopped or cut off."""

    resume_from: ResumePoint | None = None
    """What another node has delivered of this sequence already; the answer begins behind it."""

    def to_spec(self) -> RequestSpec:
        """Return the core's form of this request."""
        return RequestSpec(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            sampling=self.sampling,
            priority_class=self.priority_class,
            weight=self.weight,
            client_id=self.client_id,
            cache_salt=self.cache_salt,
            slo=Slo(
                ttft_s=math.inf if self.ttft_s is None else self.ttft_s,
                tpot_s=math.inf if self.tpot_s is None else self.tpot_s,
            ),
        )


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the answer to /v1/generate."""

    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per new token if the request asked, else empty."""

    finish_reason: FinishReason | None = None
    error: str | None = None


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """Body of every error answer of a node."""

    message: str
    field: str | None = None
    """The request field at fault, if it was one."""

    is_final: bool = False
    """True if waiting will not help: the engine could not be loaded, or is gone."""


class NodeDescription(msgspec.Struct, frozen=True):
    """Body of GET /v1/node; does not change while the node lives."""

    endpoint_id: str
    instance_id: str
    """Of this process: another one behind the same address has another."""

    model: str
    """Name under which the model is served."""

    capabilities: EngineCapabilities
    latency_profile: LatencyProfile
    """Measured when the engine was built."""

    manifest_sha256: str
    """Of the engine directory's manifest; equal means the same model and weights."""


class NodeSnapshot(msgspec.Struct, frozen=True):
    """Body of GET /v1/snapshot: what the engine held when it last said so, and every request that
    the node has accepted since."""

    endpoint_id: str
    instance_id: str
    seq_no: int
    """Grows with every report of the executor; a smaller one is older."""

    age_s: float
    """How long ago the engine said it; a step may have been running since."""

    load: SchedulerLoad
    queue: QueueSummary
    """Deadlines are counted from the moment of the engine's report."""

    is_draining: bool


class NodeRegistration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /internal/v1/nodes: a node says where it is."""

    endpoint_id: str
    instance_id: str
    """Of the process, as in `NodeDescription`."""

    url: str
    """Under which the router reaches it."""


class NodeLease(msgspec.Struct, frozen=True):
    """Answer to a registration."""

    lease_s: float
    """The router forgets the node after this long without another registration."""


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """Start a request."""

    spec: RequestSpec
    arrival_s: float
    """When the client's request arrived, on this machine's monotonic clock, which both
    processes share; seconds spent before the node are already subtracted."""

    resume_from: ResumePoint | None = None


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    """End a request; ignored if it has already ended."""

    request_id: str


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Refuse new requests from now on."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Abort everything and exit."""


Command = AddRequest | AbortRequest | Drain | Shutdown


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """First message of an executor process: the engine is loaded."""

    model: str
    capabilities: EngineCapabilities
    latency_profile: LatencyProfile
    manifest_sha256: str


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """Last message of an executor process that could not load, or go on with, its engine."""

    message: str


class Events(msgspec.Struct, frozen=True, tag=True):
    """News of requests, in order."""

    events: tuple[RequestEvent, ...]


class LoadReport(msgspec.Struct, frozen=True, tag=True):
    """What the executor holds."""

    seq_no: int
    """Grows with each report."""

    load: SchedulerLoad
    taken_at_s: float
    """On this machine's monotonic clock, which both processes share."""

    num_added: int
    """AddRequest messages that `load` and `queue` know of."""

    queue: QueueSummary | None
    """None in most reports of a busy executor."""


class RequestMark(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a step did to a request."""

    request_id: str
    name: str
    """`prefill`, `preempted`, `resumed`, `offload` or `onboard`."""

    began_s: float
    """When the step began, on this machine's monotonic clock."""

    num_tokens: int | None = None
    """Computed, of a `prefill`."""

    num_blocks: int | None = None
    """Copied, of an `offload` or `onboard`."""


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """Figures of one step, for metrics."""

    step_id: int
    step_s: float
    predicted_step_s: float | None
    """None if nobody predicted it: the engine schedules by itself."""

    schedule_s: float | None
    """Time spent planning and accounting; None if the engine schedules by itself."""

    exposed_s: float | None
    """Time before the step in which the engine had nothing to run although there was work; None
    likewise."""

    num_scheduled: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preempted: int
    num_skipped: int
    num_urgent: int
    num_normal: int
    num_prefix_tokens: int
    """Tokens that need not be computed, because requests with the same beginning were."""

    num_kept_tokens: int
    """Tokens of preempted requests that need not be computed again."""

    num_recomputed_tokens: int
    """Tokens that were computed before and lost."""

    copies: CopyFigures
    """KV copies that ended with the step."""

    model_s: float | None
    """Part of `step_s` in which the model computed; None if the engine cannot tell it apart."""

    errors: tuple[StepErrors, ...]
    """Of recent predictions, for each batch class seen so far."""

    load: LoadReport
    marks: tuple[RequestMark, ...] = ()


ExecutorMessage = EngineReady | EngineFailed | Events | LoadReport | StepReport
