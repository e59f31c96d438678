"""Records what of the surface an installed TensorRT-LLM really has, in the surface's own form.

Python code is asked by `inspect.signature`, bindings by their docstrings. Attributes that Python
code sets only in its constructor show in no class; where that may be so, the entry says
`attributes_may_be_hidden`.

python -m tests.trtllm.live_surface FILE
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.trtllm.binding_signatures import Param, parse_signatures
from tests.trtllm.stub_modules import Surface, load_surface

LiveEntry = dict[str, Any]
"""`missing` says why there is nothing; else like an entry of the surface, but with all overloads of
constructors, functions and methods in `overloads`, which is None where they cannot be read."""


def record_surface(surface: Surface) -> dict[str, dict[str, LiveEntry]]:
    """Return what is installed of everything that `surface` names."""
    return {
        module: {name: _record(module, name) for name in entries}
        for module, entries in surface.items()
    }


def _record(module_name: str, name: str) -> LiveEntry:
    try:
        found: Any = importlib.import_module(module_name)
    # OSError: a shared library that it loads is not there; RuntimeError: nor is a GPU.
    except (ImportError, OSError, RuntimeError) as error:
        return {"missing": f"module {module_name} cannot be imported: {error}"}
    for part in name.split("."):
        if not hasattr(found, part):
            return {"missing": f"{module_name} has no {name}"}
        found = getattr(found, part)
    return _describe(found, name.rpartition(".")[2])


def _describe(found: Any, name: str) -> LiveEntry:
    if not isinstance(found, type):
        return {"kind": "function", "overloads": _overloads(found, name)}
    members = _enum_members(found)
    if members is not None:
        return {"kind": "enum", "values": members}
    fields = {*_annotated(found), *getattr(found, "_fields", ())}
    attributes = sorted({name for name in dir(found) if not name.startswith("__")} | fields)
    return {
        "kind": "class",
        "overloads": _constructor_overloads(found),
        "attributes": attributes,
        "readonly": [name for name in attributes if _is_readonly(found, name)],
        "attributes_may_be_hidden": not fields and _is_python(_constructor(found)),
        "methods": {name: {"overloads": _overloads(*m)} for name, m in _methods(found).items()},
    }


def _enum_members(found: type) -> list[str] | None:
    """Return the names of an enum's values, of Python's, nanobind's or pybind11's kind."""
    if issubclass(found, enum.Enum):
        return list(found.__members__)
    members = getattr(found, "__members__", None)  # pybind11's enums are no Enum
    return list(members) if isinstance(members, dict) else None


def _annotated(found: type) -> Iterator[str]:
    for base in found.__mro__:
        yield from inspect.get_annotations(base)


def _is_readonly(found: type, name: str) -> bool:
    member = inspect.getattr_static(found, name, None)
    return hasattr(member, "fset") and member.fset is None


def _methods(found: type) -> dict[str, tuple[Any, str]]:
    """Return what can be called of a class, with the name that its docstring calls it by."""
    members = {name: getattr(found, name, None) for name in dir(found)}
    return {name: (member, name) for name, member in members.items() if callable(member)}


def _constructor(found: type) -> Any:
    return inspect.getattr_static(found, "__init__")


def _is_python(constructor: Any) -> bool:
    """Return whether a constructor is Python code, which may set any attribute."""
    has_signature = bool(parse_signatures(constructor.__doc__ or "", "__init__"))
    return inspect.isfunction(constructor) and not has_signature


def _constructor_overloads(found: type) -> list[list[Param]] | None:
    docstring = _constructor(found).__doc__ or ""
    return parse_signatures(docstring, "__init__") or _inspected(found)


def _overloads(function: Any, name: str) -> list[list[Param]] | None:
    return parse_signatures(function.__doc__ or "", name) or _inspected(function)


def _inspected(function: Any) -> list[list[Param]] | None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Python knows nothing of how it is called
        return None
    params = [_param(parameter) for parameter in signature.parameters.values()]
    return [params[1:] if params and params[0]["name"] == "self" else params]


def _param(parameter: inspect.Parameter) -> Param:
    has_default = parameter.default is not inspect.Parameter.empty
    param: Param = {"name": parameter.name, "required": not has_default}
    if has_default:
        param["default"] = repr(parameter.default)
    match parameter.kind:
        case inspect.Parameter.VAR_KEYWORD:
            param |= {"required": False, "var_keyword": True}
        case inspect.Parameter.VAR_POSITIONAL:
            param |= {"required": False, "var_positional": True}
        case inspect.Parameter.KEYWORD_ONLY:
            param["kw_only"] = True
        case inspect.Parameter.POSITIONAL_ONLY:
            param["positional_only"] = True
    return param


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(record_surface(load_surface()), indent=1))
