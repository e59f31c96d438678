"""The recorder and the comparison, on the stub modules and on a module like a real binding."""

from __future__ import annotations

import copy
import enum
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.trtllm.live_surface import record_surface
from tests.trtllm.stub_modules import load_surface, stub_modules
from tests.trtllm.surface_diff import Difference, Severity, compare


def differences(installed: Any, recorded: Any = None) -> list[Difference]:
    """Return how stubs of `installed` differ from what is recorded."""
    surface = load_surface() if recorded is None else recorded
    with stub_modules(installed):
        live = record_surface(surface)
    return compare(surface, live)


def surface_to_change() -> Any:
    return copy.deepcopy(load_surface())


def changed(name: str) -> tuple[Any, Any]:
    """Return a copy of the surface, and in it the entry of a dotted name, to be changed."""
    surface = surface_to_change()
    module, _, short = name.rpartition(".")
    return surface, surface[module][short]


EXECUTOR = "tensorrt_llm.bindings.executor.Executor"
REQUEST = "tensorrt_llm.bindings.executor.Request"


def test_what_is_as_recorded_differs_in_nothing() -> None:
    """Every entry: parameters, defaults, overloads, attributes, values."""
    assert differences(load_surface()) == []


def found(surface: Any) -> list[tuple[str, str, str]]:
    """Return all differences of stubs of `surface`, without the start of their names."""
    prefix = "tensorrt_llm.bindings.executor."
    return [
        (d.severity.value, d.name.removeprefix(prefix), d.message) for d in differences(surface)
    ]


def param(entry: Any, name: str) -> Any:
    return next(p for p in entry["params"] if p["name"] == name)


def test_a_renamed_parameter_is_named_with_its_new_name() -> None:
    surface, entry = changed(REQUEST)
    param(entry, "priority")["name"] = "importance"

    assert found(surface) == [
        ("breaks", "Request(priority)", "is gone; it may be called 'importance' now"),
        ("new", "Request(importance)", "is a new parameter, 0.5 by default"),
    ]


def test_a_removed_parameter_is_named() -> None:
    surface, entry = changed(REQUEST)
    entry["params"] = [p for p in entry["params"] if p["name"] != "cache_salt_id"]

    assert found(surface) == [("breaks", "Request(cache_salt_id)", "is gone")]


def test_a_new_parameter_breaks_only_if_it_must_be_given() -> None:
    surface, entry = changed(EXECUTOR)
    entry["methods"]["enqueue_request"]["params"].append({"name": "queue", "required": True})
    entry["methods"]["shutdown"]["params"].append(
        {"name": "wait", "required": False, "default": "True"}
    )

    assert found(surface) == [
        ("new", "Executor.shutdown(wait)", "is a new parameter, True by default"),
        ("breaks", "Executor.enqueue_request(queue)", "is a new parameter that must be given"),
    ]


@pytest.mark.parametrize(
    ("change", "severity", "message"),
    [
        ({"required": True}, "breaks", "must be given now"),
        ({"default": "0.7"}, "new", "is 0.7 by default, was 0.5"),
    ],
)
def test_a_parameter_that_has_changed_is_told_how(
    change: dict[str, Any], severity: str, message: str
) -> None:
    surface, entry = changed(REQUEST)
    param(entry, "priority").update(change)

    assert found(surface) == [(severity, "Request(priority)", message)]


def test_a_parameter_that_became_keyword_only_is_named() -> None:
    surface, entry = changed(REQUEST)
    param(entry, "max_tokens")["kw_only"] = True

    assert found(surface) == [("breaks", "Request(max_tokens)", "can only be given by name now")]


def test_parameters_that_changed_places_are_named_with_both() -> None:
    surface, entry = changed(REQUEST)
    entry["params"][:2] = reversed(entry["params"][:2])

    assert found(surface) == [
        ("breaks", "Request(input_token_ids)", "is argument 2 now, was 1"),
        ("breaks", "Request(max_tokens)", "is argument 1 now, was 2"),
    ]


def test_an_overload_is_compared_with_the_nearest_one() -> None:
    """Of the three ways to wait for responses, only the one with several ids has changed."""
    surface, entry = changed(EXECUTOR)
    entry["await_responses_overloads"][2][1]["name"] = "timeout_ms"

    assert found(surface) == [
        (
            "breaks",
            "Executor.await_responses(timeout)",
            "is gone; it may be called 'timeout_ms' now",
        ),
        ("new", "Executor.await_responses(timeout_ms)", "is a new parameter, None by default"),
    ]


def test_a_missing_class_and_a_missing_module_are_named() -> None:
    surface = surface_to_change()
    del surface["tensorrt_llm.bindings.executor"]["Executor"]
    del surface["tensorrt_llm.runtime.session"]

    assert [(d.name, d.message.partition(":")[0]) for d in differences(surface)] == [
        (
            "tensorrt_llm.runtime.session.TensorInfo",
            "module tensorrt_llm.runtime.session cannot be imported",
        ),
        (
            "tensorrt_llm.runtime.session.Session",
            "module tensorrt_llm.runtime.session cannot be imported",
        ),
        (EXECUTOR, "tensorrt_llm.bindings.executor has no Executor"),
    ]


def test_methods_attributes_and_values_that_are_gone_are_named() -> None:
    surface, entry = changed(EXECUTOR)
    entry["methods"]["cancel"] = entry["methods"].pop("cancel_request")
    result = surface["tensorrt_llm.bindings.executor"]["Result"]
    result["attributes"].remove("finish_reasons")
    reasons = surface["tensorrt_llm.bindings.executor"]["FinishReason"]
    reasons["values"] = ["NOT_FINISHED", "END_ID", "STOP_WORDS", "LENGTH", "CANCELLED", "STOPPED"]

    assert found(surface) == [
        ("breaks", "FinishReason.TIMED_OUT", "is gone"),
        ("new", "FinishReason.STOPPED", "is a new value"),
        ("breaks", "Result.finish_reasons", "is gone"),
        ("breaks", "Executor.cancel_request", "is gone; it may be called 'cancel' now"),
    ]


