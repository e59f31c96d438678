from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.command_line.main import app
from orchestrator.command_line.monitoring import (
    alert_rules,
    check_expressions,
    expressions,
    grafana_dashboard,
)
from orchestrator.metrics import NodeMetrics
from router.metrics import RouterMetrics

KEPT = Path(__file__).parents[3] / "configs" / "monitoring"
REGISTRIES = (NodeMetrics().registry, RouterMetrics().registry)


def test_every_query_asks_for_what_is_declared() -> None:
    assert check_expressions(expressions(), REGISTRIES) == []


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("rate(proserve_node_preemption_total[1m])", "proserve_node_preemption_total is not decl"),
        ("rate(proserve_node_preemptions[1m])", "proserve_node_preemptions is not declared"),
        ('proserve_node_kv_blocks{plaze="host"}', "proserve_node_kv_blocks has no label plaze"),
        ("sum by (clas) (proserve_node_kv_blocks)", "no metric has label clas"),
        ("rate(proserve_node_step_seconds_total[1m])", "step_seconds_total is not declared"),
    ],
)
def test_a_metric_that_was_renamed_in_one_place_only_is_found(
    expression: str, problem: str
) -> None:
    (found,) = check_expressions([expression], REGISTRIES)

    assert problem in found


def test_the_files_in_configs_are_what_is_rendered(tmp_path: Path) -> None:
    """After a change: proserve render monitoring --output-dir configs/monitoring"""
    result = CliRunner().invoke(app, ["render", "monitoring", "--output-dir", str(tmp_path)])

    assert result.exit_code == 0, result.output
    for name in ("grafana-dashboard.json", "alerts.yaml"):
        assert (tmp_path / name).read_text() == (KEPT / name).read_text()


def test_the_dashboard_is_one_that_grafana_can_lay_out() -> None:
    dashboard = json.loads((KEPT / "grafana-dashboard.json").read_text())

    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    places = {
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in panels
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    }
    assert len(places) == sum(p["gridPos"]["w"] * p["gridPos"]["h"] for p in panels), "no overlap"
    assert max(x for x, _ in places) < 24
    for panel in panels:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${source}"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's package prometheus")
def test_prometheus_takes_the_rules_and_every_query(tmp_path: Path) -> None:
    """Queries of panels as recording rules, so that promtool parses them too."""
    queries = [
        {"record": f"panel:{panel['id']}{target['refId']}", "expr": target["expr"]}
        for panel in grafana_dashboard()["panels"]
        for target in panel["targets"]
    ]
    rules = alert_rules()
    rules["groups"].append({"name": "panels", "rules": queries})
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rules))

    result = subprocess.run(
        ["promtool", "check", "rules", path], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stdout + result.stderr
