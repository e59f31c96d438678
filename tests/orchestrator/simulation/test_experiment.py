from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from orchestrator.core.errors import ConfigError
from orchestrator.core.slide_batching import SlideBatchingOptions
from orchestrator.core.slo import DeadlineAnchor
from orchestrator.simulation.config import SimulationConfig
from orchestrator.simulation.experiment import quick_version, run_simulation
from orchestrator.simulation.planning import plan_nodes
from orchestrator.simulation.policy_config import SlideBatchingPolicy
from orchestrator.simulation.results import Estimate
from orchestrator.yaml_config import load_yaml_model, validate_model

CONFIGS = sorted(Path("configs/simulations").glob("*.yaml"))


def make_config(**changes: object) -> SimulationConfig:
    """A model that takes 5 ms a step, 0.1 ms a token, on 80 requests of a real trace."""
    data: dict[str, object] = {
        "engine": {
            "profile": {
                "prefill_quadratic_s": 0.0,
                "prefill_context_s": 0.0,
                "prefill_token_s": 1e-4,
                "prefill_cached_s": 0.0,
                "decode_context_s": 0.0,
                "decode_token_s": 1e-4,
                "mixed_step_s": 5e-3,
                "decode_step_s": 5e-3,
            },
            "num_device_blocks": 4000,
            "max_model_len": 8192,
        },
        "traces": [
            {
                "file": "benchmarks/traces/lmsys_arena_vtc.csv.gz",
                "num_requests": 80,
                "max_output_tokens": 100,
            }
        ],
        "policies": {
            "slide": {"scheduler": "slide-batching", "options": {"anchor": "fixed"}},
            "fcfs": {"scheduler": "fcfs"},
        },
        "priorities": {
            "classes": [
                {"name": "high", "weight": 2, "share": 1},
                {"name": "low", "weight": 1, "share": 1, "slo_factor": 2},
            ]
        },
        "slo": {"rule": "fixed", "ttft_s": 1.0, "tpot_s": 0.03},
        "rates": {"unit": "requests_per_s", "values": [5, 40]},
        "num_seeds": 2,
        **changes,
    }
    return validate_model(data, SimulationConfig, source="test")


def test_a_sweep_runs_every_policy_on_the_same_requests(tmp_path: Path) -> None:
    results = run_simulation(make_config(), tmp_path, num_processes=1)

    assert len(results.runs) == 2 * 2 * 2
    obtainable = {(run.rate, run.seed): run.figures.report.obtainable_gain for run in results.runs}
    for run in results.runs:
        assert run.figures.report.obtainable_gain == obtainable[run.rate, run.seed]
        assert sorted(run.figures.by_class) == ["high", "low"]
    for bound in results.bounds:
        for run in results.runs:
            if (run.rate, run.seed) == (bound.rate, bound.seed):
                assert run.figures.report.tdg_ratio <= bound.tdg_ratio + 1e-9


def test_equal_configurations_write_equal_files_on_any_number_of_processes(
    tmp_path: Path,
) -> None:
    for name, num_processes in (("one", 1), ("two", 2)):
        run_simulation(make_config(), tmp_path / name, num_processes=num_processes)

    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert {name.rpartition(".")[2] for name in names} == {"json", "csv", "png", "svg"}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_csv_has_one_line_per_run_and_class(tmp_path: Path) -> None:
    run_simulation(make_config(num_seeds=1), tmp_path, num_processes=1)

    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 2 * 2 * 3
    assert {row["class"] for row in rows} == {"all", "high", "low"}
    assert float(rows[0]["tdg_ratio"]) == results["runs"][0]["figures"]["report"]["tdg_ratio"]


