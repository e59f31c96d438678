from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.gain import GainTable
from orchestrator.core.latency import BatchLatencyModel, BatchShape, LatencyProfile
from orchestrator.core.slo import PriorityClass, Slo
from orchestrator.simulation.cluster import replay
from orchestrator.simulation.upper_bound import gain_upper_bound
from orchestrator.simulation.workload import Workload
from router.baselines import LeastLoadPolicy
from tests.factories import make_capabilities, make_profile
from tests.orchestrator.simulation.workloads import make_node, make_trace, make_workload_of

# Free steps, so that what fits is a matter of work alone.
WORK_ONLY = make_profile(step_constant_s=0.0)


@dataclass(frozen=True)
class Progress:
    """How far one request is in the brute force."""

    num_computed: int = 0
    num_outputs: int = 0


def best_gain(
    workload: Workload,
    profile: LatencyProfile,
    *,
    indices: tuple[int, ...],
    max_num_batched_tokens: int,
    max_num_seqs: int,
) -> float:
    """Return the greatest gain of the requests `indices` on one node, over all schedules.

    A step computes any number of tokens of any requests; a request may be thrown out and computed
    again in one piece; the node may wait for an arrival.
    """
    model = BatchLatencyModel(profile)
    trace = workload.trace
    arrivals_s = [float(trace.arrival_s[i]) for i in indices]
    prompts = [int(trace.num_input_tokens[i]) for i in indices]
    outputs = [int(trace.num_output_tokens[i]) for i in indices]
    classes = [workload.class_of(i) for i in indices]

    def due_s(row: int, token: int) -> float:
        return arrivals_s[row] + classes[row].slo.ttft_s + token * classes[row].slo.tpot_s

    last_due_s = max(due_s(row, outputs[row] - 1) for row in range(len(indices)))

    def pieces(row: int, progress: Progress, now_s: float) -> Iterator[tuple[int, int]]:
        """Yield (cached, new) tokens for each way to be in the next step, or not."""
        yield (progress.num_computed, 0)
        if arrivals_s[row] <= now_s and progress.num_outputs < outputs[row]:
            known = prompts[row] + progress.num_outputs
            for new in range(1, known - progress.num_computed + 1):
                yield (progress.num_computed, new)
            if progress.num_computed:
                yield (0, known)

    @cache
    def best(now_s: float, state: tuple[Progress, ...]) -> float:
        if now_s >= last_due_s:
            return 0.0
        later = [s for s in arrivals_s if s > now_s]
        found = best(min(later), state) if later else 0.0
        for chosen in itertools.product(
            *(list(pieces(row, progress, now_s)) for row, progress in enumerate(state))
        ):
            num_tokens = sum(new for _, new in chosen)
            num_seqs = sum(new > 0 for _, new in chosen)
            if 0 < num_tokens <= max_num_batched_tokens and num_seqs <= max_num_seqs:
                found = max(found, after_step(now_s, state, chosen))
        return found

    def after_step(
        now_s: float, state: tuple[Progress, ...], chosen: tuple[tuple[int, int], ...]
    ) -> float:
        shape = BatchShape()
        for progress, (cached, new) in zip(state, chosen, strict=True):
            if new == 1 and progress.num_outputs and cached == progress.num_computed:
                shape += BatchShape.of_decode(cached)
            elif new:
                shape += BatchShape.of_prefill(new, cached)
        end_s = now_s + model.predict_s(shape)
        gain = 0.0
        following = []
        for row, (progress, (cached, new)) in enumerate(zip(state, chosen, strict=True)):
            is_sampled = new > 0 and cached + new == prompts[row] + progress.num_outputs
            if is_sampled and end_s < due_s(row, progress.num_outputs):
                gain += classes[row].weight
            following.append(Progress(cached + new, progress.num_outputs + is_sampled))
        return gain + best(end_s, tuple(following))

    return best(0.0, (Progress(),) * len(indices))


milliseconds = st.integers(0, 8).map(lambda n: n / 1000)


@st.composite
def tiny_workloads(draw: st.DrawFn, num_requests: int = 2) -> Workload:
    trace = make_trace(
        [0.0, *sorted(draw(milliseconds) for _ in range(num_requests - 1))],
        num_input_tokens=[draw(st.integers(1, 2)) for _ in range(num_requests)],
        num_output_tokens=[draw(st.integers(1, 3)) for _ in range(num_requests)],
    )
    classes = tuple(
        PriorityClass(
            f"class-{index}",
            draw(st.sampled_from([1.0, 2.0, 5.0])),
            Slo(draw(st.integers(1, 8)) / 1000, draw(st.integers(1, 4)) / 1000),
        )
        for index in range(num_requests)
    )
    return replace(make_workload_of(trace), classes=classes)


@st.composite
def profiles(draw: st.DrawFn) -> LatencyProfile:
    """Some with decodes so dear that computing a request again is cheaper."""
    microseconds = st.integers(0, 1500).map(lambda n: n * 1e-6)
    return LatencyProfile(
        prefill_quadratic_s=draw(microseconds),
        prefill_context_s=draw(microseconds),
        prefill_token_s=draw(st.integers(1, 2000)) * 1e-6,
        prefill_cached_s=draw(microseconds),
        decode_context_s=draw(microseconds),
        decode_token_s=draw(microseconds),
        mixed_step_s=draw(microseconds),
        decode_step_s=draw(microseconds),
    )


