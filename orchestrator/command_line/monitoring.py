"""A Grafana dashboard and Prometheus alert rules over the metrics that routers and nodes declare.

Titles, units and thresholds are said here; what a metric means, its kind and its labels come from
its declaration. A name, label or kind that is not declared so is an error, so that a metric cannot
be renamed in one place only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from orchestrator.command_line.declared_metrics import declared_metrics

_NAME = re.compile(r"\b(proserve_\w+)(?:\{([^}]*)\})?")
_LABEL = re.compile(r"(\w+)\s*[=!]~?")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "gauge": ("",),
    "info": ("_info",),
}
_ALWAYS = frozenset({"le", "instance", "job"})
"""Labels that Prometheus gives by itself."""


@dataclass(frozen=True, slots=True)
class Series:
    """One query of a panel."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph over time."""

    title: str
    unit: str
    """In Grafana's words."""

    series: tuple[Series, ...]
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that somebody should look at."""

    name: str
    expression: str
    for_s: int
    severity: str
    summary: str
    advice: str


def _quantile(metric: str, quantile: float, by: str) -> str:
    return f"histogram_quantile({quantile}, sum by (le, {by}) (rate({metric}_bucket[5m])))"


def _share(part: str, whole: str, by: str) -> str:
    return f"sum by ({by}) (rate({part}[5m])) / sum by ({by}) (rate({whole}[5m]))"


PANELS = (
    Panel(
        "Captured of possible service gain",
        "percentunit",
        (
            Series(
                _share(
                    "proserve_router_service_gain_captured_total",
                    "proserve_router_service_gain_possible_total",
                    "priority_class",
                ),
                "{{priority_class}}",
            ),
        ),
    ),
    Panel(
        "Sequences that met their objectives",
        "percentunit",
        (
            Series(
                _share(
                    'proserve_router_sequences_total{objectives="met"}',
                    "proserve_router_sequences_total",
                    "priority_class",
                ),
                "{{priority_class}}",
            ),
        ),
    ),
    Panel(
        "Captured of possible service gain, by client",
        "percentunit",
        (
            Series(
                _share(
                    "proserve_router_client_service_gain_captured_total",
                    "proserve_router_client_service_gain_possible_total",
                    "client",
                ),
                "{{client}}",
            ),
        ),
    ),
    Panel(
        "Time to first token",
        "s",
        (
            Series(
                _quantile("proserve_router_time_to_first_token_seconds", 0.5, "priority_class"),
                "{{priority_class}}, half",
            ),
            Series(
                _quantile("proserve_router_time_to_first_token_seconds", 0.95, "priority_class"),
                "{{priority_class}}, 95 %",
            ),
        ),
    ),
    Panel(
        "Time between tokens, 95 %",
        "s",
        (
            Series(
                _quantile("proserve_router_inter_token_seconds", 0.95, "priority_class"),
                "{{priority_class}}",
            ),
        ),
    ),
    Panel(
        "Tokens to clients",
        "short",
        (
            Series(
                "sum by (priority_class) (rate(proserve_router_completion_tokens_total[1m]))",
                "{{priority_class}}",
            ),
        ),
    ),
    Panel(
        "The sliding boundary: requests before it and behind it",
        "short",
        (Series("sum by (side) (proserve_node_boundary_requests)", "{{side}}"),),
        is_stacked=True,
    ),
    Panel(
        "Requests on nodes",
        "short",
        (
            Series(
                "sum by (instance, state) (proserve_node_open_requests)", "{{instance}} {{state}}"
            ),
            Series("sum(proserve_router_waiting_sequences)", "waiting at the router"),
        ),
    ),
    Panel(
        "KV blocks by place and state",
        "short",
        (Series("sum by (place, state) (proserve_node_kv_blocks)", "{{place}} {{state}}"),),
        is_stacked=True,
    ),
    Panel(
        "KV copies",
        "Bps",
        (
            Series(
                "sum by (direction) (rate(proserve_node_kv_copied_bytes_total[1m]))",
                "{{direction}}",
            ),
        ),
    ),
    Panel(
        "Time that steps waited for KV copies, of all",
        "percentunit",
        (
            Series(
                _share(
                    'proserve_node_kv_copy_seconds_total{exposure="exposed"}',
                    "proserve_node_step_seconds_sum",
                    "instance",
                ),
                "{{instance}}",
            ),
        ),
    ),
    Panel(
        "Step time: measured and predicted",
        "s",
        (
            Series(
                _share(
                    "proserve_node_step_seconds_sum", "proserve_node_step_seconds_count", "instance"
                ),
                "{{instance}} measured",
            ),
            Series(
                _share(
                    "proserve_node_step_predicted_seconds_total",
                    "proserve_node_step_seconds_count",
                    "instance",
                ),
                "{{instance}} predicted",
            ),
        ),
    ),
    Panel(
        "Time in which the engine waits for its next step, of all",
        "percentunit",
        (
            Series(
                "sum by (instance) (rate(proserve_node_exposed_seconds_sum[5m])) / "
                "(sum by (instance) (rate(proserve_node_exposed_seconds_sum[5m])) + "
                "sum by (instance) (rate(proserve_node_step_seconds_sum[5m])))",
                "{{instance}}",
            ),
        ),
    ),
    Panel(
        "Preemptions",
        "short",
        (Series("sum by (instance) (rate(proserve_node_preemptions_total[1m]))", "{{instance}}"),),
    ),
    Panel(
        "Refused requests",
        "reqps",
        (Series("sum by (code) (rate(proserve_router_refusals_total[5m]))", "{{code}}"),),
    ),
    Panel(
        "Sequences that lost their node",
        "reqps",
        (
            Series(
                "sum by (after_tokens) (rate(proserve_router_retries_total[5m]))",
                "sent on, tokens before: {{after_tokens}}",
            ),
            Series("sum(rate(proserve_router_sequences_given_up_total[5m]))", "given up"),
        ),
    ),
)

ALERTS = (
    Alert(
        "ProServeNoNodeUsable",
        "sum by (instance) (proserve_router_endpoint_usable) == 0",
        30,
        "critical",
        "Router {{ $labels.instance }} has no node that it can send requests to.",
        "GET /health of the router says why for each node; see docs/reliability.md.",
    ),
    Alert(
        "ProServeNodeUnusable",
        "min by (endpoint_id) (proserve_router_endpoint_usable) == 0",
        120,
        "warning",
        "Node {{ $labels.endpoint_id }} gets no requests.",
        "GET /health of the router says why; the node's log tells more.",
    ),
    Alert(
        "ProServeGainLost",
        _share(
            "proserve_router_service_gain_captured_total",
            "proserve_router_service_gain_possible_total",
            "priority_class",
        )
        + " < 0.8",
        300,
        "warning",
        "Class {{ $labels.priority_class }} earns less than 80 % of its possible service gain.",
        "Too much load, or objectives that this hardware cannot keep: docs/how-to/missed-slo.md.",
    ),
    Alert(
        "ProServeSequencesGivenUp",
        "sum(increase(proserve_router_sequences_given_up_total[5m])) > 0",
        0,
        "critical",
        "Requests were given up because no node could finish them.",
        "Look for nodes that end or hang; see docs/reliability.md.",
    ),
    Alert(
        "ProServePredictionsOff",
        'max by (instance, class) (abs(proserve_node_step_overrun_ratio{quantile="0.5"})) > 0.5',
        600,
        "warning",
        "Half of the steps on {{ $labels.instance }} are off by half of their prediction or more.",
        "Deadlines are judged wrongly; profile the engine on this machine again: proserve build.",
    ),
    Alert(
        "ProServeSchedulingSlow",
        "sum by (instance) (rate(proserve_node_exposed_seconds_sum[5m])) / "
        "sum by (instance) (rate(proserve_node_step_seconds_sum[5m])) > 0.2",
        600,
        "warning",
        "The engine of node {{ $labels.instance }} waits a fifth of its steps' time for the next.",
        "Its machine may be too busy with something else.",
    ),
    Alert(
        "ProServeCopiesExposed",
        _share(
            'proserve_node_kv_copy_seconds_total{exposure="exposed"}',
            "proserve_node_step_seconds_sum",
            "instance",
        )
        + " > 0.1",
        600,
        "warning",
        "Steps on {{ $labels.instance }} wait for KV copies in a tenth of their time or more.",
        "The KV cache is too small for what is served; see docs/kv-cache.md.",
    ),
    Alert(
        "ProServeClientsFileStale",
        "max by (instance) (proserve_router_clients_file_is_stale) == 1",
        60,
        "warning",
        "Router {{ $labels.instance }} could not read its clients file and uses an older one.",
        "The router's log says what is wrong with the file.",
    ),
)


def check_expressions(
    expressions: Iterable[str], registries: Sequence[CollectorRegistry]
) -> list[str]:
    """Return what is wrong: metrics that nobody declares, or not with that kind or these labels."""
    declared = _declared(registries)
    problems = []
    for expression in expressions:
        grouped = {
            label.strip() for found in _GROUPED.findall(expression) for label in found.split(",")
        }
        known: set[str] = set(_ALWAYS)
        for name, labels in _NAME.findall(expression):
            if name not in declared:
                problems.append(f"{name} is not declared: {expression}")
                continue
            known |= declared[name]
            unknown = set(_LABEL.findall(labels)) - declared[name] - _ALWAYS
            problems += [f"{name} has no label {label}: {expression}" for label in sorted(unknown)]
        problems += [f"no metric has label {x}: {expression}" for x in sorted(grouped - known)]
    return problems


def expressions() -> list[str]:
    """Return every query of the dashboard and the alerts."""
    queries = [series.expression for panel in PANELS for series in panel.series]
    return queries + [alert.expression for alert in ALERTS]


def grafana_dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    return {
        "title": "ProServe",
        "uid": "proserve",
        "tags": ["proserve"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "source",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                }
            ]
        },
        "panels": [_panel(index, panel) for index, panel in enumerate(PANELS)],
    }


def alert_rules() -> dict[str, Any]:
    """Return the alerts as a Prometheus rule file."""
    return {
        "groups": [
            {
                "name": "proserve",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expression,
                        "for": f"{alert.for_s}s",
                        "labels": {"severity": alert.severity},
                        "annotations": {"summary": alert.summary, "description": alert.advice},
                    }
                    for alert in ALERTS
                ],
            }
        ]
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
    custom = {"stacking": stacking, "fillOpacity": 30 if panel.is_stacked else 0, "lineWidth": 2}
    return {
        "id": index + 1,
        "title": panel.title,
        "type": "timeseries",
        "datasource": source,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (index % 2), "y": 8 * (index // 2)},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": source,
                "expr": series.expression,
                "legendFormat": series.legend,
            }
            for place, series in enumerate(panel.series)
        ],
    }


def _declared(registries: Sequence[CollectorRegistry]) -> dict[str, set[str]]:
    """Return the labels of every sample that these registries can have, by its name."""
    return {
        metric.name + suffix: set(metric.labels)
        for registry in registries
        for metric in declared_metrics(registry)
        for suffix in _SUFFIXES[metric.kind]
    }
