from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ByteSize, ValidationError

from router.config import EndpointConfig, IdempotencyConfig, RouterConfig, ServiceClassConfig

VALID: dict[str, Any] = {
    "engine_dir": "engine",
    "model": "tiny",
    "nodes": [{"endpoint_id": "n0", "url": "http://127.0.0.1:9000/"}],
}


def test_the_shipped_classes_go_from_the_most_to_the_least_valuable() -> None:
    config = RouterConfig.model_validate(VALID)

    classes = [c.to_priority_class() for c in config.classes]

    assert [c.name for c in classes] == ["high", "normal", "low"]
    assert [c.weight for c in classes] == [4.0, 2.0, 1.0]
    assert classes[0].slo.ttft_s == 1.0
    assert classes[0].slo.tpot_s == 0.05
    assert config.default_class == "normal"


def test_a_class_without_objectives_promises_nothing() -> None:
    slo = ServiceClassConfig(name="batch", weight=0.1).to_priority_class().slo

    assert slo.ttft_s == math.inf
    assert slo.tpot_s == math.inf


def test_a_node_address_loses_its_last_slash() -> None:
    assert RouterConfig.model_validate(VALID).nodes[0].url == "http://127.0.0.1:9000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"nodes": []}, "nodes is empty and nothing says where", id="no nodes"),
        pytest.param(
            {"registry": {"endpoints": ["http://127.0.0.1:2379"]}},
            "registry knows all nodes there are",
            id="nodes and registry",
        ),
        pytest.param(
            {
                "nodes": [],
                "registry": {"endpoints": ["http://127.0.0.1:2379"]},
                "registration": {"secret_file": "secret"},
            },
            "registration and registry are both set",
            id="registration and registry",
        ),
        pytest.param({"nodes": VALID["nodes"] * 2}, "nodes: each may be listed once", id="twice"),
        pytest.param({"default_class": "vip"}, "must be one of the classes", id="default class"),
        pytest.param({"max_snapshot_age_s": 0.1}, "must exceed", id="age below poll interval"),
        pytest.param({"policy": "best"}, "least-load", id="policy"),
        pytest.param({"port": 70000}, "65535", id="port"),
        pytest.param({"num_workers": 0}, "greater than or equal to 1", id="no worker"),
        pytest.param(
            {"num_workers": 2, "registration": {"secret_file": "secret"}},
            "a node registers with one worker",
            id="workers that would not know of each other's nodes",
        ),
        pytest.param({"prot": 80}, "prot", id="unknown key"),
        pytest.param(
            {"classes": [{"name": "normal", "weight": math.inf}]}, "finite", id="infinite weight"
        ),
        pytest.param(
            {"classes": [{"name": "normal", "weight": 1, "ttft_ms": 0}]},
            "greater than or equal to 0.001",
            id="objective",
        ),
        pytest.param(
            {"classes": [{"name": "normal", "weight": 1, "tpot_ms": 1e-323}]},
            "greater than or equal to 0.001",
            id="objective that is 0 in seconds",
        ),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RouterConfig.model_validate({**VALID, **changes})


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9000", "ftp://host", "http://", "http://host/v1", "http://u:p@host:1"]
)
def test_an_address_must_be_scheme_host_and_port(url: str) -> None:
    with pytest.raises(ValidationError, match="http://HOST:PORT"):
        EndpointConfig(endpoint_id="n0", url=url)


def test_every_field_is_explained() -> None:
    for model in (RouterConfig, EndpointConfig, ServiceClassConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_a_router_may_have_only_nodes_that_register() -> None:
    settings = VALID | {"nodes": [], "registration": {"secret_file": "secret"}}

    assert RouterConfig.model_validate(settings).nodes == ()


def test_each_of_several_workers_keeps_its_part_of_the_answers() -> None:
    config = IdempotencyConfig(max_answers=1000, max_bytes=ByteSize(4000), keep_s=5.0)

    assert config.part_of(4) == IdempotencyConfig(
        max_answers=250, max_bytes=ByteSize(1000), keep_s=5.0
    )
    assert config.part_of(1) == config
