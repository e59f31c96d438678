"""A deployment file: what its groups become, and which mistakes are found between its parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.command_line.serve import visible_gpus
from orchestrator.core.errors import ConfigError
from orchestrator.yaml_config import load_yaml_model

GROUP = """\
node_groups:
  - name: chat
    num_nodes: 2
    first_port: 8101
    engine: {directory: engine, device_kv_bytes: 64MiB}
    scheduler: edf
"""
CUDA_GROUP = """\
node_groups:
  - name: big
    num_nodes: 2
    first_port: 8101
    num_gpus: 2
    engine: {kind: trtllm, directory: engine, host_kv_bytes: 8GiB}
  - name: small
    first_port: 8201
    engine: {kind: trtllm, directory: engine}
"""
NODE = "{endpoint_id: %s, port: %d, engine: {directory: x, device_kv_bytes: 64MiB}}"


def load(directory: Path, text: str) -> DeploymentConfig:
    path = directory / "deployment.yaml"
    path.write_text(text)
    return load_yaml_model(path, DeploymentConfig)


def problems_of(directory: Path, text: str) -> list[str]:
    """Return the problems, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        load(directory, text)
    return [line.partition("deployment.yaml:")[2] for line in str(caught.value).splitlines()]


def test_a_group_becomes_nodes_with_numbers_and_ports_that_count_up(tmp_path: Path) -> None:
    nodes = [placed.config for placed in load(tmp_path, GROUP).placed_nodes()]

    assert [(n.endpoint_id, n.port, n.scheduler) for n in nodes] == [
        ("chat-0", 8101, "edf"),
        ("chat-1", 8102, "edf"),
    ]


def test_each_node_of_groups_gets_gpus_of_its_own(tmp_path: Path) -> None:
    placed = load(tmp_path, CUDA_GROUP).placed_nodes()

    assert [(p.config.endpoint_id, p.gpus) for p in placed] == [
        ("big-0", (0, 1)),
        ("big-1", (2, 3)),
        ("small-0", (4,)),
    ]


def test_nodes_that_are_described_one_by_one_see_all_gpus(tmp_path: Path) -> None:
    [placed] = load(tmp_path, f"nodes: [{NODE % ('a', 8101)}]").placed_nodes()

    assert placed.gpus is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, "2,3"), ("4,5,6,7", "6,7"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-c,GPU-d"), ("0,1", None)],
)
def test_gpus_are_counted_among_those_that_are_visible(
    visible: str | None, expected: str | None
) -> None:
    assert visible_gpus((2, 3), visible) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            GROUP + f"nodes: [{NODE % ('a', 8102)}]",
            "4:5: node_groups[0].first_port: address 127.0.0.1:8102 is given to more than one "
            "service: node a and node chat-1; choose another port",
        ),
        (
            GROUP + "router: {port: 8101, host: 0.0.0.0}",
            "4:5: node_groups[0].first_port: address 127.0.0.1:8101 is given to more than one "
            "service: the router and node chat-0; choose another port",
        ),
        (
            GROUP + f"nodes: [{NODE % ('chat-1', 9000)}]",
            "2:5: node_groups[0].name: its node chat-1 has the endpoint_id of another one; rename "
            "one of them",
        ),
        (
            CUDA_GROUP.replace("small", "big"),
            "7:5: node_groups[1].name: there is another group 'big'",
        ),
        (
            GROUP.replace("8101", "65535"),
            "4:5: node_groups[0].first_port: the last of 2 nodes would have port 65,536, the "
            "highest is 65,535; lower first_port or num_nodes",
        ),
        (
            GROUP + "    num_gpus: 1",
            "7:5: node_groups[0].num_gpus: num_gpus is 1, but the engine's device is cpu; leave "
            "it out, or change the device",
        ),
        (
            CUDA_GROUP.replace("num_gpus: 2", "num_gpus: 0"),
            "5:5: node_groups[0].num_gpus: num_gpus is 0, but the engine's device is cuda; give "
            "each node one, or change the device",
        ),
        (
            CUDA_GROUP.replace("num_gpus: 2", "num_gpus: 2\n    memory_bytes: 16GiB"),
            "6:5: node_groups[0].memory_bytes: memory_bytes is 17,179,869,184, but KV blocks alone "
            "take 17,179,869,184 (host_kv_bytes for each GPU, device_kv_bytes on a CPU); give "
            "more, or keep less",
        ),
        (
            GROUP + "    kubernetes: {autoscaling: {max_nodes: 1}}",
            "7:32: node_groups[0].kubernetes.autoscaling.max_nodes: max_nodes is 1, but num_nodes "
            "is already 2; raise it, or lower num_nodes",
        ),
        (
            GROUP.replace("name: chat", "name: Chat"),
            "2:5: node_groups[0].name: must match pattern '^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$', "
            "got 'Chat'",
        ),
        (
            GROUP + "kubernetes: {engine_volume: {claim: a, image: b}}",
            "7:14: kubernetes.engine_volume: set either claim or image, which say what the volume "
            "is",
        ),
        (
            GROUP + "kubernetes: {router: {tolerations: [{key: a, operator: Equal}]}}",
            "7:37: kubernetes.router.tolerations[0]: operator is Equal and value is not set; Equal "
            "needs a value, Exists takes none",
        ),
        (
            "router: {}",
            "1:1: there is no node; list some under nodes, or a group under node_groups",
        ),
    ],
)
def test_a_mistake_between_keys_is_located(tmp_path: Path, text: str, problem: str) -> None:
    assert problems_of(tmp_path, text) == [problem]


def test_a_mistake_inside_a_section_does_not_hide_one_between_sections(tmp_path: Path) -> None:
    text = (
        f"router: {{port: 8101, prot: 1, num_replicas: 0}}\nnodes:\n"
        f"  - {NODE % ('a', 8101)}\n  - {NODE % ('a', 70000)}\n"
    )

    assert [problem.split(" ")[0] for problem in problems_of(tmp_path, text)] == [
        "1:22:",
        "1:31:",
        "3:22:",
        "4:6:",
        "4:22:",
    ]


def test_routers_that_look_into_etcd_need_nodes_that_are_there(tmp_path: Path) -> None:
    registry = "registry: {endpoints: ['http://127.0.0.1:2379']}"

    [problem] = problems_of(tmp_path, f"{GROUP}router:\n  {registry}\n")
    assert "it has no registry, though router.registry says" in problem
    config = load(tmp_path, f"{GROUP}    {registry}\nrouter:\n  {registry}\n")
    assert [placed.config.registry is not None for placed in config.placed_nodes()] == [True] * 2
