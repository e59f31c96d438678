from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from orchestrator.core.errors import ConfigError
from orchestrator.simulation.trace import (
    Burst,
    at_rate,
    capped,
    part_of,
    read_trace,
    with_bursts,
)
from tests.orchestrator.simulation.workloads import make_trace

TRACES = Path("benchmarks/traces")


def write_trace(path: Path, text: str) -> Path:
    with gzip.open(path, "wt") as file:
        file.write(text)
    return path


def test_a_trace_begins_at_zero_whatever_its_first_time(tmp_path: Path) -> None:
    text = "arrival_s,input_tokens,output_tokens,client,more\n5.0,10,1,a,x\n6.5,20,2,,y\n"

    trace = read_trace(write_trace(tmp_path / "t.csv.gz", text))

    assert trace.arrival_s.tolist() == [0.0, 1.5]
    assert trace.num_input_tokens.tolist() == [10, 20]
    assert trace.clients == ("a", "")


@pytest.mark.parametrize(
    "text",
    [
        "arrival_s,input_tokens,output_tokens\n0,1,1\n1,1,1\n",
        "arrival_s,input_tokens,output_tokens,client\n0,1,1,\n",
        "arrival_s,input_tokens,output_tokens,client\n1,1,1,\n0,1,1,\n",
        "arrival_s,input_tokens,output_tokens,client\n0,1,0,\n1,1,1,\n",
        "arrival_s,input_tokens,output_tokens,client\n0,x,1,\n1,1,1,\n",
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"t\.csv\.gz"):
        read_trace(write_trace(tmp_path / "t.csv.gz", text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv.gz")


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.csv.gz")), ids=lambda p: p.name)
def test_every_trace_of_the_repository_can_be_read(path: Path) -> None:
    assert len(read_trace(path)) > 900


def test_rate_scaling_stretches_gaps_alike() -> None:
    """Three requests in 4 s are 0.5 a second; at 2 a second the gaps are a quarter."""
    trace = at_rate(make_trace([0.0, 1.0, 4.0]), 2.0)

    assert trace.arrival_s.tolist() == [0.0, 0.25, 1.0]
    assert trace.mean_rate == 2.0


def test_caps_cut_outputs_first_and_count_each_changed_request_once() -> None:
    """Context 100, outputs to 20: (70, 30) loses output only, (90, 30) input too."""
    trace, num_changed = capped(
        make_trace([0.0, 1.0, 2.0], num_input_tokens=[50, 70, 90], num_output_tokens=[10, 30, 30]),
        max_model_len=100,
        max_output_tokens=20,
    )

    assert trace.num_output_tokens.tolist() == [10, 20, 20]
    assert trace.num_input_tokens.tolist() == [50, 70, 80]
    assert num_changed == 2


def test_a_part_begins_at_zero() -> None:
    part = part_of(make_trace([0.0, 1.0, 3.0, 7.0]), 2, start=1)

    assert part.arrival_s.tolist() == [0.0, 2.0]


def test_a_burst_lets_its_stretch_of_the_trace_pass_faster() -> None:
    """One request a second; from 2 s to 4 s three times as many, then one a second again.

    The burst uses up 6 s of the trace: requests 2 to 8 come between 2 s and 4 s.
    """
    trace = with_bursts(
        make_trace(np.arange(11.0).tolist()), [Burst(start_s=2.0, duration_s=2.0, factor=3.0)]
    )

    expected_s = [0, 1, 2, 2 + 1 / 3, 2 + 2 / 3, 3, 3 + 1 / 3, 3 + 2 / 3, 4, 5, 6]
    assert trace.arrival_s == pytest.approx(np.array(expected_s))


def test_bursts_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match="begins before"):
        with_bursts(make_trace([0.0, 1.0]), [Burst(0.0, 2.0, 2.0), Burst(1.0, 2.0, 2.0)])
