"""orchestrator.yaml_config: what it reads, and the text of every error it can raise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from orchestrator.core.errors import ConfigError
from orchestrator.yaml_config import load_yaml_model, problems_error, validate_model

STRICT = ConfigDict(extra="forbid", frozen=True)


class ServerConfig(BaseModel):
    model_config = STRICT

    port: Annotated[int, Field(ge=1, le=65535)]
    host: str = "127.0.0.1"


class TorchConfig(BaseModel):
    model_config = STRICT

    kind: Literal["torch"]
    num_threads: PositiveInt = 1


class SimulatedConfig(BaseModel):
    model_config = STRICT

    kind: Literal["simulated"]
    step_s: float = 0.01


class NodeConfig(BaseModel):
    model_config = STRICT

    server: ServerConfig
    engine: Annotated[TorchConfig | SimulatedConfig, Field(discriminator="kind")] | None = None
    peers: tuple[ServerConfig, ...] = ()
    labels: dict[str, ServerConfig] = {}
    precision: Literal["fp32", "bf16"] = "fp32"
    model_name: str = Field(default="", alias="model")
    ratio: float = 0.5

    @field_validator("ratio")
    @classmethod
    def _ratio_is_a_fraction(cls, ratio: float) -> float:
        if not 0 <= ratio <= 1:
            raise ValueError(f"{ratio} is not a fraction, write 0 to 1")
        return ratio

    @model_validator(mode="after")
    def _precision_suits_the_engine(self) -> NodeConfig:
        if self.precision == "bf16" and isinstance(self.engine, SimulatedConfig):
            raise ValueError("a simulated engine has no precision, leave `precision` out")
        return self


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "node.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problems_of(path: Path) -> list[str]:
    """Return the lines of the error, without the folder that the file is in."""
    with pytest.raises(ConfigError) as caught:
        load_yaml_model(path, NodeConfig)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_a_valid_file_becomes_the_model(tmp_path: Path) -> None:
    path = write(tmp_path, "server: {port: 8000}\nengine:\n  kind: torch\n  num_threads: 2\n")

    config = load_yaml_model(path, NodeConfig)

    assert config == NodeConfig(
        server=ServerConfig(port=8000), engine=TorchConfig(kind="torch", num_threads=2)
    )


def test_anchors_and_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "server: &s\n  port: 1\n  host: a\npeers:\n- <<: *s\n  host: b\n")

    config = load_yaml_model(path, NodeConfig)

    assert config.peers == (ServerConfig(port=1, host="b"),)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        # Unknown keys: the nearest one at that very place, else all of them.
        (
            "server:\n  port: 1\n  prot: 2\n",
            "node.yaml:3:3: server.prot: unknown key 'prot'; did you mean 'port'?",
        ),
        (
            "server:\n  port: 1\n  zzz: 2\n",
            "node.yaml:3:3: server.zzz: unknown key 'zzz'; known here: port, host",
        ),
        (
            "servers: {}\nserver: {port: 1}\n",
            "node.yaml:1:1: servers: unknown key 'servers'; did you mean 'server'?",
        ),
        (
            "server: {port: 1}\nmodle: x\n",
            "node.yaml:2:1: modle: unknown key 'modle'; did you mean 'model'?",
        ),
        (
            "server: {port: 1}\npeers:\n- port: 1\n- port: 2\n  hots: x\n",
            "node.yaml:5:3: peers[1].hots: unknown key 'hots'; did you mean 'host'?",
        ),
        (
            "server: {port: 1}\nlabels:\n  a: {port: 1, hots: x}\n",
            "node.yaml:3:16: labels.a.hots: unknown key 'hots'; did you mean 'host'?",
        ),
        (
            "server: {port: 1}\nengine:\n  kind: simulated\n  num_threads: 2\n",
            "node.yaml:4:3: engine.num_threads: unknown key 'num_threads'; known here: kind, "
            "step_s",
        ),
        # Absent keys: the place of what they are missing from.
        ("\nserver:\n  host: a\n", "node.yaml:2:1: server.port: this key is required"),
        ("precision: fp32\n", "node.yaml:1:1: server: this key is required"),
        # Values: what is allowed, what was written.
        (
            "server:\n  port: 70000\n",
            "node.yaml:2:3: server.port: must be less than or equal to 65535, got 70000",
        ),
        (
            "server: {port: 1}\nprecision: fp64\n",
            "node.yaml:2:1: precision: must be 'fp32' or 'bf16', got 'fp64'",
        ),
        (
            "server: {port: 1, host: }\n",
            "node.yaml:1:19: server.host: must be a valid string, got nothing",
        ),
        (
            "server: {port: 1, host: no}\n",
            "node.yaml:1:19: server.host: must be a valid string, got false",
        ),
        (
            "server: {port: 1, host: [a]}\n",
            "node.yaml:1:19: server.host: must be a valid string, got a list",
        ),
        (
            "server: {port: 1, host: {a: 1}}\n",
            "node.yaml:1:19: server.host: must be a valid string, got a mapping",
        ),
        (
            f"server:\n  port: {'x' * 100}\n",
            "node.yaml:2:3: server.port: must be a valid integer, "
            f"unable to parse string as an integer, got '{'x' * 79}...",
        ),
        (
            "server: {port: 1}\npeers:\n- port: 1\n- port: 0\n",
            "node.yaml:4:3: peers[1].port: must be greater than or equal to 1, got 0",
        ),
        ("server: {port: 1}\n8000: x\n", "node.yaml:2:1: [8000]: Keys should be strings, got 8000"),
        # Validators of our own speak for themselves.
        (
            "server: {port: 1}\nratio: 2\n",
            "node.yaml:2:1: ratio: 2.0 is not a fraction, write 0 to 1",
        ),
        (
            "server: {port: 1}\nprecision: bf16\nengine: {kind: simulated}\n",
            "node.yaml:1:1: a simulated engine has no precision, leave `precision` out",
        ),
    ],
)
def test_a_problem_names_line_key_value_and_what_is_allowed(
    tmp_path: Path, content: str, problem: str
) -> None:
    assert problems_of(write(tmp_path, content)) == [problem]


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "precision: int8\nserver:\n  port: 0\n  hots: a\nratio: 3\n")

    assert [problem.split(": ")[:2] for problem in problems_of(path)] == [
        ["node.yaml:1:1", "precision"],
        ["node.yaml:3:3", "server.port"],
        ["node.yaml:4:3", "server.hots"],
        ["node.yaml:5:1", "ratio"],
    ]


def test_a_misspelt_key_is_one_mistake_also_where_the_right_one_is_required(tmp_path: Path) -> None:
    assert problems_of(write(tmp_path, "server:\n  prot: 1\n")) == [
        "node.yaml:2:3: server.prot: unknown key 'prot'; did you mean 'port'?"
    ]


def test_problems_that_a_validator_finds_stand_where_they_are_beside_pydantics_own() -> None:
    try:
        ServerConfig.model_validate({"hots": "a"})
    except ValidationError as error:
        known = error

    found = problems_error(ServerConfig, [(("host",), "is a {name}, not an address")], known)

    assert [(e["type"], e["loc"]) for e in found.errors()] == [
        ("missing", ("port",)),
        ("extra_forbidden", ("hots",)),
        ("value_error", ("host",)),
    ]
    assert found.errors()[-1]["msg"] == "Value error, is a {name}, not an address"


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        (
            "server:\n  port: 1\n  port: 2\nratio: 1\nratio: 2\nratio: 3\n",
            [
                "node.yaml:3:3: key 'port' is already set in line 2",
                "node.yaml:5:1: key 'ratio' is already set in line 4",
                "node.yaml:6:1: key 'ratio' is already set in line 4",
            ],
        ),
        (
            "server: {port: 1, port: 2}\n",
            ["node.yaml:1:19: key 'port' is already set in line 1"],
        ),
        (
            "peers:\n- port: 1\n  port: 1\n",
            ["node.yaml:3:3: key 'port' is already set in line 2"],
        ),
    ],
)
def test_a_key_written_twice_is_refused(tmp_path: Path, content: str, problems: list[str]) -> None:
    assert problems_of(write(tmp_path, content)) == problems


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "node.yaml: the file is empty"),
        ("# nothing yet\n", "node.yaml: the file is empty"),
        ("\n- a\n- b\n", "node.yaml:2:1: the top level must be `key: value` lines"),
        ("just text\n", "node.yaml:1:1: the top level must be `key: value` lines"),
    ],
)
def test_a_file_without_keys_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    assert problems_of(write(tmp_path, content)) == [problem]


@pytest.mark.parametrize(
    ("content", "beginning"),
    [
        ("server:\n  port: [1\nratio: 1\n", "node.yaml:3:6: invalid YAML: while parsing a flow"),
        ("server:\n\tport: 1\n", "node.yaml:2:1: invalid YAML: while scanning"),
        ("server: &a {port: *b}\n", "node.yaml:1:19: invalid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "node.yaml:2:1: invalid YAML: expected a single document"),
        ("a: !!python/object:os.system {}\n", "node.yaml:1:4: invalid YAML: could not determine"),
        ("? [a]\n: 1\n", "node.yaml:1:3: invalid YAML: while constructing a mapping"),
        ("a: 2026-13-45\n", "node.yaml: invalid YAML: month must be in 1..12"),
        (b"a: \xff\n", "node.yaml: invalid YAML: unacceptable character #x00ff"),
    ],
)
def test_invalid_yaml_is_located_by_line_and_column(
    tmp_path: Path, content: str | bytes, beginning: str
) -> None:
    [problem] = problems_of(write(tmp_path, content))

    assert problem.startswith(beginning)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "node.yaml") == [
        "node.yaml: cannot be read: No such file or directory"
    ]


def test_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()

    assert problems_of(tmp_path / "nodes") == ["nodes: cannot be read: Is a directory"]


def test_data_from_elsewhere_names_its_source() -> None:
    with pytest.raises(ConfigError) as caught:
        validate_model({"port": 0, "hots": "a"}, ServerConfig, source="--server")

    assert str(caught.value).splitlines() == [
        "--server: port: must be greater than or equal to 1, got 0",
        "--server: hots: unknown key 'hots'; did you mean 'host'?",
    ]


def test_valid_data_from_elsewhere_becomes_the_model() -> None:
    assert validate_model({"port": 1}, ServerConfig, source="--server") == ServerConfig(port=1)
