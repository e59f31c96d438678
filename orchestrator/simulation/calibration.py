"""What an engine can do on a trace: its saturated rate, fair objectives, and the knee."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.core.errors import ConfigError
from orchestrator.core.gain import GainTable
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.slo import PriorityClass, Slo
from orchestrator.simulation.config import DerivedSlo, FixedSlo, SimulationConfig, TraceConfig
from orchestrator.simulation.scenario import (
    counted_window,
    load_part,
    make_seeded_workload,
    replay_workload,
)
from orchestrator.simulation.trace import Trace, at_rate
from orchestrator.simulation.workload import ClassShare, PrioritiesPer, Workload, make_workload

SATURATION_REQUESTS = 400
"""Requests that arrive at once to see how fast one node can be; enough to fill its batches many
times over, few enough to take seconds."""

KNEE_PRECISION = 0.03
"""Relative; neighbouring rates of a sweep are several times further apart."""


MAX_KNEE_FACTOR = 16
"""In saturated rates; beyond, all requests as good as come at once."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """A trace's objectives and rates on one engine and number of nodes."""

    slo: Slo
    saturated_rate: float
    """Requests per second that the nodes finish when all wait at the door."""

    knee_rate: float | None
    """Highest rate at which the reference policy attains enough on the mean over seeds; None if
    it was not needed."""

    num_capped: int
    """Requests of the first seed's part whose lengths were cut to the engine."""

    num_requests: int
    """Requests of that part."""


def calibrate(config: SimulationConfig, trace_config: TraceConfig) -> Calibration:
    """Return what an engine can do on a trace: objectives and saturated rate from the first
    seed's part, the knee from all seeds' parts, which may be of very different weight."""
    trace, num_capped = load_part(config, trace_config, seed=0)
    saturated_rate = _saturated_rate(config, trace_config, trace)
    slo = _slo(config, trace_config, trace, saturated_rate)
    saturated_rate *= config.relative_speed
    knee_rate = None
    if config.rates.unit == "knee":
        knee_rate = _knee_rate(config, trace_config, slo, saturated_rate)
    return Calibration(slo, saturated_rate, knee_rate, num_capped, len(trace))


def _saturated_rate(config: SimulationConfig, trace_config: TraceConfig, trace: Trace) -> float:
    """Return the requests per second of one node when all arrive at once."""
    at_once = replace(trace, arrival_s=np.zeros(len(trace)))
    workload = _without_promises(config, trace_config, at_once)
    outcome = replay_workload(config, config.reference, workload, engines=[config.engine], seed=0)
    return len(workload) / outcome.end_s


def _slo(
    config: SimulationConfig, trace_config: TraceConfig, trace: Trace, saturated_rate: float
) -> Slo:
    match config.slo:
        case FixedSlo(ttft_s=ttft_s, tpot_s=tpot_s):
            return Slo(ttft_s=ttft_s, tpot_s=tpot_s)
        case DerivedSlo() as rule:
            prompt_tokens = int(np.percentile(trace.num_input_tokens, 90))
            ttft_s = rule.ttft_prefills * _isolated_prefill_s(config, prompt_tokens)
            workload = _without_promises(config, trace_config, at_rate(trace, saturated_rate / 2))
            outcome = replay_workload(
                config, config.reference, workload, engines=[config.engine], seed=0
            )
            gaps = GainTable(outcome.records).report().tbt_s
            assert gaps is not None, "some request has two tokens"
            return Slo(
                ttft_s=min(max(ttft_s, rule.min_ttft_s), rule.max_ttft_s),
                tpot_s=max(rule.tpot_gaps * gaps.p50, rule.min_tpot_s),
            )


def _isolated_prefill_s(config: SimulationConfig, num_tokens: int) -> float:
    """Return how long an idle node takes to a first token, in chunks as large as allowed."""
    model = BatchLatencyModel(config.engine.profile)
    chunk = config.engine.max_num_batched_tokens
    return sum(
        model.step_constant_s(has_prefill=True)
        + model.prefill_s(min(chunk, num_tokens - start), start)
        for start in range(0, num_tokens, chunk)
    )


def _without_promises(
    config: SimulationConfig, trace_config: TraceConfig, trace: Trace
) -> Workload:
    first = slice(0, SATURATION_REQUESTS)
    part = Trace(
        trace.arrival_s[first],
        trace.num_input_tokens[first],
        trace.num_output_tokens[first],
        clients=trace.clients[first],
    )
    return make_workload(
        part,
        [ClassShare(PriorityClass("any", 1.0, Slo()), 1.0)],
        per=PrioritiesPer.REQUEST,
        max_model_len=config.engine.max_model_len,
        max_output_tokens=trace_config.max_output_tokens,
        random=np.random.default_rng(0),
    )


def _knee_rate(
    config: SimulationConfig, trace_config: TraceConfig, slo: Slo, saturated_rate: float
) -> float:
    """Return the highest rate, to KNEE_PRECISION, at which the reference attains enough."""
    steady = config.model_copy(update={"bursts": ()})

    def attainment(requests_per_s: float, seed: int) -> float:
        workload = make_seeded_workload(
            steady, trace_config, slo=slo, requests_per_s=requests_per_s, seed=seed
        )
        outcome = replay_workload(
            config, config.reference, workload, engines=config.engines(), seed=seed
        )
        report = GainTable(outcome.records).report(counted_window(config, workload))
        return report.slo_attainment

    def is_attained(requests_per_s: float) -> bool:
        # Stops where the seeds to come could attain everything and still not make up for it.
        num_seeds, target = config.num_seeds, config.rates.knee_attainment
        total = 0.0
        for seed in range(num_seeds):
            total += attainment(requests_per_s, seed)
            if total + num_seeds - seed - 1 < target * num_seeds:
                return False
        return True

    low, high = saturated_rate / 64, saturated_rate
    if not is_attained(low):
        raise ConfigError(
            f"{trace_config.file}: even at {low:.3g} requests/s the reference policy attains fewer "
            f"than {config.rates.knee_attainment:.0%} of the objectives (TTFT {slo.ttft_s:.3g} s, "
            f"TPOT {slo.tpot_s:.3g} s), so there is no knee; relax `slo`"
        )
    while is_attained(high):  # a short part ends before the queue of a rate too high is long
        if high > MAX_KNEE_FACTOR * saturated_rate:
            raise ConfigError(
                f"{trace_config.file}: its requests are too few to overload "
                "the nodes at any rate; raise `num_requests` or tighten `slo`"
            )
        low, high = high, 2 * high
    while high / low > 1 + KNEE_PRECISION:
        middle = math.sqrt(low * high)
        if is_attained(middle):
            low = middle
        else:
            high = middle
    return low