def test_an_attribute_that_was_written_and_cannot_be_any_more_is_named() -> None:
    name = "tensorrt_llm.bindings.internal.batch_manager.LlmRequest"
    surface, entry = changed(name)
    entry["writable"].remove("context_chunk_size")

    (difference,) = differences(surface)

    assert (difference.name, difference.message) == (
        f"{name}.context_chunk_size",
        "cannot be written any more",
    )
    assert difference.routes == ("A1", "C")


def test_an_argument_without_a_name_may_have_any() -> None:
    """The KV manager's methods are called by position, but how many there are matters."""
    name = "tensorrt_llm.bindings.internal.batch_manager.KVCacheManager"
    surface, entry = changed(name)
    entry["methods"]["add_token"]["params"][0]["name"] = "arg0"
    entry["methods"]["allocate_pools"]["params"] = []

    assert [(d.name, d.message) for d in differences(surface)] == [
        (f"{name}.allocate_pools", "takes 0 arguments, 1 are given")
    ]


# --- a module like a real one: bindings in C++ and Python code -----------------------------


class _Builtin:
    """A function of C++: callable, with a docstring, unknown to inspect."""

    __signature__ = "none"

    def __init__(self, docstring: str) -> None:
        self.__doc__ = docstring

    def __call__(self, *args: Any) -> None: ...


class Policy(enum.Enum):
    EVICT = 0
    NO_EVICT = 1


class Engine:
    """Bound."""

    run = _Builtin(
        "run(self, requests: collections.abc.Sequence[int], *, wait: bool = True) -> int"
    )
    stop = _Builtin("Stops it.")


class Executor:
    """Python code, whose attributes appear with the constructor."""

    def __init__(self, model: str, size: int = 8) -> None:
        self.scheduler = None

    def start(self) -> None: ...


def class_entry(**values: Any) -> dict[str, Any]:
    return {"kind": "class", "attributes": [], "methods": {}, "routes": ["A"]} | values


def method(*names: str, **optional: str) -> dict[str, Any]:
    params: list[dict[str, Any]] = [{"name": name, "required": True} for name in names]
    params += [
        {"name": name, "required": False, "default": default, "kw_only": True}
        for name, default in optional.items()
    ]
    return {"params": params}


@pytest.fixture
def module() -> Iterator[str]:
    made = ModuleType("made_for_this_test")
    for member in (Policy, Engine, Executor):
        setattr(made, member.__name__, member)
    sys.modules[made.__name__] = made
    yield made.__name__
    del sys.modules[made.__name__]


def test_bindings_are_read_from_their_docstrings(module: str) -> None:
    surface = {module: {"Engine": class_entry(methods={"run": method("requests", wait="True")})}}

    assert compare(surface, record_surface(surface)) == []
    assert record_surface(surface)[module]["Engine"]["methods"]["run"]["overloads"] == [
        [
            {"name": "requests", "required": True},
            {"name": "wait", "required": False, "default": "True", "kw_only": True},
        ]
    ]


def test_what_cannot_be_read_is_told_as_such(module: str) -> None:
    surface = {
        module: {
            "Engine": class_entry(methods={"stop": method()}),
            "Executor": class_entry(attributes=["scheduler"], methods={"start": method()}),
        }
    }

    assert [(d.severity, d.name.removeprefix(module), d.message) for d in
            compare(surface, record_surface(surface))] == [
        (Severity.UNKNOWN, ".Engine.stop", "its signature cannot be read"),
        (Severity.UNKNOWN, ".Executor.scheduler", "is set by the constructor, if at all"),
    ]  # fmt: skip


def test_python_code_is_read_by_inspection(module: str) -> None:
    params = [
        {"name": "model", "required": True},
        {"name": "size", "required": False, "default": "16"},
    ]
    surface = {module: {"Executor": class_entry(params=params)}}

    (difference,) = compare(surface, record_surface(surface))

    assert difference.message == "is 8 by default, was 16"


def test_an_enum_that_became_a_class_is_told(module: str) -> None:
    surface = {module: {"Engine": {"kind": "enum", "values": ["A"]},
                        "Policy": {"kind": "enum", "values": ["EVICT", "NO_EVICT"]}}}  # fmt: skip

    (difference,) = compare(surface, record_surface(surface))

    assert (difference.name, difference.message) == (
        f"{module}.Engine",
        "is of kind class now, was enum",
    )


@pytest.mark.parametrize(
    ("recorded", "installed", "are_same"),
    [
        ("Policy.EVICT", "<Policy.EVICT: 0>", True),
        ("Config()", "<pkg.Config object at 0x7f10>", True),
        ("auto", "'auto'", True),
        ("model.cache", "'model.cache'", True),
        ("1.5", "1.5", True),
        ("1.5", "2.5", False),
        ("Policy.EVICT", "<Policy.NO_EVICT: 1>", False),
        ("None", "0", False),
    ],
)
def test_defaults_are_compared_by_what_they_mean(
    module: str, recorded: str, installed: str, *, are_same: bool
) -> None:
    made = sys.modules[module]
    made.f = _Builtin(f"f(a: int = {installed}) -> None")  # type: ignore[attr-defined]
    params = [{"name": "a", "required": False, "default": recorded}]
    surface = {module: {"f": {"kind": "function", "params": params}}}

    found = compare(surface, record_surface(surface))

    assert [d.severity for d in found] == ([] if are_same else [Severity.NEW])
