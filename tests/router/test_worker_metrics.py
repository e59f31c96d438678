"""Metrics of several workers as one."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from router.metrics import RouterMetrics
from router.worker_metrics import LARGEST, SMALLEST, lasting, merged

SUMMED_GAUGES = {
    "proserve_router_requests_in_progress",
    "proserve_router_kept_answer_bytes",
    "proserve_router_endpoint_sequences",
}
"""What each worker has of its own. A new gauge belongs here, or in LARGEST or SMALLEST."""


def rendered(*, num_waiting: int, is_usable: bool, requests: dict[str, int]) -> str:
    """Return what a worker says that has served so many requests on each route."""
    metrics = RouterMetrics()
    for route, number in requests.items():
        metrics.requests(route, "high", "200").inc(number)
    metrics.of_class("high").ttft.observe(0.2)
    metrics.of_class("high").in_progress.inc(3)
    obstacles = {"node-0": None if is_usable else "ill"}
    return metrics.render(obstacles, num_waiting=num_waiting).decode()


def samples(text: str) -> dict[str, float]:
    """Return the samples by name and values of labels, as a scraper reads them."""
    return {
        f"{sample.name} {' '.join(sample.labels.values())}".strip(): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_is_counted_is_added_and_what_is_common_is_not() -> None:
    """Both workers say how many wait in the one room; a node is usable if both can use it."""
    first = rendered(num_waiting=5, is_usable=True, requests={"/a b": 2, "/c": 1})
    second = rendered(num_waiting=5, is_usable=False, requests={"/a b": 4, '/"d"\n': 7})

    found = samples(merged([first, second]))

    assert found["proserve_router_requests_total high /a b 200"] == 6
    assert found["proserve_router_requests_total high /c 200"] == 1
    assert found['proserve_router_requests_total high /"d"\n 200'] == 7
    assert found["proserve_router_time_to_first_token_seconds_count high"] == 2
    assert found["proserve_router_time_to_first_token_seconds_bucket 0.25 high"] == 2
    assert found["proserve_router_time_to_first_token_seconds_bucket 0.1 high"] == 0
    assert found["proserve_router_requests_in_progress high"] == 6
    assert found["proserve_router_waiting_sequences"] == 5
    assert found["proserve_router_endpoint_usable node-0"] == 0


def test_of_one_worker_everything_stays_as_it_is() -> None:
    text = rendered(num_waiting=5, is_usable=True, requests={"/a": 2})

    assert samples(merged([text])) == samples(text)


def test_of_a_worker_that_has_ended_only_counts_last() -> None:
    text = rendered(num_waiting=5, is_usable=True, requests={"/a": 2})

    found = samples(lasting(text))

    assert found["proserve_router_requests_total high /a 200"] == 2
    assert found["proserve_router_time_to_first_token_seconds_sum high"] == 0.2
    assert not any(name.startswith("proserve_router_waiting") for name in found)
    assert not any(name.startswith("proserve_router_endpoint_usable") for name in found)


def test_for_every_gauge_it_is_decided_whether_it_is_added() -> None:
    text = rendered(num_waiting=5, is_usable=True, requests={"/a": 2})
    gauges = {
        line.split(" ")[2]
        for line in text.splitlines()
        if line.startswith("# TYPE") and line.endswith(" gauge")
    }

    assert {name for name in gauges if not name.endswith("_created")} == SUMMED_GAUGES | {
        name for name in LARGEST | SMALLEST if not name.endswith("_total")
    }
