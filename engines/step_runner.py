"""What every engine that computes logits does around its model: checks, KV copies, sampling, and
the account of who failed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from engines.kv_copies import CopyReport
from engines.plan_checks import PlanChecks, check_transfers
from orchestrator.core.errors import EngineLost, EngineStepError
from orchestrator.core.kv_transfer import KVTransfer
from orchestrator.core.ports import (
    EngineCapabilities,
    ScheduledRequest,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.request import Request
from orchestrator.logit_adjustment import SamplingFailed
from orchestrator.sampling import Drawing, InvalidLogits, SampledToken, Sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a model computed in one step."""

    sequences: Sequence[ScheduledRequest]
    """Not all of them need to be sampled."""

    logits: torch.Tensor  # (num_sequences, vocab_size), row i is sequence i's


Compute = Callable[[Sequence[ScheduledRequest]], StepLogits]
"""Runs a model on these parts of a checked plan; there is at least one. Whatever it raises
ends the step."""


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens that go from one step to the next without the host, which does not know them yet."""

    token_ids: torch.Tensor  # (num_drawn,), of the step before; -1 for those that are of no use
    rows: Sequence[int]
    """For each part of the next step, the place of its token in `token_ids`; -1 if the token is
    known."""


ComputeAhead = Callable[[Sequence[ScheduledRequest], Feed], StepLogits | None]
"""Begins to run a model on these parts of a checked plan, behind the step before: each is a single
token, and gets the next one. None if that cannot be done; nothing was begun then."""


class StepCopies(Protocol):
    """The KV copies of a step, as `engines.kv_copies.KVCopies` makes them."""

    @property
    def in_flight(self) -> Sequence[KVTransfer]:
        """What was started and not yet reported."""
        ...

    def start(self, transfers: Iterable[KVTransfer]) -> None:
        """Begin a step with these copies."""
        ...

    def hold_compute(self) -> None:
        """Let the computation wait for all copies of this step."""
        ...

    def broken_onboards(self) -> Sequence[KVTransfer]:
        """Return the onboards of this step that failed."""
        ...

    def wait_for_one(self) -> None:
        """Return when there is something to report, or nothing is in flight."""
        ...

    def finish_step(self) -> CopyReport:
        """Return the onboards, and the offloads that have ended by now."""
        ...

    def give_up_step(self, transfers: Iterable[KVTransfer], reason: str) -> None:
        """End a step that failed; the next report tells of these transfers."""
        ...


@dataclass(slots=True)
class _Launched:
    """A step whose tokens are being drawn."""

    step_id: int
    requests: Sequence[Request] = ()
    """Those that get a token, in the order of the drawing."""

    drawing: Drawing | None = None
    """None if nothing was computed."""

    computed: torch.cuda.Event | None = None
    """Comes when a GPU has computed all of it."""

    queued_s: float = 0.0
    """When it was, if ahead."""

    failed: dict[str, str] = field(default_factory=dict)
    """Who gets no token, and why, as far as that is known."""

    def wait(self) -> None:
        """Return when the tokens are drawn."""
        if self.drawing is not None:
            self.drawing.wait()
        if self.computed is not None:
            self.computed.synchronize()  # there may have been no token to wait for

    def finish(self, plan: SchedulerOutput) -> dict[str, SampledToken]:
        """Return the tokens by request id, of those requests that are in the plan still; add to
        `failed` who got none."""
        if self.drawing is None:
            return {}
        wanted = {part.request_id for part in plan.scheduled}
        tokens = {}
        for request, token in zip(self.requests, self.drawing.finish(), strict=True):
            request_id = request.request_id
            if request_id not in wanted:
                continue
            if token is None:
                self.failed |= InvalidLogits([request_id]).reasons
            else:
                tokens[request_id] = token
        return tokens


class StepRunner:
    """Runs steps of one model. One thread may use it at a time, but for `launch_ahead`."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        copies: StepCopies,
        sampler: Sampler,
        *,
        compute: Compute,
        compute_ahead: ComputeAhead | None = None,
    ) -> None:
        """`compute` makes the model's kernels wait for onboarded blocks, unless the plan waits
        for transfers. `compute_ahead` is for an engine that can begin a step before the tokens of
        the one before are known. The sampler follows grammars if the capabilities have no grammar
        obstacle."""
        self._limits, self._copies, self._sampler = capabilities, copies, sampler
        self._compute_logits, self._compute_ahead = compute, compute_ahead
        self._plan_checks = PlanChecks(capabilities)
        self._model_s: float | None = None
        self._lock = threading.Lock()
        """Held but while tokens are waited for: then the next step may be launched."""

        self._latest: _Launched | None = None
        """The step that runs or has run last, if another can be launched behind it."""

        self._ahead: _Launched | None = None
        self._ended_s = 0.0
        """When the tokens of the last step were known."""

    def run(self, plan: SchedulerOutput) -> StepOutput:
        """Copy and compute one step; see `core.ports.Engine`.

        A request with a token outside of the vocabulary, whose logits are not numbers or whose
        grammar cannot be followed fails alone: it is in `failed`. Any other fault ends the whole
        step; the next one that does not fail then tells what became of its copies.

        Raises:
            EngineStepError: names every request of the step.
            EngineLost: what `compute` or the copies run on has ended.
        """
        started_s = time.perf_counter()
        try:
            with self._lock:
                self._model_s = None
                self._sampler.forget(plan.finished_ids)
                # Held until the device is past it, even if it is forgotten: its kernels still write
                # to pinned memory, which others must not get before.
                ahead, self._ahead = self._ahead, None
                if ahead is not None and ahead.step_id == plan.step_id:
                    launched, started_s = ahead, max(ahead.queued_s, self._ended_s)
                    self._copies.start(())
                else:
                    launched = self._launch(plan)
                self._latest = launched
            launched.wait()
            self._ended_s = time.perf_counter()
            with self._lock:
                tokens = launched.finish(plan)
                if not plan.scheduled:
                    self._copies.wait_for_one()
                copies = self._copies.finish_step()
        except EngineLost:
            raise
        # Of any kind, such as Triton's own: onboards that are not ended here would be reported as
        # whole by the next step, whose requests may share their blocks.
        except Exception as error:
            with self._lock:
                self._forget_launched()
                self._copies.give_up_step(plan.transfers, f"step {plan.step_id} failed: {error}")
            raise EngineStepError(
                f"step {plan.step_id} failed: {error}",
                request_ids=[part.request_id for part in plan.scheduled],
            ) from error
        return StepOutput(
            step_id=plan.step_id,
            new_token_ids={request_id: (t.token_id,) for request_id, t in tokens.items()},
            step_s=time.perf_counter() - started_s,
            model_s=self._model_s,
            logprobs={
                request_id: (token.logprobs,)
                for request_id, token in tokens.items()
                if token.logprobs is not None
            },
            completed_transfers=copies.completed,
            failed_transfers=copies.failed,
            copies=copies.figures,
            failed=launched.failed,
        )

    @torch.inference_mode()
    def launch_ahead(self, plan: SchedulerOutput) -> bool:
        """Begin a step behind the one that runs; see `core.ports.LaunchesAhead`.

        That is done for steps of decodes alone, without copies, whose tokens are drawn by their
        logits alone.
        """
        if self._compute_ahead is None or plan.transfers or plan.waits_for_transfers:
            return False
        with self._lock:
            before = self._latest
            if before is None or before.step_id != plan.step_id - 1:
                return False
            feed = self._feed(plan.scheduled, before)
            if feed is None:
                return False
            try:
                self._plan_checks.check(plan, is_ahead=True)
                check_transfers(plan, self._limits, self._copies.in_flight)
                step = self._compute_ahead(plan.scheduled, feed)
                if step is None:
                    return False
                requests = [part.request for part in step.sequences]
                drawing = self._sampler.begin(step.logits, requests, is_ahead=True)
                computed = _recorded_behind(step.logits)
            except Exception:  # Of any kind. If it stays, `run` meets it, and tells whom it ends.
                logger.exception("step %d could not be launched ahead", plan.step_id)
                return False
            queued_s = time.perf_counter()
            self._ahead = _Launched(plan.step_id, requests, drawing, computed, queued_s=queued_s)
            return True

    def close(self) -> None:
        """Wait for a step that was launched ahead. No call follows."""
        self._forget_launched()

    def _forget_launched(self) -> None:
        """Let no step follow those that were launched."""
        ahead, self._latest, self._ahead = self._ahead, None, None
        if ahead is not None:
            with contextlib.suppress(Exception):  # Whatever it is, nobody waits for its tokens.
                ahead.wait()

    def _feed(self, parts: Sequence[ScheduledRequest], before: _Launched) -> Feed | None:
        """Return where a step finds its tokens; None if it needs the host, or none of `before`."""
        if before.drawing is None or before.drawing.needs_logits:
            return None
        places = {request.request_id: row for row, request in enumerate(before.requests)}
        rows = []
        for part in parts:
            request = part.request
            is_last = part.num_computed_tokens + 1 == request.num_tokens
            if part.num_new_tokens > 1 or not is_last or not self._sampler.can_begin_ahead(request):
                return None
            if not request.has_pending_token:
                if self._is_foreign(part):
                    return None
                rows.append(-1)
            elif (row := places.get(request.request_id)) is not None:
                rows.append(row)
            else:
                return None
        return Feed(before.drawing.device_ids, rows) if max(rows, default=-1) >= 0 else None

    def _foreign_tokens(self, parts: Sequence[ScheduledRequest]) -> dict[str, str]:
        """Return a message for each request with a token that the model does not know."""
        message = f"the request holds token ids outside of [0, {self._sampler.vocab_size})"
        return {part.request_id: message for part in parts if self._is_foreign(part)}

    def _is_foreign(self, part: ScheduledRequest) -> bool:
        token_ids, biases = part.token_ids, part.request.spec.sampling.logit_bias
        vocab_size = self._sampler.vocab_size
        if len(token_ids) == 1:  # the many decodes of a step
            smallest = largest = token_ids[0]
        else:
            smallest, largest = min(token_ids), max(token_ids)
        if smallest < 0 or largest >= vocab_size:
            return True
        return bool(biases) and not all(0 <= token < vocab_size for token, _ in biases)

    @torch.inference_mode()
    def _launch(self, plan: SchedulerOutput) -> _Launched:
        """Begin a step."""
        self._plan_checks.check(plan)
        check_transfers(plan, self._limits, self._copies.in_flight)
        self._copies.start(plan.transfers)
        launched = _Launched(plan.step_id, failed=self._foreign_tokens(plan.scheduled))
        parts: Sequence[ScheduledRequest] = plan.scheduled
        if launched.failed:
            parts = [part for part in parts if part.request_id not in launched.failed]
        if plan.waits_for_transfers:
            self._copies.hold_compute()
        if parts:
            self._compute(parts, launched)
        return launched

    def _compute(self, parts: Sequence[ScheduledRequest], launched: _Launched) -> None:
        """Begin to compute these parts, and to draw their tokens."""
        self._sampler.prepare(part.request for part in parts)
        started_s = time.perf_counter()
        step = self._compute_logits(parts)
        if step.logits.is_cpu:  # a GPU has only been told
            self._model_s = time.perf_counter() - started_s
        lost = self._without_blocks(parts)
        rows = [
            row
            for row, part in enumerate(step.sequences)
            if part.is_sampled and not (lost and part.request_id in lost)
        ]
        self._draw(step, rows, launched)
        launched.computed = _recorded_behind(step.logits)

    def _draw(self, step: StepLogits, rows: Sequence[int], launched: _Launched) -> None:
        """Begin to draw tokens for these rows of the logits; note as failed who gets none."""
        chosen = step.logits if len(rows) == len(step.sequences) else step.logits[rows]
        requests = [step.sequences[row].request for row in rows]
        while launched.drawing is None:
            try:
                launched.drawing = self._sampler.begin(chosen, requests)
            except SamplingFailed as error:
                launched.failed.update(error.reasons)
                good = [i for i, r in enumerate(requests) if r.request_id not in error.reasons]
                chosen, requests = chosen[good], [requests[i] for i in good]
        launched.requests = requests

    def _without_blocks(self, parts: Sequence[ScheduledRequest]) -> set[str]:
        """Return the requests that read a block whose onboard failed."""
        broken = self._copies.broken_onboards()
        if not broken:
            return set()
        blocks = {block for transfer in broken for block in transfer.device_block_ids}
        return {transfer.request_id for transfer in broken} | {
            part.request_id for part in parts if not blocks.isdisjoint(part.block_ids)
        }


def _recorded_behind(logits: torch.Tensor) -> torch.cuda.Event | None:
    """Return what comes when all that was queued with these logits has been computed; None if it
    has. Not of the whole device: offloads go on."""
    if logits.is_cpu:
        return None
    computed = torch.cuda.Event()
    computed.record(torch.cuda.current_stream(logits.device))
    return computed
