"""A configuration file as it takes effect: every value, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from orchestrator.command_line.config_kinds import CheckedFile
from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.config import NodeSettings
from orchestrator.yaml_config import KeyPath, place_of, read_yaml

Origin = Callable[[KeyPath], str]
"""Where the value at a path of what is shown comes from."""


def effective_yaml(file: CheckedFile) -> str:
    """Return a checked file with its defaults, as YAML whose comments say where each value comes
    from: a line of the file, a group of nodes, or the default.

    Nodes of a deployment's groups are shown one by one, under `nodes`; of their groups, only what
    is not the nodes' own is left.
    """
    root, _ = read_yaml(file.path)
    shown = file.config.model_dump(mode="json", by_alias=True)

    def written(path: KeyPath) -> str:
        place = place_of(path, root)
        return "default" if place is None else f"line {place[0]}"

    origin: Origin = written
    if isinstance(file.config, DeploymentConfig):
        shown, origin = _with_nodes_of_groups(file.config, shown, written)
    return "\n".join(_lines(shown, (), origin)) + "\n"


def _with_nodes_of_groups(
    config: DeploymentConfig, shown: dict[str, Any], written: Origin
) -> tuple[dict[str, Any], Origin]:
    members = [
        (index, group.name, number)
        for index, group in enumerate(config.node_groups)
        for number in range(group.num_nodes)
    ]
    nodes = [placed.config.model_dump(mode="json") for placed in config.placed_nodes()]
    groups = [
        {key: value for key, value in group.items() if key not in NodeSettings.model_fields}
        for group in shown["node_groups"]
    ]

    def origin(path: KeyPath) -> str:
        match path:
            case ("nodes", int(index), *rest) if index >= len(config.nodes):
                group, name, number = members[index - len(config.nodes)]
                if rest == ["endpoint_id"]:
                    return f"{written(('node_groups', group, 'name'))}, node {number} of its group"
                if rest == ["port"]:
                    first = written(("node_groups", group, "first_port"))
                    return f"{first}, first_port + {number}"
                found = written(("node_groups", group, *rest))
                return found if found == "default" else f"{found}, group {name}"
        return written(path)

    return shown | {"nodes": nodes, "node_groups": groups}, origin


def _lines(value: Mapping[str, Any], path: KeyPath, origin: Origin) -> Iterator[str]:
    for key, item in value.items():
        where = (*path, key)
        if isinstance(item, dict) and item:
            yield f"{_scalar(key)}:"
            yield from (f"  {line}" for line in _lines(item, where, origin))
        elif isinstance(item, list) and any(isinstance(entry, dict) for entry in item):
            yield f"{_scalar(key)}:"
            for index, entry in enumerate(item):
                first, *others = _lines(entry, (*where, index), origin)
                yield f"  - {first}"
                yield from (f"    {line}" for line in others)
        else:
            yield f"{_scalar(key)}: {_scalar(item)}  # {origin(where)}"


def _scalar(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()
