"""The stubs are as strict as they say, and hold everything that is recorded."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest

from tests.trtllm.stub_modules import StubError, Stubs, load_surface, stub_modules

EXECUTOR = "tensorrt_llm.bindings.executor"
BATCH_MANAGER = "tensorrt_llm.bindings.internal.batch_manager"

ENTRIES = [(m, name, entry) for m, names in load_surface().items() for name, entry in names.items()]

# What the generator reads, and what is written for people: where an entry comes from, how stable
# it is, and what else is known of it.
READ_KEYS = {"kind", "params", "values", "attributes", "methods", "overloads", "abstract"}
READ_KEYS |= {"readonly", "writable", "class_attributes", "static_methods", "class_methods"}
READ_KEYS |= {"await_responses_overloads", "positional_only_methods", "also_exported_from"}
INFORMATION_KEYS = {"verified", "stability", "routes", "notes", "returns"}
INFORMATION_KEYS |= {"optional_newer_params", "kv_cache_manager_methods_used"}


@pytest.fixture
def stubs() -> Iterator[Stubs]:
    with stub_modules() as value:
        yield value


@pytest.fixture
def executor(stubs: Stubs) -> Any:
    return stubs.find(EXECUTOR)


# --- everything that is recorded is there -------------------------------------------------


@pytest.mark.usefixtures("stubs")
def test_every_entry_is_generated() -> None:
    """Names, parameters in order, methods, attributes and values, each looked up from Python."""
    for module, name, entry in ENTRIES:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        for value in entry.get("values", []):
            assert found[value].name == value
        for member in [*entry.get("attributes", []), *entry.get("methods", {})]:
            assert hasattr(found, member), f"{module}.{name}.{member}"

    assert len(ENTRIES) > 80


@pytest.mark.parametrize(
    ("module", "name", "entry"),
    [e for e in ENTRIES if "params" in e[2] and not e[2].get("abstract")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_parameter_is_taken_and_no_other(
    stubs: Stubs, module: str, name: str, entry: Any
) -> None:
    """By name, all at once; leaving a required one out or adding one is refused."""
    if entry["kind"] == "function":
        stubs.implement(f"{module}.{name}", Mock())
    construct = stubs.find(f"{module}.{name}")
    params = [p for p in entry["params"] if not p.get("var_keyword")]
    arguments = {p["name"]: object() for p in params}

    construct(**arguments)

    if not any(p.get("var_keyword") for p in entry["params"]):
        with pytest.raises(TypeError, match="no_such_parameter"):
            construct(**arguments, no_such_parameter=1)
    for param in params:
        if param["required"] and "alternatives" not in param:
            with pytest.raises(TypeError, match=param["name"]):
                construct(**{k: v for k, v in arguments.items() if k != param["name"]})


def test_the_generator_reads_all_that_the_surface_says() -> None:
    """A new kind of information in the surface must not be overlooked."""
    keys = {key for _, _, entry in ENTRIES for key in entry}

    assert keys <= READ_KEYS | INFORMATION_KEYS


# --- modules ------------------------------------------------------------------------------


def test_the_modules_are_there_inside_the_block_only() -> None:
    with stub_modules():
        assert sys.modules["tensorrt_llm"].__version__ == "1.2.1"
        assert importlib.util.find_spec("tensorrt_llm") is not None

    assert "tensorrt_llm" not in sys.modules
    assert EXECUTOR not in sys.modules


def test_modules_that_were_there_come_back() -> None:
    with stub_modules() as outer:
        outer_module = sys.modules[EXECUTOR]
        with stub_modules() as inner:
            assert sys.modules[EXECUTOR] is inner.modules[EXECUTOR]

        assert sys.modules[EXECUTOR] is outer_module
        assert outer.modules[EXECUTOR] is outer_module


def test_an_unknown_name_of_a_module_is_refused(executor: Any) -> None:
    with pytest.raises(AttributeError, match="Exekutor"):
        executor.Exekutor  # noqa: B018
    with pytest.raises(ImportError, match="Exekutor"):
        exec(f"from {EXECUTOR} import Exekutor")
    with pytest.raises(ModuleNotFoundError, match=r"tensorrt_llm\.runtimes"):
        importlib.import_module("tensorrt_llm.runtimes")


@pytest.mark.usefixtures("stubs")
def test_a_class_is_exported_from_all_its_modules() -> None:
    session = importlib.import_module("tensorrt_llm.runtime.session").Session

    assert importlib.import_module("tensorrt_llm.runtime").Session is session


# --- arguments ----------------------------------------------------------------------------


def test_a_keyword_only_argument_is_refused_by_position(executor: Any) -> None:
    with pytest.raises(TypeError, match="too many positional arguments"):
        executor.Request([1], 8, True)
    with pytest.raises(TypeError, match="too many positional arguments"):
        executor.SamplingConfig(1, 50)


def test_an_argument_without_a_name_is_refused_by_name(stubs: Stubs) -> None:
    manager = stubs.make(f"{BATCH_MANAGER}.KVCacheManager")
    stubs.implement(f"{BATCH_MANAGER}.KVCacheManager.add_token", Mock())

    manager.add_token(7)

    with pytest.raises(TypeError, match="request_id"):
        manager.add_token(request_id=7)


def test_methods_check_their_arguments(stubs: Stubs) -> None:
    stubs.implement(f"{EXECUTOR}.Executor.enqueue_request", Mock())
    engine = stubs.make(f"{EXECUTOR}.Executor")

    with pytest.raises(TypeError, match="missing a required argument: 'request'"):
        engine.enqueue_request()
    with pytest.raises(TypeError, match="priority"):
        engine.enqueue_request("request", priority=1.0)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((), {"timeout": timedelta(milliseconds=1)}),
        ((7, timedelta(milliseconds=1)), {}),
        ((), {"ids": [1, 2]}),
    ],
)
def test_every_overload_can_be_called(
    stubs: Stubs, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    stubs.implement(f"{EXECUTOR}.Executor.await_responses", Mock(return_value=[]))

    assert stubs.make(f"{EXECUTOR}.Executor").await_responses(*args, **kwargs) == []


@pytest.mark.parametrize("kwargs", [{"id": 1, "ids": [1]}, {"timeout_s": 1}])
def test_a_mixture_of_overloads_is_refused(stubs: Stubs, kwargs: dict[str, Any]) -> None:
    engine = stubs.make(f"{EXECUTOR}.Executor")

    with pytest.raises(TypeError, match="unexpected keyword argument"):
        engine.await_responses(**kwargs)


def test_a_constructor_takes_any_of_its_overloads(executor: Any) -> None:
    executor.Executor("directory", executor.ModelType.DECODER_ONLY, executor.ExecutorConfig())
    executor.Executor(
        engine_buffer=b"",
        json_config_str="{}",
        model_type=executor.ModelType.DECODER_ONLY,
        executor_config=executor.ExecutorConfig(),
    )
    with pytest.raises(TypeError, match="model_type"):
        executor.Executor("directory")


@pytest.mark.usefixtures("stubs")
def test_what_python_cannot_construct_is_refused() -> None:
    tensorrt = importlib.import_module("tensorrt")

    with pytest.raises(TypeError, match="not recorded as something that Python can construct"):
        tensorrt.ICudaEngine()


# --- attributes ---------------------------------------------------------------------------


def test_arguments_become_attributes_and_defaults_too(executor: Any) -> None:
    config = executor.ExecutorConfig(max_batch_size=8)

    assert config.max_batch_size == 8
    assert config.iter_stats_max_iterations == 1000
    assert config.batching_type is executor.BatchingType.INFLIGHT
    policy = config.scheduler_config.capacity_scheduler_policy
    assert policy is executor.CapacitySchedulerPolicy.GUARANTEED_NO_EVICT


def test_an_unknown_attribute_is_neither_read_nor_written(executor: Any) -> None:
    config = executor.ExecutorConfig()

    with pytest.raises(AttributeError, match="max_batchsize"):
        config.max_batchsize  # noqa: B018
    with pytest.raises(AttributeError, match="max_batchsize"):
        config.max_batchsize = 8


def test_a_read_only_attribute_is_not_written(executor: Any) -> None:
    request = executor.Request([1, 2], 8)
    request.streaming = True

    assert request.streaming
    with pytest.raises(AttributeError, match="max_tokens is read-only"):
        request.max_tokens = 9
    with pytest.raises(AttributeError, match="capacity_scheduler_policy is read-only"):
        executor.SchedulerConfig().capacity_scheduler_policy = None


def test_where_the_writable_attributes_are_listed_no_other_is(stubs: Stubs) -> None:
    request = stubs.make(f"{BATCH_MANAGER}.LlmRequest", context_chunk_size=0)
    request.context_chunk_size = 64

    assert request.context_chunk_size == 64
    with pytest.raises(AttributeError, match="context_remaining_length is read-only"):
        request.context_remaining_length = 64


def test_an_enum_has_its_values_and_they_are_fixed(executor: Any) -> None:
    assert [reason.name for reason in executor.FinishReason][:2] == ["NOT_FINISHED", "END_ID"]
    with pytest.raises(AttributeError, match="STOPPED"):
        executor.FinishReason.STOPPED  # noqa: B018
    with pytest.raises(AttributeError, match="LENGTH"):
        executor.FinishReason.LENGTH = 7


def test_a_nested_class_is_an_attribute_of_the_outer_one(executor: Any) -> None:
    part = executor.KvCacheRetentionConfig.TokenRangeRetentionConfig(0, None, 80)

    assert part.priority == 80


def test_a_class_that_python_derives_has_abstract_methods(stubs: Stubs) -> None:
    base = stubs.find("tensorrt_llm._torch.pyexecutor.scheduler.scheduler.RequestScheduler")
    half = type("Half", (base,), {"schedule_request": Mock()})
    whole = type("Whole", (half,), {"can_schedule": Mock(return_value=True)})

    with pytest.raises(TypeError, match="can_schedule"):
        half()
    assert whole().can_schedule([])


# --- behaviour and records ----------------------------------------------------------------


class Doubler:
    """Implements a part of Executor."""

    def __init__(self, model_path: str, model_type: object, executor_config: object) -> None:
        self.model_path = model_path

    def enqueue_request(self, request: int) -> int:
        return 2 * request


def test_a_class_does_what_its_implementation_does(stubs: Stubs, executor: Any) -> None:
    stubs.implement(f"{EXECUTOR}.Executor", Doubler)
    engine = executor.Executor("directory", executor.ModelType.DECODER_ONLY, None)

    assert engine.enqueue_request(request=21) == 42
    with pytest.raises(StubError, match=r"Executor\.shutdown was called"):
        engine.shutdown()
    with pytest.raises(AttributeError, match="model_path"):
        engine.model_path  # noqa: B018  # the implementation has it, the recorded class has not


def test_a_method_can_be_given_a_meaning_by_itself(stubs: Stubs) -> None:
    stubs.implement(f"{EXECUTOR}.Executor.can_enqueue_requests", Mock(return_value=True))

    assert stubs.make(f"{EXECUTOR}.Executor").can_enqueue_requests()


def test_an_attribute_without_a_value_is_not_mistaken_for_a_missing_one(stubs: Stubs) -> None:
    result = stubs.make(f"{EXECUTOR}.Result", is_final=True)

    assert result.is_final
    with pytest.raises(StubError, match=r"Result\.log_probs was read"):
        getattr(result, "log_probs", None)


def test_calls_are_recorded_with_their_arguments(stubs: Stubs, executor: Any) -> None:
    executor.Request([1], max_tokens=8, streaming=True)
    with pytest.raises(TypeError):
        executor.Request([1])

    assert stubs.calls_of(f"{EXECUTOR}.Request") == [
        {"input_token_ids": [1], "max_tokens": 8, "streaming": True}
    ]


def test_a_test_cannot_name_what_is_not_recorded(stubs: Stubs) -> None:
    with pytest.raises(AttributeError, match="enqueue"):
        stubs.implement(f"{EXECUTOR}.Executor.enqueue", lambda: None)
    with pytest.raises(AttributeError, match="enqueue"):
        stubs.calls_of(f"{EXECUTOR}.Executor.enqueue")
    with pytest.raises(AttributeError, match="tokens"):
        stubs.make(f"{EXECUTOR}.Result", tokens=[1])
