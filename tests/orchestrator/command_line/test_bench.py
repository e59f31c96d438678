from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from orchestrator.command_line.bench import (
    Variant,
    VariantRun,
    changed,
    make_load,
    variants,
)
from orchestrator.command_line.bench_report import Conditions, html_report
from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.core.errors import ConfigError
from orchestrator.core.gain import Outcome, RequestRecord
from orchestrator.core.slo import Slo
from orchestrator.simulation.trace import Trace

CONTENT: dict[str, Any] = {
    "router": {"port": 8000, "num_replicas": 2},
    "node_groups": [
        {
            "name": "n",
            "num_nodes": 2,
            "first_port": 8101,
            "engine": {"directory": "here", "device_kv_bytes": "1GiB"},
        }
    ],
}
TRACE = Trace(np.arange(10.0), np.full(10, 5_000), np.full(10, 500), clients=("",) * 10)


def record(name: str, priority_class: str, *times_s: float) -> RequestRecord:
    return RequestRecord(
        request_id=name,
        arrival_s=100.0,
        slo=Slo(ttft_s=1.0, tpot_s=0.5),
        weight=2.0,
        priority_class=priority_class,
        client="",
        num_expected_tokens=2,
        token_times_s=times_s,
        outcome=Outcome.FINISHED if len(times_s) == 2 else Outcome.FAILED,
    )


def test_every_scheduler_runs_with_every_policy() -> None:
    found = variants(["fcfs", "slide-batching"], ["gorouting", "least-load"])

    assert len(found) == 4
    assert found[0] == Variant("fcfs with gorouting", "fcfs", "gorouting")


@pytest.mark.parametrize("schedulers", [[], ["fcfs"]])
def test_one_variant_alone_is_no_comparison(schedulers: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"repeat --scheduler or --policy"):
        variants(schedulers, [])


def test_a_variant_changes_all_nodes_and_the_router_and_nothing_of_the_original() -> None:
    found = changed(CONTENT, Variant("x", "fcfs", "least-load"))

    assert found["node_groups"][0]["scheduler"] == "fcfs"
    assert found["router"] == {"port": 8000, "policy": "least-load"}
    assert "scheduler" not in CONTENT["node_groups"][0]
    DeploymentConfig.model_validate(found)


def test_a_load_is_the_trace_at_another_rate_cut_to_what_fits() -> None:
    """10 requests a second apart; at 2 a second on average, half as far apart."""
    load = make_load(
        DeploymentConfig.model_validate(CONTENT),
        TRACE,
        num_requests=8,
        requests_per_s=2 * TRACE.mean_rate,
        max_model_len=1_024,
        max_output_tokens=24,
        seed=0,
    )

    assert load.trace.num_output_tokens.tolist() == [24] * 8
    assert load.trace.num_input_tokens.tolist() == [1_000] * 8
    assert len({each.name for each in load.classes}) > 1
    assert load.trace.arrival_s[-1] < TRACE.arrival_s[7]


def test_more_requests_than_the_trace_has_are_refused() -> None:
    config = DeploymentConfig.model_validate(CONTENT)

    with pytest.raises(ConfigError, match="--num-requests is 11, the trace has 10"):
        make_load(config, TRACE, num_requests=11, requests_per_s=1, max_model_len=99,
                  max_output_tokens=9, seed=0)  # fmt: skip


def test_the_report_has_figures_plots_and_the_command_and_loads_nothing() -> None:
    """`good` has both tokens of both requests in time, `bad` one of four."""
    good = (record("a", "high", 100.1, 100.2), record("b", "low", 100.3, 100.4))
    bad = (record("a", "high", 100.9, 109.0), record("b", "low"))
    conditions = Conditions(["proserve", "bench", "a b.yaml"], "d", "t", "l", "m", "now")

    page = html_report(
        [
            VariantRun(Variant("bad <one>", "x", None), bad),
            VariantRun(Variant("good", "y", None), good),
        ],
        conditions,
    )

    assert "Most gain: <strong>good</strong>" in page
    assert "bad &lt;one&gt;" in page
    assert "bad <one>" not in page.replace("<!--", "")
    assert page.count("<svg") == 2
    assert "proserve bench &#x27;a b.yaml&#x27;" in page
    assert "<script" not in page
    assert 'src="http' not in page
    assert "<link" not in page
    assert "<td>1.000</td>" in page