def test_the_knee_is_where_the_reference_begins_to_fail(tmp_path: Path) -> None:
    """Well below it first come, first served attains 90 %, well above it does not."""
    config = make_config(
        num_seeds=1,
        policies={"reference": {"scheduler": "sarathi-fcfs"}},
        slo={"rule": "fixed", "ttft_s": 0.1, "tpot_s": 0.03},
        rates={"unit": "knee", "values": [0.5, 10.0]},
    )

    results = run_simulation(config, tmp_path, num_processes=1)

    attained = {run.rate: run.figures.report.slo_attainment for run in results.runs}
    assert attained[10.0] < 0.9 <= attained[0.5]


def test_a_workload_too_short_for_overload_has_no_knee(tmp_path: Path) -> None:
    """Even all 80 at once are served within 100 s to the first token."""
    config = make_config(
        slo={"rule": "fixed", "ttft_s": 100.0, "tpot_s": 1.0},
        rates={"unit": "knee", "values": [1.0]},
    )

    with pytest.raises(ConfigError, match="too few to overload"):
        run_simulation(config, tmp_path, num_processes=1)


def test_derived_objectives_follow_the_engine(tmp_path: Path) -> None:
    """A step of few decodes takes little more than its constant of 5 ms: twice that, and some."""
    config = make_config(slo={"rule": "derived"}, num_seeds=1)

    slo = run_simulation(config, tmp_path, num_processes=1).calibrations["lmsys_arena_vtc"].slo

    assert slo.ttft_s == 1.0  # five prefills of some 200 tokens are less than the least
    assert 0.010 < slo.tpot_s < 0.030


def test_capped_requests_are_reported(tmp_path: Path) -> None:
    """Outputs are cut to 100 tokens; the trace's median is 196."""
    results = run_simulation(make_config(num_seeds=1), tmp_path, num_processes=1)

    calibration = results.calibrations["lmsys_arena_vtc"]
    assert 0.5 < calibration.num_capped / calibration.num_requests < 1.0


def test_the_plan_is_the_fewest_nodes_that_meet_the_target() -> None:
    config = make_config(num_seeds=1, plan={"requests_per_s": 60, "target": 0.95, "max_nodes": 8})

    for plan in plan_nodes(config, num_processes=1):
        assert plan.num_nodes is not None
        assert plan.tried[plan.num_nodes] >= 0.95
        assert plan.num_nodes > 1
        assert plan.tried[plan.num_nodes - 1] < 0.95


def test_a_target_out_of_reach_has_no_plan() -> None:
    config = make_config(num_seeds=1, plan={"requests_per_s": 100, "target": 1.0, "max_nodes": 1})

    assert [plan.num_nodes for plan in plan_nodes(config, num_processes=1)] == [None, None]


def test_planning_without_a_plan_section_is_refused() -> None:
    with pytest.raises(ConfigError, match="plan"):
        plan_nodes(make_config())


def test_scheduler_options_are_read_as_their_own_types() -> None:
    policy = make_config().policies["slide"]

    assert isinstance(policy, SlideBatchingPolicy)
    assert policy.options.anchor is DeadlineAnchor.FIXED
    assert isinstance(policy.options, SlideBatchingOptions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": {"a": {"scheduler": "fcfs", "alpha": 1}}}, "alpha"),
        ({"policies": {"a": {"scheduler": "fifo"}}}, "scheduler"),
        ({"bursts": [{"start_s": 1, "duration_s": 1, "factor": 2, "x": 1}]}, "unknown key 'x'"),
        ({"rates": {"values": []}}, "rates"),
    ],
)
def test_a_mistake_in_a_configuration_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_an_interval_of_one_seed_has_no_width() -> None:
    assert Estimate.of([0.5]) == Estimate(0.5, None)


def test_intervals_are_students() -> None:
    """Values 1, 2, 3: standard error 1 / sqrt(3), t of 2 degrees of freedom 4.303."""
    estimate = Estimate.of([1.0, 2.0, 3.0])

    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.303 / 3**0.5, rel=1e-3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_simulation_of_the_repository_is_valid(path: Path) -> None:
    config = load_yaml_model(path, SimulationConfig)

    assert all(trace.file.exists() for trace in config.traces)
    assert quick_version(config).num_seeds == 1
