from __future__ import annotations

import pytest

from orchestrator.core.errors import ConfigError
from orchestrator.yaml_config import validate_model
from router.baselines import HighestLoadFeasiblePolicy
from router.gorouting import GainEstimate, IdleRule
from router.routing_config import RoutingConfig

CLASS_WEIGHTS = {"high": 2.0, "low": 1.0}


def load(**data: object) -> RoutingConfig:
    return validate_model(data, RoutingConfig, source="test")


def test_the_parameters_of_gorouting_have_the_papers_defaults() -> None:
    options = load(policy="gorouting").estimates

    assert (options.kappa, options.theta_c, options.theta_lo, options.theta_hi) == (
        0.9,
        0.9,
        0.1,
        0.8,
    )
    assert options.idle_rule is IdleRule.IDLE_FIRST
    assert options.estimate is GainEstimate.WHOLE_QUEUE


def test_other_policies_estimate_by_the_same_section() -> None:
    config = load(policy="highest-load-feasible", gorouting={"kappa": 0.5, "steps_per_prompt": 0})

    assert isinstance(config.make_policy(CLASS_WEIGHTS), HighestLoadFeasiblePolicy)
    assert config.estimates.steps_per_prompt == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"policy": "best"}, "policy"),
        ({"policy": "gorouting", "gorouting": {"theta": 1}}, "theta"),
        ({"policy": "gorouting", "gorouting": {"theta_c": 1}}, "theta_c is 1.0, it must be"),
        ({"policy": "gorouting", "gorouting": {"idle_rule": "idle"}}, "idle-first"),
        ({"policy": "least-load", "gorouting": {}}, "policy least-load does not read it"),
        ({"policy": "gorouting", "llumnix": {}}, "llumnix is set, but policy gorouting"),
        ({"policy": "llumnix", "llumnix": {"headroom_fraction": 2}}, "headroom_fraction is 2"),
        ({"policy": "prefix-aware", "prefix_aware": {"max_spread": -1}}, "max_spread is -1"),
        ({"policy": "prefix-aware", "prefix_index": {"chunk_tokens": 0}}, "chunk_tokens is 0"),
        ({"policy": "static-partition", "static_partition": {"high": 0}}, "greater than 0"),
        ({"policy": "random", "routing_seed": -1}, "routing_seed"),
    ],
)
def test_a_mistake_is_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**data)


def test_a_partition_names_every_class() -> None:
    config = load(policy="static-partition", static_partition={"high": 1})

    with pytest.raises(ValueError, match="one for each of the classes high, low"):
        config.make_policy(CLASS_WEIGHTS)