@settings(deadline=None, max_examples=150)
@given(
    workload=tiny_workloads(),
    profile=profiles(),
    max_num_batched_tokens=st.integers(1, 4),
    max_num_seqs=st.integers(1, 2),
)
def test_no_schedule_of_one_node_exceeds_the_bound(
    workload: Workload, profile: LatencyProfile, max_num_batched_tokens: int, max_num_seqs: int
) -> None:
    best = best_gain(
        workload,
        profile,
        indices=(0, 1),
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
    )

    bound = gain_upper_bound(
        workload,
        profile,
        make_capabilities(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs),
    )

    assert best <= bound.gain + 1e-9


@settings(deadline=None, max_examples=40)
@given(workload=tiny_workloads(num_requests=3), profile=profiles())
def test_no_schedule_of_two_nodes_exceeds_the_bound(
    workload: Workload, profile: LatencyProfile
) -> None:
    """Each request goes to one of the two; the node's best schedules add up."""
    best = 0.0
    for nodes in itertools.product((0, 1), repeat=3):
        parts = [tuple(i for i in range(3) if nodes[i] == node) for node in (0, 1)]
        if max(len(part) for part in parts) < 3:  # three on one is never better
            best = max(
                best,
                sum(
                    best_gain(
                        workload, profile, indices=part, max_num_batched_tokens=4, max_num_seqs=2
                    )
                    for part in parts
                    if part
                ),
            )

    bound = gain_upper_bound(
        workload,
        profile,
        make_capabilities(max_num_batched_tokens=4, max_num_seqs=2),
        num_nodes=2,
    )

    assert best <= bound.gain + 1e-9


def test_with_room_for_all_the_bound_is_everything() -> None:
    """Ten requests an hour apart: nothing competes, 30 tokens."""
    workload = make_workload_of(make_trace([3600.0 * i for i in range(10)]))

    bound = gain_upper_bound(workload, make_profile(), make_capabilities())

    assert bound.gain == bound.obtainable_gain == 30.0


def test_in_overload_the_bound_is_the_best_selection_of_work() -> None:
    """Twenty prompts of 200 ms at once, due within 1 s, no constants: five fit.

    Ten of them are worth 2, so five of these: 10 of 30. The relaxation may use the whole of the
    last bin and serve one request in parts, so a quarter more is allowed for.
    """
    workload = make_workload_of(
        make_trace([0.0] * 20, num_input_tokens=200, num_output_tokens=1),
        weights=[2.0] * 10 + [1.0] * 10,
    )

    bound = gain_upper_bound(workload, WORK_ONLY, make_capabilities())

    assert bound.obtainable_gain == 30.0
    assert 10.0 <= bound.gain <= 12.5 * 1.01


def test_more_nodes_never_lower_the_bound() -> None:
    workload = make_workload_of(
        make_trace(np.arange(0.0, 4.0, 0.1).tolist(), num_input_tokens=300, num_output_tokens=5)
    )

    bounds = [
        gain_upper_bound(workload, make_profile(), make_capabilities(), num_nodes=n).gain
        for n in (1, 2, 4)
    ]

    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[2]


def test_a_token_out_of_reach_on_an_idle_node_counts_nothing() -> None:
    """The first token needs 10 ms and 10 prompt tokens of 1 ms; it is due in 15 ms.

    The second is due at 115 ms and can be had.
    """
    workload = make_workload_of(make_trace([0.0, 9.0], num_output_tokens=2), slo=Slo(0.015, 0.1))

    bound = gain_upper_bound(workload, make_profile(), make_capabilities())

    assert bound.gain == pytest.approx(2.0)
    assert bound.obtainable_gain == 4.0


def test_requests_that_do_not_count_take_nothing_from_those_that_do() -> None:
    workload = make_workload_of(
        make_trace([0.0] * 20, num_input_tokens=200, num_output_tokens=1), weights=[1.0] * 20
    )
    is_counted = np.arange(20) < 4

    bound = gain_upper_bound(workload, WORK_ONLY, make_capabilities(), is_counted=is_counted)

    assert bound.gain == bound.obtainable_gain == 4.0


def test_requests_without_promises_are_always_obtainable() -> None:
    workload = make_workload_of(
        make_trace([0.0] * 50, num_input_tokens=200), slo=Slo(math.inf, math.inf)
    )

    bound = gain_upper_bound(workload, make_profile(), make_capabilities())

    assert bound.tdg_ratio == 1.0


def test_a_real_scheduler_in_overload_stays_below_the_bound() -> None:
    random = np.random.default_rng(0)
    workload = make_workload_of(
        make_trace(
            np.cumsum(random.exponential(0.05, 200)).tolist(),
            num_input_tokens=random.integers(1, 200, 200).tolist(),
            num_output_tokens=random.integers(1, 30, 200).tolist(),
        )
    )
    outcome = replay(workload, lambda _: make_node(workload), num_nodes=1, policy=LeastLoadPolicy())

    gain = GainTable(outcome.records).report().gain
    bound = gain_upper_bound(workload, make_profile(), make_capabilities())

    assert 0.3 * bound.gain < gain <= bound.gain < bound.obtainable_gain
