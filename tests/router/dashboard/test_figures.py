from __future__ import annotations

import math

import pytest

from router.dashboard.figures import (
    ClassFigures,
    NodeFigures,
    Observation,
    class_figures,
    client_figures,
    node_figures,
)
from router.dashboard.samples import Samples


def router_text(*, captured: float, possible: float, met: int, missed: int) -> str:
    return f"""\
# TYPE proserve_router_service_gain_captured_total counter
proserve_router_service_gain_captured_total{{priority_class="high"}} {captured}
# TYPE proserve_router_service_gain_possible_total counter
proserve_router_service_gain_possible_total{{priority_class="high"}} {possible}
# TYPE proserve_router_sequences_total counter
proserve_router_sequences_total{{priority_class="high",objectives="met"}} {met}
proserve_router_sequences_total{{priority_class="high",objectives="missed"}} {missed}
# TYPE proserve_router_client_service_gain_captured_total counter
proserve_router_client_service_gain_captured_total{{client="shop"}} {captured}
# TYPE proserve_router_client_service_gain_possible_total counter
proserve_router_client_service_gain_possible_total{{client="shop"}} {possible}
# TYPE proserve_router_endpoint_sequences gauge
proserve_router_endpoint_sequences{{endpoint_id="n"}} 3
"""


def node_text(*, step_s: float, predicted_s: float, num_steps: int, offloaded: float) -> str:
    return f"""\
# TYPE proserve_node_step_seconds histogram
proserve_node_step_seconds_bucket{{le="+Inf"}} {num_steps}
proserve_node_step_seconds_sum {step_s}
proserve_node_step_seconds_count {num_steps}
# TYPE proserve_node_step_predicted_seconds_total counter
proserve_node_step_predicted_seconds_total {predicted_s}
# TYPE proserve_node_kv_copied_bytes_total counter
proserve_node_kv_copied_bytes_total{{direction="offload"}} {offloaded}
# TYPE proserve_node_boundary_requests gauge
proserve_node_boundary_requests{{side="urgent"}} 4
proserve_node_boundary_requests{{side="normal"}} 9
# TYPE proserve_node_kv_blocks gauge
proserve_node_kv_blocks{{place="device",state="used"}} 7
"""


BEFORE = Observation(
    100.0,
    Samples(router_text(captured=10, possible=20, met=1, missed=1)),
    {"n": Samples(node_text(step_s=1.0, predicted_s=1.1, num_steps=10, offloaded=0))},
)
NOW = Observation(
    105.0,
    Samples(router_text(captured=40, possible=60, met=4, missed=2)),
    {"n": Samples(node_text(step_s=2.0, predicted_s=2.3, num_steps=30, offloaded=1e6))},
)


def test_what_is_recent_of_a_class_is_the_growth_since_the_earlier_scrape() -> None:
    """30 of 40 gain in 5 s; 3 of the 4 sequences that ended met their objectives."""
    (high,) = class_figures(NOW, BEFORE, {"high": 4.0})

    assert high == ClassFigures(
        name="high",
        weight=4.0,
        requests_in_progress=0,
        gain_captured=40,
        gain_possible=60,
        sequences_met=4,
        sequences_missed=2,
        completion_tokens=0,
        recent_gain_per_s=6.0,
        recent_gain_ratio=0.75,
        recent_attainment=0.75,
        recent_ttft_ms=None,
    )


def test_nothing_is_said_of_a_time_in_which_nothing_happened() -> None:
    (high,) = class_figures(NOW, NOW, {"high": 4.0})

    assert (high.recent_gain_ratio, high.recent_attainment) == (None, None)
    assert high.gain_captured == 40


def test_classes_come_with_the_most_valuable_first() -> None:
    found = class_figures(NOW, BEFORE, {"low": 1.0, "high": 4.0, "normal": 2.0})

    assert [each.name for each in found] == ["high", "normal", "low"]


def test_a_client_s_gain_is_told() -> None:
    (shop,) = client_figures(NOW, BEFORE)

    assert (shop.name, shop.gain_captured, shop.recent_gain_ratio) == ("shop", 40, 0.75)


def test_a_node_s_steps_are_means_of_those_since_the_earlier_scrape() -> None:
    """20 steps in 1 s measured and 1.2 s predicted; 1 MB in 5 s."""
    (node,) = node_figures(NOW, BEFORE, {"n": None})

    assert node.is_usable
    assert node.sequences == 3
    assert (node.urgent, node.normal) == (4, 9)
    assert node.kv_blocks["device used"] == 7
    assert node.recent_step_ms == pytest.approx(50.0)
    assert node.recent_predicted_step_ms == pytest.approx(60.0)
    assert node.recent_offload_bytes_per_s == pytest.approx(2e5)


def test_of_a_node_that_does_not_answer_only_what_the_router_knows_is_told() -> None:
    silent = Observation(NOW.at_unix_s, NOW.router, {"n": None})

    (node,) = node_figures(silent, BEFORE, {"n": "does not answer"})

    assert node == NodeFigures("n", is_usable=False, obstacle="does not answer", sequences=3)


def test_a_node_that_was_started_anew_has_no_negative_rates() -> None:
    (node,) = node_figures(BEFORE, NOW, {"n": None})

    assert node.recent_offload_bytes_per_s in (None, 0.0)
    assert node.recent_step_ms is None or not math.copysign(1, node.recent_step_ms) < 0
