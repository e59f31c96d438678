"""The stand-ins against the recorded surface, name by name and in both directions."""

from __future__ import annotations

import enum
import importlib
import inspect
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest

from tests.trtllm.engine_io import surface
from tests.trtllm.engine_spec import engine_bytes
from tests.trtllm.reference_engine import fake_spec

pytestmark = pytest.mark.usefixtures("stand_ins")

MODULES = (
    "tensorrt",
    "tensorrt_llm.runtime.session",
    "tensorrt_llm.mapping",
    "tensorrt_llm.plugin.plugin",
)
CLASSES = [
    *(f"tensorrt.{name}" for name in surface()["modules"]["tensorrt"]),
    "tensorrt_llm.runtime.session.TensorInfo",
    "tensorrt_llm.runtime.session.Session",
    "tensorrt_llm.mapping.Mapping",
    "tensorrt_llm.plugin.plugin.CustomAllReduceHelper",
]


def recorded(path: str) -> Mapping[str, Any]:
    module, _, name = path.rpartition(".")
    entry: Mapping[str, Any] = surface()["modules"][module][name]
    return entry


def stand_in(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def own_classes(module: ModuleType) -> Iterator[str]:
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__:
            yield name


def params_of(function: Any) -> list[dict[str, Any]]:
    """Return a signature in the surface's own terms."""
    params = []
    for param in inspect.signature(function).parameters.values():
        if param.name == "self":
            continue
        is_variadic = param.kind is param.VAR_KEYWORD
        has_default = param.default is not param.empty
        entry: dict[str, Any] = {
            "name": param.name,
            "required": not has_default and not is_variadic,
        }
        if has_default:
            entry["default"] = str(param.default)
        if param.kind is param.KEYWORD_ONLY:
            entry["kw_only"] = True
        if is_variadic:
            entry["var_keyword"] = True
        params.append(entry)
    return params


def public_names(cls: type) -> set[str]:
    fields = getattr(cls, "__dataclass_fields__", {})
    return {name for name in (*vars(cls), *fields) if not name.startswith("_")}


def test_every_class_is_recorded() -> None:
    found = [
        f"{module}.{name}" for module in MODULES for name in own_classes(import_module(module))
    ]

    assert sorted(found) == sorted(CLASSES)


def import_module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("path", CLASSES)
def test_a_class_has_the_recorded_names_and_no_others(path: str) -> None:
    entry = recorded(path)
    names = (
        entry["values"] if entry["kind"] == "enum" else [*entry["attributes"], *entry["methods"]]
    )

    assert public_names(stand_in(path)) == set(names)


@pytest.mark.parametrize("path", CLASSES)
def test_methods_take_the_recorded_parameters(path: str) -> None:
    entry, cls = recorded(path), stand_in(path)
    methods: Mapping[str, Any] = entry.get("methods", {})

    assert {name: params_of(getattr(cls, name)) for name in methods} == {
        name: method["params"] for name, method in methods.items()
    }
    assert {name for name in methods if isinstance(vars(cls)[name], staticmethod)} == set(
        entry.get("static_methods", [])
    )


@pytest.mark.parametrize("path", [path for path in CLASSES if "params" in recorded(path)])
def test_constructors_take_the_recorded_parameters(path: str) -> None:
    assert params_of(stand_in(path)) == recorded(path)["params"]


def test_what_runtime_exports_is_what_is_recorded() -> None:
    runtime = import_module("tensorrt_llm.runtime")
    exported = [path for path in CLASSES if "also_exported_from" in recorded(path)]

    assert {getattr(runtime, path.rpartition(".")[2]) for path in exported} == {
        stand_in(path) for path in exported
    }


def instances() -> list[object]:
    import tensorrt as trt
    from tensorrt_llm.mapping import Mapping as RankMapping
    from tensorrt_llm.plugin.plugin import CustomAllReduceHelper
    from tensorrt_llm.runtime import Session, TensorInfo

    session = Session.from_serialized_engine(engine_bytes(fake_spec()))
    return [
        session,
        session.runtime,
        session.engine,
        session.context,
        trt.Logger(),
        TensorInfo("input_ids", trt.DataType.INT32, (1,)),
        RankMapping(),
        CustomAllReduceHelper(),
    ]


def test_unknown_attributes_can_neither_be_read_nor_set() -> None:
    for instance in instances():
        with pytest.raises(AttributeError):
            instance.tensors  # type: ignore[attr-defined]  # noqa: B018
        with pytest.raises(AttributeError):
            instance.tensors = 1  # type: ignore[attr-defined]


def test_instances_are_of_every_class_but_the_enums() -> None:
    classes = {type(instance) for instance in instances()}

    assert classes == {stand_in(path) for path in CLASSES} - {
        cls for path in CLASSES if issubclass(cls := stand_in(path), enum.Enum)
    }


@pytest.mark.parametrize("module", MODULES)
def test_unknown_names_of_a_module_raise(module: str) -> None:
    with pytest.raises(AttributeError):
        import_module(module).GenerationSession  # noqa: B018


def test_the_version_says_that_this_is_no_tensorrt_llm() -> None:
    assert import_module("tensorrt_llm").__version__ == "1.2.1+reference"
