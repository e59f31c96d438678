"""YAML files read into pydantic models, with errors that say where and what to write instead.

A ConfigError has one line per problem, in the form of compilers, so that editors can jump there:

    configs/nodes/local.yaml:4: server.prot: unknown key 'prot'; did you mean 'port'?
    configs/nodes/local.yaml:9: engine.max_num_seqs: must be greater than 0, got -1
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from orchestrator.core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the file."""

MAX_SHOWN_CHARACTERS = 80
"""Of an offending value; enough to recognise it, little enough for one line."""


def load_yaml_model(path: Path, model: type[M]) -> M:
    """Return the file at `path` as `model`.

    Raises:
        ConfigError: the file cannot be read, is not one YAML mapping without duplicate keys,
            or does not fit the model. Names every problem of the first of these kinds.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_yaml_model(content, model, path=path)


def parse_yaml_model(
    content: bytes, model: type[M], *, path: Path, context: object | None = None
) -> M:
    """Return `content`, read from `path`, as `model`; validators of the model see `context`.

    Raises:
        ConfigError: as `load_yaml_model`.
    """
    try:
        root, data = _parse(content, path)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(path, error)) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        reason = " ".join(str(error).split())  # yaml breaks its lines
        raise ConfigError(f"{path}: invalid YAML: {reason}") from error
    except RecursionError:
        raise ConfigError(f"{path}: invalid YAML: it is nested too deeply") from None
    return _validated(data, model, source=str(path), root=root, context=context)


def validate_model(data: object, model: type[M], *, source: str) -> M:
    """Return `data` as `model`; errors name `source` where a file would be named.

    Raises:
        ConfigError: `data` does not fit the model. Names every problem.
    """
    return _validated(data, model, source=source, root=None, context=None)


def _parse(content: bytes, path: Path) -> tuple[yaml.MappingNode, object]:
    loader = yaml.SafeLoader(content)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{path}: the file is empty")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{_line(root)}: the top level must be `key: value` lines")
        duplicates = [f"{path}:{line}: {text}" for line, text in _duplicate_keys(root, set())]
        if duplicates:
            raise ConfigError("\n".join(duplicates))
        return root, loader.construct_document(root)
    finally:
        loader.dispose()


def _validated(
    data: object, model: type[M], *, source: str, root: yaml.Node | None, context: object | None
) -> M:
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        problems: dict[str, int] = {}  # text -> line; the members of a union repeat some texts
        for detail in error.errors(include_url=False):
            path = _path_in_data(detail["loc"], data)
            line = None if root is None else _line_of(path, root)
            where = source if line is None else f"{source}:{line}"
            key = f" {_dotted(path)}:" if path else ""
            problems[f"{where}:{key} {_problem(detail, model)}"] = line or 0
        raise ConfigError("\n".join(sorted(problems, key=problems.__getitem__))) from error


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value, location = detail["type"], detail["input"], detail["loc"]
    match kind:
        case "missing":
            return "this key is required"
        case "extra_forbidden" | "unexpected_keyword_argument":  # of a model, of a dataclass
            return _unknown_key(str(location[-1]), _known_keys(location[:-1], model))
        case "value_error" | "assertion_error":
            return detail["msg"].split(", ", 1)[1]  # after pydantic's own "Value error, "
    allowed = re.sub(r"^(?!Keys)\w+ should", "must", detail["msg"])
    return f"{allowed}, got {_shown(value)}"


def _unknown_key(key: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    if nearest:
        return f"unknown key {key!r}; did you mean {nearest[0]!r}?"
    return f"unknown key {key!r}; known here: {', '.join(known) or 'none'}"


def _known_keys(location: KeyPath, model: type[BaseModel]) -> list[str]:
    """Return the keys that models accept at `location`, a pydantic error's, in their order."""
    models: list[type] = [model]
    for part in location:
        annotations = [
            field.annotation
            for candidate in models
            for name, field in _fields(candidate).items()
            if part in (name, field.alias)
        ]
        if annotations:
            models = [found for annotation in annotations for found in _models_in(annotation)]
        else:  # an index or a key of a dict, or the member of a union that pydantic chose
            models = [m for m in models if _is_union_member(part, m)] or models
    names = (field.alias or name for m in models for name, field in _fields(m).items())
    return list(dict.fromkeys(names))


def _fields(model: Any) -> Mapping[str, FieldInfo]:
    """Return the fields of a pydantic model or pydantic dataclass."""
    fields: Mapping[str, FieldInfo] = model.__pydantic_fields__
    return fields


def _is_union_member(part: str | int, model: type) -> bool:
    """Return whether pydantic means `model` by `part`: its class name or its discriminator."""
    return part == model.__name__ or any(
        part in get_args(field.annotation) for field in _fields(model).values()
    )


def _models_in(annotation: object) -> Iterator[type]:
    if isinstance(annotation, type) and hasattr(annotation, "__pydantic_fields__"):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _path_in_data(location: KeyPath, data: object) -> KeyPath:
    """Return `location` without what is not in the file, such as the names of union members.

    The last part stays where it is absent: it is a required key.
    """
    path: list[str | int] = []
    for position, part in enumerate(location):
        if isinstance(data, Mapping) and (part in data or position == len(location) - 1):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _dotted(path: KeyPath) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _line_of(path: KeyPath, root: yaml.Node) -> int | None:
    """Return the line of the deepest part of `path` that the file has; None if it has none."""
    node, line = root, None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            # The last one counts: keys merged by `<<` come first.
            entries = {key.value: (key, value) for key, value in node.value}
            if str(part) not in entries:
                break
            key_node, node = entries[str(part)]
            line = _line(key_node)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = _line(node)
        else:
            break
    return line


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1


def _duplicate_keys(node: yaml.Node, seen: set[int]) -> Iterator[tuple[int, str]]:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _duplicate_keys(child, seen)
    elif isinstance(node, yaml.MappingNode):
        first_lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = (key.tag, key.value)
                if name in first_lines:
                    yield (
                        _line(key),
                        f"key {key.value!r} is already set in line {first_lines[name]}",
                    )
                first_lines.setdefault(name, _line(key))
            yield from _duplicate_keys(value, seen)


def _syntax_problem(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    reason = " ".join(text for text in (error.context, error.problem) if text)
    return f"{where}: invalid YAML: {reason}"


def _shown(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list():
            return "a list"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."
