"""YAML files read into pydantic models, with errors that say where and what to write instead.

A ConfigError has one line per problem, in the form of compilers, so that editors can jump there:

    configs/nodes/local.yaml:4:3: server.prot: unknown key 'prot'; did you mean 'port'?
    configs/nodes/local.yaml:9:3: engine.max_num_seqs: must be greater than 0, got -1
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from orchestrator.core.errors import ConfigError

M = TypeVar("M", bound=BaseModel)

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the file."""

Problem = tuple[KeyPath, str]
"""Where in the file, and what is wrong there."""

Place = tuple[int, int]
"""Line and column, from 1."""

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's types of that error: of a model, of a dataclass."""

MAX_SHOWN_CHARACTERS = 80
"""Of an offending value; enough to recognise it, little enough for one line."""


def load_yaml_model(path: Path, model: type[M]) -> M:
    """Return the file at `path` as `model`.

    Raises:
        ConfigError: the file cannot be read, is not one YAML mapping without duplicate keys,
            or does not fit the model. Names every problem of the first of these kinds.
    """
    return parse_yaml_model(_content(path), model, path=path)


def parse_yaml_model(
    content: bytes, model: type[M], *, path: Path, context: object | None = None
) -> M:
    """Return `content`, read from `path`, as `model`; validators of the model see `context`.

    Raises:
        ConfigError: as `load_yaml_model`.
    """
    root, data = _read(content, path)
    return _validated(data, model, source=str(path), root=root, context=context)


def validate_model(data: object, model: type[M], *, source: str) -> M:
    """Return `data` as `model`; errors name `source` where a file would be named.

    Raises:
        ConfigError: `data` does not fit the model. Names every problem.
    """
    return _validated(data, model, source=source, root=None, context=None)


def problems_error(
    model: type, problems: Iterable[Problem], besides: ValidationError | None = None
) -> ValidationError:
    """Return what a validator of `model` raises to report several problems at once, on top of
    those in `besides`.

    Locations begin at the model; only the text of a problem is shown, not its value.
    """
    known = [] if besides is None else besides.errors(include_url=False)
    errors = [
        InitErrorDetails(
            type=PydanticCustomError(detail["type"], detail["msg"]),
            loc=detail["loc"],
            input=detail["input"],
        )
        for detail in known
    ]
    errors += [
        InitErrorDetails(type="value_error", loc=loc, input=None, ctx={"error": ValueError(text)})
        for loc, text in problems
    ]
    return ValidationError.from_exception_data(model.__name__, errors)


def read_yaml(path: Path) -> tuple[yaml.MappingNode, dict[Any, Any]]:
    """Return the file at `path`, as nodes that know their places and as plain data.

    Raises:
        ConfigError: as `load_yaml_model`, but for what depends on a model.
    """
    return _read(_content(path), path)


def place_of(path: KeyPath, root: yaml.Node) -> Place | None:
    """Return where the file sets what is at `path`; None if it does not."""
    node: yaml.Node = root
    place = None
    for part in path:
        found = _child(node, part)
        if found is None:
            return None
        place, node = found
    return place


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _read(content: bytes, path: Path) -> tuple[yaml.MappingNode, dict[Any, Any]]:
    try:
        return _parse(content, path)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(path, error)) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        reason = " ".join(str(error).split())  # yaml breaks its lines
        raise ConfigError(f"{path}: invalid YAML: {reason}") from error
    except RecursionError:
        raise ConfigError(f"{path}: invalid YAML: it is nested too deeply") from None


def _parse(content: bytes, path: Path) -> tuple[yaml.MappingNode, dict[Any, Any]]:
    loader = yaml.SafeLoader(content)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{path}: the file is empty")
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"{_at(path, _place(root))}: the top level must be `key: value` lines"
            )
        duplicates = [f"{_at(path, place)}: {text}" for place, text in _duplicate_keys(root, set())]
        if duplicates:
            raise ConfigError("\n".join(duplicates))
        data: dict[Any, Any] = loader.construct_document(root)
        return root, data
    finally:
        loader.dispose()


