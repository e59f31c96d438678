"""Makes the scheduler that a configuration names: the one place that knows all of them."""

from __future__ import annotations

from typing import Literal, get_args

from orchestrator.core import baselines
from orchestrator.core.batch_scheduler import BatchScheduler
from orchestrator.core.deadline_scheduler import DeadlineOptions, DeadlineScheduler
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler

SchedulerName = Literal[
    "slide-batching",
    "fcfs",
    "vllm-fcfs",
    "sarathi-fcfs",
    "sarathi-priority",
    "weighted-vtc",
    "fair-batching",
    "edf",
    "sjf",
    "density",
    "decode-first-edf",
    "decode-first-density",
    "strict-priority",
    "urgency-priority",
]

SCHEDULER_NAMES: tuple[SchedulerName, ...] = get_args(SchedulerName)

SchedulerOptions = SlideBatchingOptions | DeadlineOptions | baselines.SarathiOptions
"""Of slide-batching, of the others with a time budget, of those with a token budget."""

_TOKEN_BUDGET: dict[str, type[baselines.SarathiScheduler]] = {
    "sarathi-fcfs": baselines.SarathiScheduler,
    "sarathi-priority": baselines.SarathiPriorityScheduler,
    "weighted-vtc": baselines.WeightedVtcScheduler,
    "strict-priority": baselines.StrictPriorityScheduler,
}

_TIME_BUDGET: dict[str, type[DeadlineScheduler]] = {
    "fair-batching": baselines.FairBatchingScheduler,
    "edf": baselines.EdfScheduler,
    "sjf": baselines.SjfScheduler,
    "density": baselines.DensityScheduler,
    "decode-first-edf": baselines.DecodeFirstEdfScheduler,
    "decode-first-density": baselines.DecodeFirstDensityScheduler,
    "urgency-priority": baselines.UrgencyPriorityScheduler,
}


def options_type(name: SchedulerName) -> type[SchedulerOptions] | None:
    """Return the type of a scheduler's options; None if it has none."""
    if name == "slide-batching":
        return SlideBatchingOptions
    if name in _TIME_BUDGET:
        return DeadlineOptions
    return baselines.SarathiOptions if name in _TOKEN_BUDGET else None


def make_scheduler(
    name: SchedulerName,
    options: SchedulerOptions | None,
    capabilities: EngineCapabilities,
    model: BatchLatencyModel,
) -> BatchScheduler:
    """Return a new scheduler; `options` None gives its defaults.

    Raises:
        ValueError: the options are another scheduler's, or do not go together with the
            engine's limits.
    """
    match name, options:
        case "slide-batching", SlideBatchingOptions() | None:
            return SlideBatchingScheduler(capabilities, model, options or SlideBatchingOptions())
        case "fcfs", None:
            return baselines.FcfsScheduler(capabilities, model)
        case "vllm-fcfs", None:
            return baselines.VllmFcfsScheduler(capabilities, model)
        case _, baselines.SarathiOptions() | None if name in _TOKEN_BUDGET:
            return _TOKEN_BUDGET[name](capabilities, model, options or baselines.SarathiOptions())
        case _, DeadlineOptions() | None if name in _TIME_BUDGET:
            return _TIME_BUDGET[name](capabilities, model, options or DeadlineOptions())
    raise ValueError(f"scheduler {name} does not take {type(options).__name__}")
