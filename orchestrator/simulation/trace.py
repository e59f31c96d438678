"""Request traces: when requests came, how long they were, who sent them.

A trace's arrivals are never drawn anew: load is changed by stretching time, seeds differ by the
part of the trace they see, bursts by letting a stretch of the trace pass faster.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.errors import ConfigError

COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "client")


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival; all columns have one entry per request."""

    arrival_s: NDArray[np.float64]
    """Ascending, the first at 0."""

    num_input_tokens: NDArray[np.int64]
    num_output_tokens: NDArray[np.int64]
    clients: tuple[str, ...]
    """Who sent each request; empty strings where the source does not say."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def mean_rate(self) -> float:
        """Requests per second from the first to the last arrival."""
        return (len(self) - 1) / float(self.arrival_s[-1])


@dataclass(frozen=True, slots=True)
class Burst:
    """A stretch of time in which requests come faster than the trace says."""

    start_s: float
    duration_s: float
    factor: float
    """Arrival rate inside the burst, in times of the rate outside."""


@lru_cache(maxsize=4)
def read_trace(path: Path) -> Trace:
    """Return the trace in a gzip CSV file with the columns `COLUMNS`; further ones are ignored.

    Raises:
        ConfigError: the file cannot be read or is no such table of at least two requests.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = [tuple(row[name] for name in COLUMNS) for row in csv.DictReader(file)]
        arrival_s = np.array([row[0] for row in rows], dtype=np.float64)
        num_input_tokens = np.array([row[1] for row in rows], dtype=np.int64)
        num_output_tokens = np.array([row[2] for row in rows], dtype=np.int64)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        columns = ", ".join(COLUMNS)
        raise ConfigError(f"{path}: not a CSV trace with columns {columns}: {error}") from error
    if len(rows) < 2 or arrival_s[0] == arrival_s[-1] or (np.diff(arrival_s) < 0).any():
        raise ConfigError(f"{path}: a trace needs two or more requests in order of arrival")
    if (num_input_tokens < 1).any() or (num_output_tokens < 1).any():
        raise ConfigError(f"{path}: every request needs at least one input and one output token")
    return Trace(
        arrival_s - arrival_s[0],
        num_input_tokens,
        num_output_tokens,
        clients=tuple(row[3] for row in rows),
    )


def part_of(trace: Trace, num_requests: int, start: int) -> Trace:
    """Return `num_requests` consecutive requests from index `start`, the first one at 0 seconds."""
    rows = slice(start, start + num_requests)
    return Trace(
        trace.arrival_s[rows] - trace.arrival_s[start],
        trace.num_input_tokens[rows],
        trace.num_output_tokens[rows],
        clients=trace.clients[rows],
    )


def capped(trace: Trace, *, max_model_len: int, max_output_tokens: int) -> tuple[Trace, int]:
    """Return the trace with lengths that fit an engine, and how many requests that changed.

    Outputs are cut to `max_output_tokens`, then inputs to what is left of the context.
    """
    num_output_tokens = np.minimum(trace.num_output_tokens, max_output_tokens)
    num_input_tokens = np.minimum(trace.num_input_tokens, max_model_len - num_output_tokens)
    is_changed = (num_output_tokens != trace.num_output_tokens) | (
        num_input_tokens != trace.num_input_tokens
    )
    changed = replace(trace, num_input_tokens=num_input_tokens, num_output_tokens=num_output_tokens)
    return changed, int(is_changed.sum())


def at_rate(trace: Trace, requests_per_s: float) -> Trace:
    """Return the trace with time stretched so that its mean rate is `requests_per_s`."""
    return replace(trace, arrival_s=trace.arrival_s * (trace.mean_rate / requests_per_s))


def with_bursts(trace: Trace, bursts: Sequence[Burst]) -> Trace:
    """Return the trace with time running `factor` times as fast inside each burst.

    The bursts are in seconds of the result, in order and apart from each other. Requests after
    a burst come as much earlier as the burst has used up of the trace.
    """
    # Corners of the piecewise linear map from the result's time to the trace's.
    result_s, trace_s = [0.0], [0.0]
    for burst in bursts:
        if burst.start_s < result_s[-1]:
            raise ValueError(f"the burst at {burst.start_s} s begins before the one before it ends")
        for corner_s, factor in (
            (burst.start_s, 1.0),
            (burst.start_s + burst.duration_s, burst.factor),
        ):
            trace_s.append(trace_s[-1] + (corner_s - result_s[-1]) * factor)
            result_s.append(corner_s)
    end_s = max(float(trace.arrival_s[-1]) - trace_s[-1], 0.0)
    result_s.append(result_s[-1] + end_s)
    trace_s.append(trace_s[-1] + end_s)
    return replace(trace, arrival_s=np.interp(trace.arrival_s, trace_s, result_s))
