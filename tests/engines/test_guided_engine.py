"""Requests with a grammar on an engine under a scheduler: preempted, resumed, or broken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engines.engine_options import EngineOptions
from engines.trtllm.engine import TrtLlmEngine
from orchestrator.core.errors import RequestRejected
from orchestrator.core.ports import Engine, RequestEvent
from orchestrator.core.request import FinishReason, RequestSpec, ResumePoint, SamplingParams
from orchestrator.executor import ExecutorLoop, StepFigures
from orchestrator.overlapped_loop import OverlappedLoop
from tests.engines.tiny_llama import (
    BLOCK_SIZE_TOKENS,
    make_manifest,
    tiny_config,
    tiny_engine,
    tiny_tensors,
)
from tests.factories import make_request, make_scheduler
from tests.forms import END_TOKEN, VOCAB_SIZE, json_grammar, regex_grammar, tiny_tokenizer
from tests.trtllm.reference_engine import llama_spec, write_engine
from tests.trtllm.stand_in_path import stand_ins_importable

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {
            "type": "array",
            "items": {"enum": ["red", "green"]},
            "minItems": 2,
            "maxItems": 4,
        },
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}


class StandingClock:
    def now_s(self) -> float:
        return 0.0


class Node:
    """One tiny engine under a scheduler."""

    loop_class: type[ExecutorLoop]

    def __init__(self, engine: Engine) -> None:
        self.events: list[RequestEvent] = []
        self.num_preempted = 0
        self.loop = self.loop_class(
            make_scheduler(capabilities=engine.capabilities),
            engine,
            clock=StandingClock(),
            emit=self.events.extend,
            report=self._count,
        )

    def run(
        self, specs: Sequence[RequestSpec], resume_from: ResumePoint | None = None
    ) -> dict[str, list[int]]:
        """Return the tokens of all requests, after they have ended."""
        for spec in specs:
            self.loop.add(spec, 0.0, resume_from)
        while self.loop.has_requests:
            self.loop.run_step()
        tokens: dict[str, list[int]] = {spec.request_id: [] for spec in specs}
        for event in self.events:
            tokens[event.request_id] += event.new_token_ids
        return tokens

    def ending(self, request_id: str) -> RequestEvent:
        """Return the last event of a request."""
        return [event for event in self.events if event.request_id == request_id][-1]

    def _count(self, figures: StepFigures) -> None:
        self.num_preempted += len(figures.plan.preempted_ids)


@pytest.fixture(autouse=True, params=[ExecutorLoop, OverlappedLoop])
def _loop_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, "loop_class", request.param, raising=False)


def make_trtllm_engine(folder: Path) -> TrtLlmEngine:
    """Return TensorRT-LLM's engine of the tiny model, over the reference Session."""
    tiny_tokenizer(folder)
    config = tiny_config(vocab_size=VOCAB_SIZE)
    spec = llama_spec(
        config, tokens_per_block=BLOCK_SIZE_TOKENS, max_batch_size=16, max_num_tokens=256
    )
    manifest = make_manifest(vocab_size=VOCAB_SIZE, eos_token_ids=(END_TOKEN,))
    write_engine(folder, [spec], manifest, tiny_tensors(config))
    options = EngineOptions(
        device="cpu",
        num_device_blocks=128,
        max_num_batched_tokens=256,
        max_num_seqs=16,
        max_model_len=256,
    )
    return TrtLlmEngine(folder, options)


def make_node(folder: Path, **options: Any) -> Node:
    _, grammars = tiny_tokenizer(folder)
    config = tiny_config(vocab_size=VOCAB_SIZE)
    return Node(tiny_engine(config, grammars=grammars, **options))


def guided_spec(request_id: str, *, grammar: str | None = None, **sampling: Any) -> RequestSpec:
    params = SamplingParams(
        max_tokens=100,
        seed=len(request_id),
        grammar=grammar or json_grammar(SCHEMA),
        stop_token_ids=(END_TOKEN,),
        **sampling,
    )
    return make_request(request_id, prompt_token_ids=[5, 6, 7, 8], sampling=params).spec


def assert_follows_schema(folder: Path, tokens: Sequence[int]) -> None:
    assert tokens[-1] == END_TOKEN
    tokenizer, _ = tiny_tokenizer(folder)
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), SCHEMA)


def test_preempted_requests_get_the_tokens_that_they_would_have_got(tmp_path: Path) -> None:
    """Twelve requests of up to 26 blocks share 40."""
    specs = [guided_spec("r" * n, temperature=n % 2) for n in range(1, 13)]

    roomy = make_node(tmp_path, num_device_blocks=400)
    crowded = make_node(tmp_path, num_device_blocks=40)
    expected, found = roomy.run(specs), crowded.run(specs)

    assert crowded.num_preempted > 0
    assert roomy.num_preempted == 0
    assert found == expected
    for tokens in found.values():
        assert_follows_schema(tmp_path, tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_goes_on_alike_on_another_node(tmp_path: Path, temperature: float) -> None:
    spec = guided_spec("r", temperature=temperature)
    (expected,) = make_node(tmp_path).run([spec]).values()
    assert_follows_schema(tmp_path, expected)

    for cut in (1, len(expected) // 2, len(expected) - 1):
        point = ResumePoint(tuple(expected[:cut]), ttft_s=0.1)
        (rest,) = make_node(tmp_path).run([spec], point).values()
        assert rest == expected[cut:]


def test_a_grammar_that_breaks_ends_its_request_alone(tmp_path: Path) -> None:
    node = make_node(tmp_path)

    tokens = node.run([guided_spec("bad", grammar="nonsense"), guided_spec("good")])

    error = node.ending("bad").error
    assert error is not None
    assert "cannot be compiled" in error
    assert node.ending("good").finish_reason is FinishReason.STOP
    assert_follows_schema(tmp_path, tokens["good"])


def test_an_answer_that_is_cut_keeps_to_its_grammar_so_far(tmp_path: Path) -> None:
    node = make_node(tmp_path)
    spec = guided_spec("r", grammar=regex_grammar("[0-9]{500}"))

    (tokens,) = node.run([spec]).values()

    assert node.ending("r").finish_reason is FinishReason.LENGTH
    assert tiny_tokenizer(tmp_path)[0].decode(tokens).isdecimal()


def test_an_engine_without_a_tokenizer_refuses_grammars() -> None:
    node = Node(tiny_engine())

    with pytest.raises(RequestRejected, match="it has no tokenizer"):
        node.run([guided_spec("r")])


def test_tensorrt_llm_engines_follow_grammars_like_the_embedded_one(tmp_path: Path) -> None:
    specs = [guided_spec("r" * n, temperature=n % 2) for n in range(1, 5)]

    with stand_ins_importable():
        engine = make_trtllm_engine(tmp_path)
        found = Node(engine).run(specs)
        engine.close()

    assert found == make_node(tmp_path).run(specs)
    for tokens in found.values():
        assert_follows_schema(tmp_path, tokens)