def _validated(
    data: object, model: type[M], *, source: str, root: yaml.Node | None, context: object | None
) -> M:
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        details = error.errors(include_url=False)
        meant = _meant_keys(details, model)
        problems: dict[str, Place] = {}  # text -> place; members of a union repeat some texts
        for detail in details:
            if detail["type"] == "missing" and detail["loc"] in meant:
                continue  # it is there under another name, which is reported
            path = _path_in_data(detail["loc"], data, keeps_last=detail["type"] == "missing")
            place = None if root is None else _nearest_place(path, root)
            key = f" {_dotted(path)}:" if path else ""
            text = f"{_at(source, place)}:{key} {_problem(detail, model)}"
            problems[text] = place or (0, 0)
        raise ConfigError("\n".join(sorted(problems, key=problems.__getitem__))) from error


def _meant_keys(details: Sequence[ErrorDetails], model: type[BaseModel]) -> set[KeyPath]:
    """Return the locations of the keys that unknown ones were probably meant to be."""
    meant: set[KeyPath] = set()
    for detail in details:
        if detail["type"] in _UNKNOWN_KEY:
            *place, key = detail["loc"]
            nearest = _nearest_key(str(key), _known_keys(tuple(place), model))
            meant |= {(*place, name) for name in nearest}
    return meant


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value, location = detail["type"], detail["input"], detail["loc"]
    match kind:
        case "missing":
            return "this key is required"
        case _ if kind in _UNKNOWN_KEY:
            return _unknown_key(str(location[-1]), _known_keys(location[:-1], model))
        case "value_error" | "assertion_error":
            return detail["msg"].split(", ", 1)[1]  # after pydantic's own "Value error, "
    allowed = re.sub(r"^(?!Keys)\w+ should", "must", detail["msg"])
    return f"{allowed}, got {_shown(value)}"


def _unknown_key(key: str, known: Sequence[str]) -> str:
    if nearest := _nearest_key(key, known):
        return f"unknown key {key!r}; did you mean {nearest[0]!r}?"
    return f"unknown key {key!r}; known here: {', '.join(known) or 'none'}"


def _nearest_key(key: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(key, known, n=1)


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


def _path_in_data(location: KeyPath, data: object, *, keeps_last: bool) -> KeyPath:
    """Return `location` without what is not in the file, such as the names of union members; the
    last part may be a required key that is absent.
    """
    path: list[str | int] = []
    for position, part in enumerate(location):
        is_kept = keeps_last and position == len(location) - 1
        if isinstance(data, Mapping) and (part in data or is_kept):
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


def _nearest_place(path: KeyPath, root: yaml.Node) -> Place:
    """Return the place of the deepest part of `path` that the file has, or of its beginning."""
    depths = range(len(path), 0, -1)
    places = (place_of(path[:depth], root) for depth in depths)
    return next((place for place in places if place is not None), _place(root))


def _child(node: yaml.Node, part: str | int) -> tuple[Place, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        # The last one counts: keys merged by `<<` come first.
        entries = {key.value: (key, value) for key, value in node.value}
        if str(part) in entries:
            key, value = entries[str(part)]
            return _place(key), value
    elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item = node.value[part]
        return _place(item), item
    return None


def _place(node: yaml.Node) -> Place:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _at(source: Path | str, place: Place | None) -> str:
    return str(source) if place is None else f"{source}:{place[0]}:{place[1]}"


def _duplicate_keys(node: yaml.Node, seen: set[int]) -> Iterator[tuple[Place, str]]:
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
                    line = first_lines[name]
                    yield _place(key), f"key {key.value!r} is already set in line {line}"
                first_lines.setdefault(name, _place(key)[0])
            yield from _duplicate_keys(value, seen)


def _syntax_problem(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    where = _at(path, (mark.line + 1, mark.column + 1) if mark else None)
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
