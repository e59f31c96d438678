"""The kinds of configuration files: which model reads each, and how one is told from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from build_scripts.recipe import EngineRecipe
from build_scripts.trtllm.recipe import TrtLlmRecipe
from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.config import NodeConfig
from orchestrator.core.errors import ConfigError
from orchestrator.simulation.config import SimulationConfig
from orchestrator.yaml_config import load_yaml_model, read_yaml
from router.clients import ClientsConfig, parse_clients
from router.config import RouterConfig

KINDS: Mapping[str, tuple[type[BaseModel], ...]] = {
    "deployment": (DeploymentConfig,),
    "node": (NodeConfig,),
    "router": (RouterConfig,),
    "clients": (ClientsConfig,),
    "engine": (EngineRecipe, TrtLlmRecipe),
    "simulation": (SimulationConfig,),
}
"""The models of each kind of file. Engine recipes have two, told apart by the key `kind`."""


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A configuration file without mistakes."""

    path: Path
    kind: str
    config: BaseModel


def check_file(path: Path, kind: str | None = None) -> CheckedFile:
    """Return a configuration file; None as kind finds out by its keys which it is.

    Raises:
        ConfigError: every mistake, with its place. Of a deployment also those of its clients
            file, if that is here.
    """
    _, data = read_yaml(path)
    kind = kind_of(path, data) if kind is None else known_kind(kind)
    model = KINDS[kind][0]
    if kind == "engine" and data.get("kind") == "trtllm":
        model = TrtLlmRecipe
    if kind == "clients":
        return CheckedFile(path, kind, parse_clients(path.read_bytes(), path=path))
    config = load_yaml_model(path, model)
    if isinstance(config, DeploymentConfig):
        _check_clients(config)
    return CheckedFile(path, kind, config)


def known_kind(kind: str) -> str:
    """Return `kind`.

    Raises:
        ConfigError: there is no such kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is no kind of file; there are {', '.join(KINDS)}")
    return kind


def kind_of(path: Path, data: Mapping[Any, Any]) -> str:
    """Return the kind whose models know the most of a file's uppermost keys; of several, the one
    whose required keys are there.

    Raises:
        ConfigError: that leaves more than one, or they know none.
    """
    fits = {kind: max(_fit(model, data) for model in KINDS[kind]) for kind in KINDS}
    most = max(fits.values())
    best = [kind for kind, fit in fits.items() if fit == most or most[0] == 0]
    if len(best) > 1:
        raise ConfigError(
            f"{path}: its keys could be those of {', '.join(best)}; say which with --kind"
        )
    return best[0]


def _fit(model: type[BaseModel], data: Mapping[Any, Any]) -> tuple[int, int]:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    missing = [name for name, field in fields.items() if field.is_required() and name not in data]
    return len(fields.keys() & data.keys()), -len(missing)


def _check_clients(config: DeploymentConfig) -> None:
    path = config.router.clients_file
    if path is not None and path.exists():
        parse_clients(path.read_bytes(), path=path, classes=config.router.classes)
