from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from orchestrator.command_line.config_reference import description, fields_of, models, render
from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.config import NodeConfig
from orchestrator.scheduler_config import SlideBatchingSection
from orchestrator.yaml_config import load_yaml_model
from router.config import RouterConfig

ROOT = Path(__file__).parents[3]


def test_the_page_is_what_the_models_say() -> None:
    page = (ROOT / "docs/configuration.md").read_text()

    assert page == render(), "run: python -m orchestrator.command_line.config_reference > docs/..."


def test_every_field_of_every_model_is_documented() -> None:
    undocumented = [
        f"{model.__name__}.{name}"
        for model in models()
        for name in fields_of(model)
        if not description(model, name)
    ]

    assert SlideBatchingSection in models()
    assert undocumented == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs/deployments").glob("*.yaml")))
def test_shipped_deployments_are_valid(path: Path) -> None:
    config = load_yaml_model(path, DeploymentConfig)

    written = yaml.safe_load(path.read_text())
    in_groups = sum(group["num_nodes"] for group in written.get("node_groups", []))
    assert len(config.placed_nodes()) == len(written.get("nodes", [])) + in_groups


@pytest.mark.parametrize(("folder", "model"), [("routers", RouterConfig), ("nodes", NodeConfig)])
def test_shipped_routers_and_nodes_are_valid(folder: str, model: type[BaseModel]) -> None:
    paths = sorted((ROOT / "configs" / folder).glob("*.yaml"))

    assert paths
    assert [type(load_yaml_model(path, model)) for path in paths] == [model] * len(paths)
