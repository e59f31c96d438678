"""Writes docs/configuration.md from the configuration models.

python -m orchestrator.command_line.config_reference > docs/configuration.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, ByteSize, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from build_scripts.recipe import EngineRecipe
from build_scripts.trtllm.recipe import TrtLlmRecipe
from orchestrator.command_line.deployment import DeploymentConfig
from orchestrator.config import NodeConfig
from router.clients import ClientsConfig
from router.config import RouterConfig

INTRODUCTION = """\
# Configuration

Generated from the models by `python -m orchestrator.command_line.config_reference`; a test keeps
it equal to them. Unknown keys are refused with file, line, column and the nearest valid key;
`proserve config check FILE...` checks any of these files, see
[deployment](deployment.md#checking-it).

| file | command | model |
|---|---|---|
| `configs/deployments/*.yaml` | `proserve serve FILE` | [DeploymentConfig](#deploymentconfig) |
| one node's YAML | `proserve node FILE` | [NodeConfig](#nodeconfig) |
| one router's YAML | `proserve router FILE` | [RouterConfig](#routerconfig) |
| `configs/clients/*.yaml` | `proserve keys list FILE` | [ClientsConfig](#clientsconfig) |
| `configs/engines/*.yaml` | `proserve build FILE` | [EngineRecipe](#enginerecipe) |
| the same, `kind: trtllm` | `proserve build FILE` | [TrtLlmRecipe](#trtllmrecipe) |

Sizes in bytes may be written with a unit, such as `512MiB`.
"""

ROOTS: tuple[type[BaseModel], ...] = (
    DeploymentConfig,
    NodeConfig,
    RouterConfig,
    ClientsConfig,
    EngineRecipe,
    TrtLlmRecipe,
)


def render() -> str:
    """Return the whole page."""
    return "\n".join([INTRODUCTION, *map(_section, models())])


def _collect(model: type, seen: dict[type, None]) -> None:
    if model in seen:
        return
    seen[model] = None
    for field in fields_of(model).values():
        for nested in models_in(field.annotation):
            _collect(nested, seen)


def _section(model: type) -> str:
    first_line = (model.__doc__ or "").strip().split("\n\n")[0]
    rows = []
    for name, field in fields_of(model).items():
        meaning = _cell(description(model, name))
        rows.append(f"| `{name}` | {_type_name(field)} | {_default(field)} | {meaning} |")
    return (
        f"## {model.__name__}\n\n{' '.join(first_line.split())}\n\n"
        "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def models() -> list[type]:
    """Return every model that a configuration file can hold, each once."""
    seen: dict[type, None] = {}
    for root in ROOTS:
        _collect(root, seen)
    return list(seen)


def fields_of(model: Any) -> dict[str, FieldInfo]:
    """Return the fields of a pydantic model or pydantic dataclass."""
    fields: dict[str, FieldInfo] = model.__pydantic_fields__
    return fields


def description(model: type, name: str) -> str:
    """Return a field's docstring, or "" if it has none.

    Pydantic misses those of a plain dataclass that a model is derived from.
    """
    field = fields_of(model)[name]
    if field.description is not None:
        return field.description
    for base in model.__mro__:
        if dataclasses.is_dataclass(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            for statement, following in itertools.pairwise(tree.body[0].body):  # type: ignore[attr-defined]
                match statement, following:
                    case (
                        ast.AnnAssign(target=ast.Name(id=found)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ) if found == name:
                        return text
    return ""


def models_in(annotation: object) -> Iterator[type]:
    """Yield the models that an annotation mentions."""
    if isinstance(annotation, type) and hasattr(annotation, "__pydantic_fields__"):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def _type_name(field: FieldInfo) -> str:
    return _cell(_annotation_name(field.annotation) + _bounds(field))


def _annotation_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _annotation_name(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_annotation_name(a) for a in arguments if a is not type(None))
    if origin is typing.Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin in (tuple, list):
        return f"list of {_annotation_name(arguments[0])}"
    if origin is dict:
        return f"map to {_annotation_name(arguments[1])}"
    if hasattr(annotation, "__pydantic_fields__"):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " or ".join(f"`{member.value}`" for member in annotation)
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    names |= {Path: "path", ByteSize: "size in bytes", AwareDatetime: "time with zone"}
    names |= {Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f" {sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in signs.items()
        if getattr(item, name, None) is not None
    ]
    return "," + " and".join(bounds) if bounds else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return "none"
    if dataclasses.is_dataclass(value) or isinstance(value, BaseModel):
        return "its defaults"
    text = json.dumps(TypeAdapter(type(value)).dump_python(value, mode="json"))
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        text = ", ".join(str(getattr(item, "name", item)) for item in value)
    return _cell(f"`{text}`")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
