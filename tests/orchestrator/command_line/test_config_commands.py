"""`proserve config`: what it says of files, and the schemas that editors read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from orchestrator.command_line.config_commands import app
from orchestrator.command_line.config_kinds import KINDS, check_file
from orchestrator.command_line.config_schema import schema_of
from orchestrator.command_line.config_show import effective_yaml
from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.core.errors import ConfigError
from orchestrator.yaml_config import load_yaml_model

ROOT = Path(__file__).parents[3]
FOLDERS = {"clients": "clients", "deployments": "deployment", "engines": "engine",
           "nodes": "node", "routers": "router", "simulations": "simulation"}  # fmt: skip
"""Kinds of shipped files by folder."""

SHIPPED = [
    (p, kind) for f, kind in FOLDERS.items() for p in sorted((ROOT / "configs" / f).iterdir())
]

GROUPS = """\
node_groups:
  - name: chat
    num_nodes: 2
    first_port: 8101
    scheduler: edf
    engine: {directory: engine, device_kv_bytes: 64MiB}
nodes:
  - endpoint_id: other
    port: 9000
    engine: {directory: engine, device_kv_bytes: 64MiB}
"""
FIVE_MISTAKES = """\
router: {port: 8101, prot: 1}
nodes:
  - {endpoint_id: a, port: 8101, engine: {directory: x}}
node_groups:
  - name: chat
    first_port: 8102
    scheduler: fastest
    engine: {directory: y, device_kv_bytes: 64MiB, dtyp: float32}
"""


def config(*arguments: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout.splitlines()


def write(directory: Path, text: str) -> Path:
    path = directory / "some.yaml"
    path.write_text(text)
    return path


def test_a_deployment_with_five_mistakes_gets_five_located_messages(tmp_path: Path) -> None:
    path = write(tmp_path, FIVE_MISTAKES)

    status, lines = config("check", path)

    assert status == 1
    assert [line.removeprefix(f"{path}:")[:38] for line in lines] == [
        "1:22: router.prot: unknown key 'prot';",
        "3:22: nodes[0].port: address 127.0.0.1",
        "3:34: nodes[0].engine: device_kv_bytes",
        "7:5: node_groups[0].scheduler: must be",
        "8:52: node_groups[0].engine.dtyp: unkn",
    ]
    with pytest.raises(ConfigError) as caught:  # what `proserve serve` does
        load_yaml_model(path, DeploymentConfig)
    assert str(caught.value).splitlines() == lines


def test_every_file_is_checked_although_one_has_mistakes(tmp_path: Path) -> None:
    good = ROOT / "configs/clients/example.yaml"

    status, lines = config("check", write(tmp_path, "a: 1\n"), good)

    assert status == 1
    assert lines[-1] == f"{good}: ok (clients)"


@pytest.mark.parametrize(("path", "kind"), SHIPPED, ids=lambda value: getattr(value, "name", None))
def test_the_kind_of_a_shipped_file_is_told_by_its_keys(path: Path, kind: str) -> None:
    assert check_file(path).kind == kind


def test_keys_of_no_kind_in_particular_need_to_be_told(tmp_path: Path) -> None:
    path = write(tmp_path, "{}\n")

    with pytest.raises(ConfigError, match="say which with --kind"):
        check_file(path)
    with pytest.raises(ConfigError, match="clients: this key is required"):
        check_file(path, "clients")
    with pytest.raises(ConfigError, match="'client' is no kind of file; there are deployment, no"):
        check_file(path, "client")


def test_a_deployments_clients_file_is_checked_with_its_classes(tmp_path: Path) -> None:
    clients = tmp_path / "clients.yaml"
    clients.write_text("clients: [{name: a, priority_class: vip}]\n")

    path = write(tmp_path, GROUPS + f"router: {{clients_file: {clients}}}\n")

    with pytest.raises(ConfigError, match=r"clients\.yaml:1:21: .*is 'vip', the router's classes"):
        check_file(path)


def test_what_is_shown_says_where_each_value_comes_from(tmp_path: Path) -> None:
    shown = effective_yaml(check_file(write(tmp_path, GROUPS))).splitlines()

    nodes = shown[shown.index("nodes:") : shown.index("node_groups:")]
    assert [line.strip() for line in nodes if "scheduler" in line or "_id" in line] == [
        "scheduler: slide-batching  # default",
        "endpoint_id: other  # line 8",
        "scheduler: edf  # line 5, group chat",
        "endpoint_id: chat-0  # line 2, node 0 of its group",
        "scheduler: edf  # line 5, group chat",
        "endpoint_id: chat-1  # line 2, node 1 of its group",
    ]
    assert "    port: 8102  # line 4, first_port + 1" in shown
    assert "      device_kv_bytes: 67108864  # line 6, group chat" in shown


@pytest.mark.parametrize(
    ("path", "kind"),
    [(path, kind) for path, kind in SHIPPED if "node_groups" not in path.read_text()],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_is_shown_takes_the_same_effect(path: Path, kind: str, tmp_path: Path) -> None:
    checked = check_file(path, kind)

    again = check_file(write(tmp_path, effective_yaml(checked)), checked.kind)

    assert again.config == checked.config


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_schema_is_what_the_models_say(kind: str) -> None:
    schema = schema_of(kind)

    Draft202012Validator.check_schema(json.loads(schema))
    assert (ROOT / f"configs/schemas/{kind}.json").read_text() == schema, (
        f"run: proserve config schema {kind} > configs/schemas/{kind}.json"
    )


@pytest.mark.parametrize("kind", FOLDERS.values())
def test_a_schema_takes_every_shipped_file_of_its_kind_and_no_misspelt_one(kind: str) -> None:
    validator = Draft202012Validator(json.loads(schema_of(kind)))
    for path in [path for path, of_kind in SHIPPED if of_kind == kind]:
        text = path.read_text()
        data = as_json(yaml.safe_load(text))

        assert text.startswith(f"# yaml-language-server: $schema=../schemas/{kind}.json\n")
        assert [error.message for error in validator.iter_errors(data)] == [], path
        assert not validator.is_valid(data | {"misspelt": 1})


def as_json(data: Any) -> Any:
    """Return what a YAML file says as an editor sees it: times are text there."""
    return json.loads(json.dumps(data, default=lambda value: value.isoformat()))
