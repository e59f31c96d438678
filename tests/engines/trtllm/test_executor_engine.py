"""The engine over TensorRT-LLM's executor, on the strict stubs and the fake executor.

The fake makes one step whenever somebody waits for responses, so `collect` is one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from engines.trtllm.executor_engine import TrtLlmExecutorEngine, TrtLlmExecutorOptions
from orchestrator.core.errors import ConfigError, EngineDirectoryError, EngineError, RequestRejected
from orchestrator.core.ports import RequestEvent
from orchestrator.core.request import FinishReason
from tests.factories import make_request
from tests.scripted_engine import RAISE, REFUSE
from tests.trtllm.fake_executor import BINDINGS, FakeExecutor, implement_executor
from tests.trtllm.served_engine_dir import (
    BLOCK_BYTES,
    BLOCK_SIZE_TOKENS,
    MAX_SEQ_LEN,
    write_served_engine_dir,
)
from tests.trtllm.stub_modules import Stubs, stub_modules

OPTIONS = TrtLlmExecutorOptions(
    device="cpu",
    num_device_blocks=100,
    max_num_batched_tokens=64,
    max_num_seqs=8,
    max_model_len=MAX_SEQ_LEN,
)


@pytest.fixture
def stubs() -> Iterator[Stubs]:
    """Of a release that may run on the CPU."""
    with stub_modules(version="1.2.1+reference") as value:
        yield value


@pytest.fixture
def executors(stubs: Stubs) -> list[FakeExecutor]:
    return implement_executor(stubs)


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    return write_served_engine_dir(tmp_path / "engine")


def load(engine_dir: Path, **options: Any) -> TrtLlmExecutorEngine:
    return TrtLlmExecutorEngine.load(engine_dir, dataclasses.replace(OPTIONS, **options))


@pytest.fixture
def engine(executors: list[FakeExecutor], engine_dir: Path) -> TrtLlmExecutorEngine:
    loaded = load(engine_dir)
    assert len(executors) == 1
    return loaded


def start(engine: TrtLlmExecutorEngine, name: str, *prompt: int, **options: Any) -> None:
    request = make_request(name, prompt_token_ids=prompt, **({"max_tokens": 3} | options))
    engine.start(request.spec)


def run(engine: TrtLlmExecutorEngine, num_steps: int) -> list[RequestEvent]:
    return [event for _ in range(num_steps) for event in engine.collect(0.0)]


# --- loading ------------------------------------------------------------------------------


@pytest.mark.usefixtures("executors")
def test_the_executor_is_configured_as_the_node_says(stubs: Stubs, engine_dir: Path) -> None:
    load(engine_dir, num_host_blocks=200)

    (executor,) = stubs.calls_of(f"{BINDINGS}.Executor")
    config = executor["executor_config"]
    assert executor["model_path"] == str(engine_dir)
    assert (config.max_batch_size, config.max_num_tokens) == (8, 64)
    assert config.enable_chunked_context is True
    assert config.parallel_config is None
    assert config.scheduler_config.capacity_scheduler_policy.name == "MAX_UTILIZATION"
    assert config.kv_cache_config.enable_block_reuse is True
    assert config.kv_cache_config.max_tokens == 100 * BLOCK_SIZE_TOKENS
    assert config.kv_cache_config.free_gpu_memory_fraction is None
    assert config.kv_cache_config.host_cache_size == 200 * BLOCK_BYTES


def test_a_share_of_the_memory_and_the_other_policy_can_be_asked_for(
    stubs: Stubs, engine_dir: Path
) -> None:
    stubs.implement(f"{BINDINGS}.Executor", Mock(side_effect=RuntimeError("not now")))

    with pytest.raises(EngineError):
        load(
            engine_dir,
            num_device_blocks=None,
            device_memory_fraction=0.8,
            capacity_policy="guaranteed-no-evict",
            block_reuse=False,
        )

    (executor,) = stubs.calls_of(f"{BINDINGS}.Executor")
    config = executor["executor_config"]
    assert config.scheduler_config.capacity_scheduler_policy.name == "GUARANTEED_NO_EVICT"
    assert config.kv_cache_config.free_gpu_memory_fraction == 0.8
    assert config.kv_cache_config.max_tokens is None
    assert config.kv_cache_config.enable_block_reuse is False


def test_the_number_of_blocks_is_what_the_executor_says(engine: TrtLlmExecutorEngine) -> None:
    capabilities = engine.capabilities

    assert capabilities.num_device_blocks == 100
    assert capabilities.block_size_tokens == BLOCK_SIZE_TOKENS
    assert capabilities.max_model_len == MAX_SEQ_LEN
    assert capabilities.grammar_obstacle == "TensorRT-LLM's executor draws its tokens by itself"


def test_the_first_request_of_all_is_nobodys(engine: TrtLlmExecutorEngine) -> None:
    """It was made to learn the number of blocks; its tokens are not news."""
    assert run(engine, 3) == []


def test_an_engine_that_cannot_be_loaded_says_why(stubs: Stubs, engine_dir: Path) -> None:
    stubs.implement(f"{BINDINGS}.Executor", Mock(side_effect=RuntimeError("wrong GPU")))

    with pytest.raises(EngineError, match=rf"cannot run {engine_dir}: wrong GPU"):
        load(engine_dir)


def executor_that(**methods: Any) -> Callable[..., Mock]:
    """Return a constructor of executors that do only this, and take requests."""
    methods.setdefault("get_latest_iteration_stats", Mock(return_value=[]))
    methods.setdefault("await_responses", Mock(return_value=[]))
    return Mock(return_value=Mock(enqueue_request=Mock(return_value=1), **methods))


def test_an_engine_that_does_not_answer_is_given_up(stubs: Stubs, engine_dir: Path) -> None:
    stubs.implement(f"{BINDINGS}.Executor", executor_that())

    with pytest.raises(EngineError, match="did not answer its first request in 0 s"):
        load(engine_dir, start_timeout_s=0.01)


def test_an_engine_whose_first_request_fails_is_given_up(stubs: Stubs, engine_dir: Path) -> None:
    failed = stubs.make(f"{BINDINGS}.Response", request_id=1, error_msg="no kernel")
    stubs.implement(f"{BINDINGS}.Response.has_error", Mock(return_value=True))
    constructor = executor_that(await_responses=Mock(return_value=[failed]))
    stubs.implement(f"{BINDINGS}.Executor", constructor)

    with pytest.raises(EngineError, match=r"the first request failed: .*no kernel"):
        load(engine_dir)


def test_bindings_with_other_parameters_are_named_as_such(stubs: Stubs, engine_dir: Path) -> None:
    """What a release whose bindings differ from its recorded sources would do."""
    unknown = TypeError("incompatible constructor arguments: cache_salt_id")
    stubs.implement(f"{BINDINGS}.Executor", executor_that())
    stubs.implement(f"{BINDINGS}.Request", Mock(side_effect=unknown))

    with pytest.raises(EngineError, match="cache_salt_id; `make trtllm-acceptance` lists"):
        load(engine_dir)


@pytest.mark.usefixtures("executors")
def test_more_than_the_engine_was_built_for_is_refused(engine_dir: Path) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs is 257"):
        load(engine_dir, max_num_seqs=257)


def test_another_release_is_refused_before_anything_loads(engine_dir: Path) -> None:
    with (
        stub_modules(version="1.3.0rc21") as stubs,
        pytest.raises(EngineError, match=r"TensorRT-LLM 1\.3\.0rc21 is installed"),
    ):
        load(engine_dir)

    assert stubs.calls == []


@pytest.mark.usefixtures("executors")
def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineDirectoryError, match="no such engine directory"):
        load(tmp_path / "missing")


def write_two_gpu_engine(directory: Path) -> Path:
    return write_served_engine_dir(
        directory / "engine", model={"mapping": {"world_size": 2, "tp_size": 2}}
    )


def test_an_engine_of_two_gpus_gets_processes_of_its_own(stubs: Stubs, tmp_path: Path) -> None:
    """Each holds one of the two KV heads, so a block takes half."""
    worker = tmp_path / "tensorrt_llm/bin/executorWorker"
    worker.parent.mkdir(parents=True)
    worker.touch()
    stubs.modules["tensorrt_llm"].__file__ = str(tmp_path / "tensorrt_llm/__init__.py")
    implement_executor(stubs)

    load(write_two_gpu_engine(tmp_path), num_host_blocks=200)

    config = stubs.calls_of(f"{BINDINGS}.Executor")[0]["executor_config"]
    assert config.parallel_config.communication_mode.name == "ORCHESTRATOR"
    assert config.parallel_config.orchestrator_config.worker_executable_path == str(worker)
    assert config.kv_cache_config.host_cache_size == 200 * BLOCK_BYTES // 2


@pytest.mark.usefixtures("executors")
def test_an_installation_without_the_worker_program_is_refused(
    stubs: Stubs, tmp_path: Path
) -> None:
    stubs.modules["tensorrt_llm"].__file__ = str(tmp_path / "tensorrt_llm/__init__.py")

    with pytest.raises(EngineError, match="bin/executorWorker: is missing"):
        load(write_two_gpu_engine(tmp_path))


# --- requests -----------------------------------------------------------------------------


def test_tokens_come_in_order_and_end_once(engine: TrtLlmExecutorEngine) -> None:
    start(engine, "a", 5, 1, 2)

    assert run(engine, 5) == [
        RequestEvent("a", (5,)),
        RequestEvent("a", (6,)),
        RequestEvent("a", (7,), finish_reason=FinishReason.LENGTH),
    ]


def test_a_stop_token_ends_a_request_and_is_delivered(engine: TrtLlmExecutorEngine) -> None:
    start(engine, "a", 5, stop_token_ids=(6,))

    assert run(engine, 5)[-1] == RequestEvent("a", (6,), finish_reason=FinishReason.STOP)


@pytest.mark.usefixtures("executors")
def test_the_more_valuable_request_goes_first(engine_dir: Path) -> None:
    engine = load(engine_dir, max_num_seqs=1)
    start(engine, "low", 5, weight=1.0, max_tokens=1)
    start(engine, "high", 50, weight=4.0, max_tokens=1)

    assert [event.request_id for event in run(engine, 2)] == ["high", "low"]


def test_short_of_blocks_the_least_valuable_request_waits_and_loses_nothing(
    executors: list[FakeExecutor], engine_dir: Path
) -> None:
    """Three prompts of 16 tokens in 5 blocks of 16: one of them is paused for its second block."""
    engine = load(engine_dir, num_device_blocks=5)
    for name, first, weight in (("low", 10, 1.0), ("high", 20, 4.0), ("middle", 30, 2.0)):
        start(engine, name, first, *range(15), weight=weight)
    events = run(engine, 12)

    tokens = {
        name: [t for e in events if e.request_id == name for t in e.new_token_ids]
        for name in ("low", "high", "middle")
    }
    assert tokens == {"low": [10, 11, 12], "high": [20, 21, 22], "middle": [30, 31, 32]}
    assert len(executors[0].pauses) == 1


def test_a_cancelled_request_says_nothing_more_and_the_executor_is_told(
    stubs: Stubs, engine: TrtLlmExecutorEngine
) -> None:
    start(engine, "a", 5, max_tokens=100)
    start(engine, "b", 50, max_tokens=4)
    run(engine, 1)

    engine.cancel("a")
    events = run(engine, 5)

    assert {event.request_id for event in events} == {"b"}
    assert len(stubs.calls_of(f"{BINDINGS}.Executor.cancel_request")) == 1


def test_an_id_can_be_used_again_after_its_end(engine: TrtLlmExecutorEngine) -> None:
    """News of the cancelled one must not be taken for news of the new one."""
    start(engine, "a", 5, max_tokens=100)
    run(engine, 1)
    engine.cancel("a")
    start(engine, "a", 50)

    tokens = [token for event in run(engine, 5) for token in event.new_token_ids]

    assert tokens == [50, 51, 52]


def test_a_failing_request_ends_with_its_message(engine: TrtLlmExecutorEngine) -> None:
    start(engine, "bad", 5, REFUSE)
    start(engine, "good", 50, max_tokens=1)

    bad, good = run(engine, 1)

    assert bad.error == "the engine failed: as the prompt asked"
    assert good.finish_reason is FinishReason.LENGTH


def test_a_broken_step_ends_all_its_requests(engine: TrtLlmExecutorEngine) -> None:
    start(engine, "a", 5, RAISE)
    start(engine, "b", 50)

    assert {e.request_id: e.finish_reason for e in run(engine, 1)} == {
        "a": FinishReason.ERROR,
        "b": FinishReason.ERROR,
    }


def test_what_the_bindings_refuse_is_refused(stubs: Stubs, engine: TrtLlmExecutorEngine) -> None:
    refusal = RuntimeError("Assertion failed: topP.value() > 0.f")
    stubs.implement(f"{BINDINGS}.SamplingConfig", Mock(side_effect=refusal))

    with pytest.raises(RequestRejected, match=r"TensorRT-LLM refuses the request: .*topP"):
        start(engine, "a", 5)
    assert run(engine, 1) == []


def test_an_executor_that_takes_no_requests_any_more_has_stopped(
    stubs: Stubs, engine: TrtLlmExecutorEngine
) -> None:
    broken = Mock(side_effect=RuntimeError("shut down"))
    stubs.implement(f"{BINDINGS}.Executor.enqueue_request", broken)
    stubs.implement(f"{BINDINGS}.Executor.can_enqueue_requests", Mock(return_value=False))

    with pytest.raises(EngineError, match="has stopped: shut down"):
        start(engine, "a", 5)


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("await_responses", lambda engine: engine.collect(0.0)),
        ("get_latest_iteration_stats", lambda engine: engine.take_iterations()),
        ("cancel_request", lambda engine: engine.cancel("a")),
    ],
)
def test_a_broken_executor_is_an_engine_error_wherever_it_shows(
    stubs: Stubs,
    engine: TrtLlmExecutorEngine,
    method: str,
    call: Callable[[TrtLlmExecutorEngine], object],
) -> None:
    start(engine, "a", 5)
    broken = Mock(side_effect=RuntimeError("CUDA error"))
    stubs.implement(f"{BINDINGS}.Executor.{method}", broken)

    with pytest.raises(EngineError, match="has stopped: CUDA error"):
        call(engine)


def test_steps_are_told_once(engine: TrtLlmExecutorEngine) -> None:
    """A prompt of three tokens, then one token: what the executor counts."""
    engine.take_iterations()
    start(engine, "a", 5, 1, 2)
    run(engine, 2)

    first, second = engine.take_iterations()

    assert (first.num_prefill_tokens, first.num_decode_tokens) == (3, 0)
    assert (second.num_prefill_tokens, second.num_decode_tokens) == (0, 1)
    assert second.step_s == 0.002
    assert (second.num_running, second.num_free_device_blocks) == (1, 99)
    assert engine.take_iterations() == []


def test_closing_shuts_the_executor_down(
    executors: list[FakeExecutor], engine: TrtLlmExecutorEngine
) -> None:
    engine.close()

    assert executors[0].is_shut_down
