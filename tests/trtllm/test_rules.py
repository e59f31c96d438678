"""What a run must keep to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.trtllm.bad_calls import BAD_CALLS, SPEC, TWO_RANKS, BadCall, Call
from tests.trtllm.engine_io import engine_io
from tests.trtllm.engine_spec import EngineSpec, engine_bytes
from tests.trtllm.execution import LoadedEngine
from tests.trtllm.rules import Rule, RuleBroken

pytestmark = pytest.mark.usefixtures("stand_ins")


@pytest.mark.parametrize("bad", BAD_CALLS, ids=lambda bad: bad.name)
def test_a_bad_call_is_told_by_its_rule(bad: BadCall) -> None:
    call = Call(bad.spec)
    bad.change(call)

    with pytest.raises(RuleBroken) as caught:
        call.run()

    assert caught.value.rule is bad.rule
    assert str(caught.value).startswith(f"{bad.rule}: ")


@pytest.mark.parametrize("spec", [SPEC, TWO_RANKS, replace(SPEC, has_position_ids=False)])
def test_the_same_calls_unchanged_pass(spec: EngineSpec) -> None:
    call = Call(spec)

    assert call.run()
    assert call.run()


def test_every_rule_has_a_bad_call() -> None:
    assert {bad.rule for bad in BAD_CALLS} | {Rule.TABLE_SIZE} == set(Rule)


@pytest.mark.parametrize("name", engine_io(TWO_RANKS).inputs)
def test_every_input_is_asked_for(name: str) -> None:
    call = Call(TWO_RANKS)
    call.shapes = dict(call.inputs)
    del call.inputs[name]

    with pytest.raises(RuleBroken) as caught:
        call.run()

    assert caught.value.rule is Rule.MISSING_TENSOR


def test_shapes_must_have_been_set() -> None:
    call = Call()

    with pytest.raises(RuleBroken) as caught:
        call.session.run(call.inputs, call.outputs, call.stream)

    assert caught.value.rule is Rule.STALE_SHAPE


def test_memory_does_not_change_sides_between_runs() -> None:
    call = Call()
    call.run()
    inputs = call.inputs
    inputs["context_lengths"], inputs["host_context_lengths"] = (
        inputs["host_context_lengths"],
        inputs["context_lengths"],
    )

    with pytest.raises(RuleBroken) as caught:
        call.run()

    assert caught.value.rule is Rule.PLACEMENT


def test_memory_that_was_freed_may_come_back_on_the_other_side() -> None:
    """The allocator gives the same address again, sooner or later."""
    call = Call()
    for _ in range(20):
        call.run()
        for name in ("context_lengths", "host_context_lengths"):
            del call.inputs[name]
        lengths = torch.tensor([6, 3, 9, 3], dtype=torch.int32)
        call.inputs["host_context_lengths"] = lengths
        call.inputs["context_lengths"] = lengths.clone()

    assert call.run()


def test_tables_that_32_bits_cannot_index_are_refused() -> None:
    """16 tables of 2**27 blocks: nothing is read before that is clear."""
    spec = replace(SPEC, max_seq_len=2**29)
    call = Call()
    shapes = {name: tuple(tensor.shape) for name, tensor in call.inputs.items()}
    for name in shapes:
        if "block_offsets" in name:
            shapes[name] = (1, 16, 2, 2**27)
        elif shapes[name][0] == 4:
            shapes[name] = (16, *shapes[name][1:])
    engine = LoadedEngine(engine_bytes(spec))

    with pytest.raises(RuleBroken) as caught:
        engine.run(dict.fromkeys([*shapes, "logits"], 0), shapes)

    assert caught.value.rule is Rule.TABLE_SIZE
