"""docs/deployment.md says what the command line does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.command_line import processes
from orchestrator.command_line.config_kinds import KINDS
from orchestrator.command_line.deployment import DeploymentConfig, RestartConfig
from orchestrator.command_line.kubernetes.routers import LEAVE_S
from orchestrator.command_line.launch.log_files import MAX_LOG_BYTES
from orchestrator.command_line.main import app
from orchestrator.command_line.processes import DRAIN_GRACE_S
from router.etcd_registry import MAX_SILENCE_S

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/deployment.md").read_text()
FILES = re.findall(r"^```yaml\n(.+?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
COMMANDS = sorted(set(re.findall(r"proserve ((?:config |render )?[a-z]+)\b", PAGE)))


def test_the_example_is_a_deployment_with_the_nodes_that_it_promises() -> None:
    config = DeploymentConfig.model_validate(yaml.safe_load(FILES[0]))

    names = [placed.config.endpoint_id for placed in config.placed_nodes()]
    assert names == ["chat-0", "chat-1", "chat-2"]


def test_the_example_with_etcd_is_a_deployment_whose_nodes_can_be_reached() -> None:
    config = DeploymentConfig.model_validate(yaml.safe_load(FILES[3]))

    urls = [placed.config.advertised_url() for placed in config.placed_nodes()]
    assert urls == ["http://10.0.0.11:8101", "http://10.0.0.11:8102"]
    assert config.router.registry is not None
    assert f"`lease_s` ({config.router.registry.lease_s} s)" in PAGE
    assert f"silent for {MAX_SILENCE_S:.0f} s" in PAGE


def test_the_example_for_ray_is_a_deployment() -> None:
    config = DeploymentConfig.model_validate(yaml.safe_load(FILES[4]))

    assert config.node_groups[0].ray.resources == {"engine": 1}
    assert config.ray.router_url == "http://10.0.0.5:8000"


def test_the_autoscaler_is_a_part_of_a_group() -> None:
    content = yaml.safe_load(FILES[0])
    content["node_groups"][0] |= yaml.safe_load(FILES[5])

    scaling = DeploymentConfig.model_validate(content).node_groups[0].kubernetes.autoscaling

    assert scaling is not None
    assert scaling.max_nodes == 6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_is_named_exists(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])

    assert result.exit_code == 0, result.output


def test_numbers_and_kinds_are_those_of_the_code() -> None:
    assert f"A router goes on for {LEAVE_S} s" in PAGE
    assert f"lets open requests end for {DRAIN_GRACE_S:.0f} s" in PAGE
    assert f"that is closed, after {processes.LEAVE_S:.0f} s" in PAGE
    assert f"`restarts.max_drain_s` ({RestartConfig().max_drain_s:.0f} s)" in PAGE
    assert f"up to {MAX_LOG_BYTES // 2**20} MiB" in PAGE
    assert all(f"`{kind}`" in PAGE for kind in KINDS)
    for path in (ROOT / "configs/deployments").glob("*.yaml"):
        assert f"`{path.name}`" in PAGE
