"""Routing policies in simulated clusters: every policy, unlike nodes, prefill pools, prefixes."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from orchestrator.core.errors import ConfigError
from orchestrator.core.gain import GainTable, Outcome
from orchestrator.core.slo import Slo
from orchestrator.simulation.cluster import Replay
from orchestrator.simulation.config import SimulationConfig
from orchestrator.simulation.scenario import load_part, make_seeded_workload, replay_workload
from orchestrator.simulation.workload import Workload
from router.routing_config import PolicyName
from tests.orchestrator.simulation.test_experiment import make_config

TRACE = "benchmarks/traces/lmsys_arena_vtc.csv.gz"


def make_trace_config(**changes: object) -> dict[str, object]:
    return {"file": TRACE, "num_requests": 60, "max_output_tokens": 20, **changes}


def make_routing_config(
    routing: dict[str, Any], *, kv_cache: dict[str, Any] | None = None, **changes: Any
) -> SimulationConfig:
    policy = {"scheduler": "slide-batching", "routing": routing, "kv_cache": kv_cache or {}}
    return make_config(
        **{
            "policies": {"subject": policy},
            "traces": [make_trace_config()],
            "metrics": {"has_upper_bound": False},
            "num_nodes": None if "nodes" in changes else 3,
            **changes,
        }
    )


def workload_of(config: SimulationConfig, *, requests_per_s: float) -> Workload:
    (trace,) = config.traces
    return make_seeded_workload(
        config, trace, slo=Slo(1.0, 0.03), requests_per_s=requests_per_s, seed=0
    )


def replayed(config: SimulationConfig, *, requests_per_s: float = 30.0) -> Replay:
    return replay_workload(
        config,
        config.policies["subject"],
        workload_of(config, requests_per_s=requests_per_s),
        engines=config.engines(),
        seed=0,
    )


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_every_policy_serves_every_request_and_the_same_way_again(name: PolicyName) -> None:
    first, again = (replayed(make_routing_config({"policy": name})) for _ in range(2))

    assert first == again
    assert {record.outcome for record in first.records} == {Outcome.FINISHED}
    num_predicted = sum(first.predictions.values())
    assert num_predicted == (60 if name == "gorouting" else 0)


def test_nodes_may_differ_in_speed_and_memory() -> None:
    config = make_routing_config(
        {"policy": "round-robin"},
        nodes=[{"count": 1}, {"count": 2, "slowdown": 4, "num_device_blocks": 100}],
    )

    engines = config.engines()

    assert [engine.profile.decode_step_s for engine in engines] == [0.005, 0.020, 0.020]
    assert [engine.num_device_blocks for engine in engines] == [4000, 100, 100]
    assert config.relative_speed == 1.5


def test_a_router_that_knows_the_speeds_serves_unlike_nodes_better() -> None:
    """Round robin gives the slow nodes, a tenth as fast, two thirds of the requests."""

    def attained(policy: PolicyName) -> float:
        config = make_routing_config(
            {"policy": policy}, nodes=[{"count": 1}, {"count": 2, "slowdown": 10}]
        )
        outcome = replayed(config, requests_per_s=10.0)
        return GainTable(outcome.records).report().tdg_ratio

    assert attained("gorouting") > attained("round-robin") + 0.2


def test_in_a_prefill_pool_a_request_ends_with_its_first_token() -> None:
    config = make_routing_config(
        {"policy": "gorouting"}, traces=[make_trace_config(max_output_tokens=1)]
    )

    outcome = replayed(config)

    assert {len(record.token_times_s) for record in outcome.records} == {1}


def test_prompts_that_share_a_beginning_are_alike_up_to_its_end() -> None:
    config = make_routing_config(
        {"policy": "round-robin"},
        traces=[make_trace_config(shared_prefix={"num_prefixes": 2, "num_tokens": 30})],
    )
    workload = workload_of(config, requests_per_s=10.0)
    plain, _ = load_part(config, config.traces[0], seed=0)

    prompts = [workload.request(index).spec.prompt_token_ids for index in range(len(workload))]

    assert [len(prompt) for prompt in prompts] == plain.num_input_tokens.tolist()
    assert len({prompt[:30] for prompt in prompts if len(prompt) > 30}) == 2
    assert len({prompt[:31] for prompt in prompts if len(prompt) > 30}) == sum(
        len(prompt) > 30 for prompt in prompts
    )


@pytest.mark.parametrize(
    "routing",
    [
        {"policy": "prefix-aware", "prefix_index": {"chunk_tokens": 64}},
        {
            "policy": "gorouting",
            "gorouting": {"prefix_reuse": True, "ranks_with_request": True},
            "prefix_index": {"chunk_tokens": 64},
        },
    ],
)
def test_routing_by_beginnings_saves_the_nodes_work(routing: dict[str, Any]) -> None:
    """With 8 beginnings of 512 tokens and 3 nodes, round robin computes most on each of them."""

    def num_computed(routing: dict[str, Any]) -> int:
        config = make_routing_config(
            routing,
            kv_cache={"prefix_caching": True},
            traces=[
                make_trace_config(
                    file="benchmarks/traces/azure2023_conv.csv.gz",
                    shared_prefix={"num_prefixes": 8, "num_tokens": 512},
                )
            ],
        )
        return replayed(config, requests_per_s=2.0).num_computed_tokens

    assert num_computed(routing) < 0.95 * num_computed({"policy": "round-robin"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": [{"count": 1}], "num_nodes": 1}, "num_nodes is for nodes that are all alike"),
        (
            {"nodes": [{"count": 1}], "metrics": {"has_upper_bound": True}},
            "metrics.has_upper_bound is for nodes that are all alike",
        ),
        (
            {"nodes": [{"count": 1}], "plan": {"requests_per_s": 1, "target": 1}},
            "plan is for nodes that are all alike",
        ),
        ({"nodes": []}, "at least 1"),
        ({"nodes": [{"count": 1, "slowdown": 0}]}, "slowdown"),
        ({"router": {"policy": "best"}}, "router.policy"),
        (
            {"router": {"policy": "static-partition", "static_partition": {"gold": 1}}},
            "one for each of the classes high, low",
        ),
    ],
)
def test_a_mistake_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_routing_config({"policy": "gorouting"}, **changes)


def test_prefix_caching_needs_prompts_with_a_content() -> None:
    with pytest.raises(ConfigError, match="subject has prefix_caching, but not every trace"):
        make_routing_config({"policy": "prefix-aware"}, kv_cache={"prefix_caching": True})
