"""Runs that TensorRT-LLM would refuse or answer with garbage, each with the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.trtllm.engine_spec import EngineSpec, engine_bytes
from tests.trtllm.packer import Part, pack
from tests.trtllm.reference_engine import fake_spec
from tests.trtllm.rules import Rule
from tests.trtllm.session_driver import make_pool, make_workspace

SPEC = fake_spec()
OFFSETS = "kv_cache_block_offsets"


class Call:
    """A sound step: the first chunk of a prompt, a later chunk of another, and two generations, of
    which the first shares the two full blocks of the second request."""

    def __init__(self, spec: EngineSpec = SPEC) -> None:
        from tensorrt_llm.runtime import Session

        self.spec = spec
        self.session = Session.from_serialized_engine(engine_bytes(spec))
        self.pool = make_pool(spec, 64)
        parts = [
            Part(range(10), 10, begin=0, end=6, block_ids=[10, 11]),
            Part(range(14), 14, begin=8, end=11, block_ids=[20, 21, 22]),
            Part(range(13), 9, begin=12, end=13, block_ids=[20, 21, 30, 31]),
            Part(range(4), 3, begin=3, end=4, block_ids=[40]),
        ]
        self.buffers, workspace = make_workspace(spec)
        self.inputs: dict[str, Any] = pack(spec, parts, self.pool) | workspace
        self.outputs: dict[str, Any] = {"logits": torch.empty(4, spec.vocab_size_padded)}
        self.stream: Any = 0
        self.shapes: dict[str, Any] | None = None
        """What the shapes are set from; None for the inputs."""

    def run(self) -> bool:
        self.session.set_shapes(self.inputs if self.shapes is None else self.shapes)
        return self.session.run(self.inputs, self.outputs, self.stream)


Change = Callable[[Call], None]


def put(name: str, index: object, value: object) -> Change:
    """Change values of an input."""

    def change(call: Call) -> None:
        call.inputs[name][index] = value

    return change


def put_both(name: str, index: object, value: object) -> Change:
    """Change values of an input and of its twin on the host."""

    def change(call: Call) -> None:
        call.inputs[name][index] = value
        call.inputs[f"host_{name}"][index] = value

    return change


def put_block(sequence: int, place: int, block: int) -> Change:
    """Put another block into a sequence's table."""
    key = block * SPEC.num_layers * 2
    return put_both(OFFSETS, (0, sequence, slice(None), place), torch.tensor([key, key + 1]))


def bind(name: str, make: Callable[[torch.Tensor], object]) -> Change:
    """Bind another tensor in place of an input; its shape is set too."""

    def change(call: Call) -> None:
        call.inputs[name] = make(call.inputs[name])

    return change


def bind_unseen(name: str, make: Callable[[torch.Tensor], object]) -> Change:
    """Bind something in place of an input, after the shapes were set."""

    def change(call: Call) -> None:
        call.shapes = dict(call.inputs)
        call.inputs[name] = make(call.inputs[name])

    return change


def bind_logits(logits: object) -> Change:
    def change(call: Call) -> None:
        call.outputs["logits"] = logits

    return change


def all_of(*changes: Change) -> Change:
    def change(call: Call) -> None:
        for each in changes:
            each(call)

    return change


def on(stream: object) -> Change:
    def change(call: Call) -> None:
        call.stream = stream

    return change


def rename(old: str, new: str) -> Change:
    def change(call: Call) -> None:
        call.inputs[new] = call.inputs[old]

    return change


def drop_logits(call: Call) -> None:
    call.outputs = {}


def logits_among_the_inputs(call: Call) -> None:
    call.shapes = call.inputs
    call.inputs = call.inputs | call.outputs


def logits_in_an_input(call: Call) -> None:
    memory = torch.zeros(4 * SPEC.vocab_size)
    call.outputs["logits"] = memory.view(4, -1)
    call.inputs["cache_indirection"] = memory.view(torch.int32)[: 4 * 256].view(4, 1, 256)


def logits_in_the_pool(call: Call) -> None:
    call.outputs["logits"] = call.pool.view(-1)[: 4 * SPEC.vocab_size].view(4, -1)


def one_tensor_for_both_sides(call: Call) -> None:
    call.inputs["context_lengths"] = call.inputs["host_context_lengths"]


def host_tensor_in_the_pool(call: Call) -> None:
    sink = call.pool.view(torch.int32).view(-1)[:1]
    call.inputs["host_sink_token_length"] = sink.zero_()


def input_where_the_step_writes(call: Call) -> None:
    """Block 22 is the one that the second request's chunk goes to."""
    memory = call.pool[22].view(torch.int32).view(-1)[:4]
    call.inputs["sequence_length"] = memory.copy_(call.inputs["sequence_length"])


def one_token_more(call: Call) -> None:
    for name in ("input_ids", "position_ids"):
        call.inputs[name] = torch.cat([call.inputs[name], call.inputs[name][-1:]])


def second_block_for_the_pool(call: Call) -> None:
    call.inputs["host_kv_cache_pool_pointers"][0, 0] = call.pool[1].data_ptr()


def freed_pool(call: Call) -> None:
    call.run()
    del call.pool


def second_pool(call: Call) -> None:
    pointers = call.inputs["host_kv_cache_pool_pointers"]
    call.inputs["host_kv_cache_pool_pointers"] = torch.cat([pointers, pointers])
    for name in (OFFSETS, f"host_{OFFSETS}"):
        call.inputs[name] = torch.cat([call.inputs[name], call.inputs[name]])


def offsets_that_name_the_layer(call: Call) -> None:
    for name in (OFFSETS, f"host_{OFFSETS}"):
        call.inputs[name] += 2


def plain_block_ids(call: Call) -> None:
    for name in (OFFSETS, f"host_{OFFSETS}"):
        call.inputs[name] //= 2 * SPEC.num_layers


def keys_for_values(call: Call) -> None:
    for name in (OFFSETS, f"host_{OFFSETS}"):
        call.inputs[name][:, :, 1] = call.inputs[name][:, :, 0]


def short_tables(call: Call) -> None:
    for name in (OFFSETS, f"host_{OFFSETS}"):
        call.inputs[name] = call.inputs[name][..., :3].contiguous()


def dropped_buffers(call: Call) -> None:
    call.buffers.clear()


@dataclass(frozen=True)
class BadCall:
    name: str
    rule: Rule
    change: Change
    spec: EngineSpec = field(default=SPEC)


TWO_RANKS = fake_spec(tp_size=2)
LONG = SPEC.max_seq_len + 1

BAD_CALLS = [
    BadCall("no stream", Rule.STREAM, on(None)),
    BadCall("a flag for a stream", Rule.STREAM, on(stream=True)),
    BadCall("an input too many", Rule.UNKNOWN_TENSOR, rename("input_ids", "host_input_ids")),
    BadCall("an output too many", Rule.UNKNOWN_TENSOR, lambda c: c.outputs.update(hidden=c.pool)),
    BadCall("an output as input", Rule.UNKNOWN_TENSOR, logits_among_the_inputs),
    BadCall("no output", Rule.MISSING_TENSOR, drop_logits),
    BadCall("an address", Rule.TENSOR, bind_unseen("input_ids", torch.Tensor.data_ptr)),
    BadCall("an array", Rule.TENSOR, bind_unseen("input_ids", torch.Tensor.numpy)),
    BadCall("another device", Rule.TENSOR, bind("input_ids", lambda t: t.to("meta"))),
    BadCall("strides", Rule.TENSOR, bind("input_ids", lambda t: t.repeat_interleave(2)[::2])),
    BadCall("int64 tokens", Rule.DTYPE, bind("input_ids", torch.Tensor.long)),
    BadCall("int32 pointers", Rule.DTYPE, bind("host_kv_cache_pool_pointers", torch.Tensor.int)),
    BadCall("half logits", Rule.DTYPE, bind_logits(torch.empty(4, 512, dtype=torch.float16))),
    BadCall(
        "shapes of the step before", Rule.STALE_SHAPE, bind_unseen("input_ids", lambda t: t[:-1])
    ),
    BadCall("fewer positions than tokens", Rule.SYMBOLS, bind("position_ids", lambda t: t[:-1])),
    BadCall(
        "fewer lengths than sequences", Rule.SYMBOLS, bind("sequence_length", lambda t: t[:-1])
    ),
    BadCall(
        "tables of two widths",
        Rule.SYMBOLS,
        bind(OFFSETS, lambda t: t[..., :-1].contiguous()),
    ),
    BadCall(
        "cache_indirection for some sequences",
        Rule.SYMBOLS,
        bind("cache_indirection", lambda t: t[:-1]),
    ),
    BadCall("too few rows of logits", Rule.ROOM, bind_logits(torch.empty(3, 512))),
    BadCall("too narrow logits", Rule.ROOM, bind_logits(torch.empty(4, 511))),
    BadCall("logits in an input", Rule.OUTPUT_OVERLAP, logits_in_an_input),
    BadCall("logits in the pool", Rule.OUTPUT_OVERLAP, logits_in_the_pool),
    BadCall("one tensor for both sides", Rule.PLACEMENT, one_tensor_for_both_sides),
    BadCall("a host tensor in the pool", Rule.PLACEMENT, host_tensor_in_the_pool),
    BadCall("an input that the step writes to", Rule.INPUT_CHANGED, input_where_the_step_writes),
    BadCall("other lengths on the device", Rule.DEVICE_COPY, put("context_lengths", 0, 5)),
    BadCall("other offsets on the device", Rule.DEVICE_COPY, put(OFFSETS, (0, 0, 0, 0), 0)),
    BadCall("a third request type", Rule.REQUEST_TYPES, put("host_request_types", 3, 2)),
    BadCall(
        "a context behind a generation",
        Rule.CONTEXT_FIRST,
        put("host_request_types", slice(None), torch.tensor([0, 1, 0, 1])),
    ),
    BadCall("an empty chunk", Rule.CONTEXT_LENGTH, put_both("context_lengths", 0, 0)),
    BadCall(
        "a generation without a prompt", Rule.CONTEXT_LENGTH, put_both("context_lengths", 3, 0)
    ),
    BadCall("a token too many", Rule.NUM_TOKENS, one_token_more),
    BadCall("a chunk as long as its prompt", Rule.NUM_TOKENS, put_both("context_lengths", 0, 10)),
    BadCall("a row too few", Rule.NUM_TOKENS, bind("last_token_ids", lambda t: t[:-1])),
    BadCall("exclusive sums", Rule.LAST_TOKEN_IDS, bind("last_token_ids", lambda t: t - 1)),
    BadCall("a chunk's own length", Rule.LAST_TOKEN_IDS, put("last_token_ids", 1, 3)),
    BadCall("a context shorter than its chunk", Rule.SEQUENCE_LENGTH, put("sequence_length", 0, 5)),
    BadCall("a generation of its prompt", Rule.SEQUENCE_LENGTH, put("sequence_length", 3, 3)),
    BadCall("a sequence too long", Rule.SEQUENCE_LENGTH, put("sequence_length", 2, LONG)),
    BadCall("a chunk's beginning", Rule.PAST_LENGTH, put("host_past_key_value_lengths", 1, 8)),
    BadCall(
        "a generation's own token", Rule.PAST_LENGTH, put("host_past_key_value_lengths", 2, 13)
    ),
    BadCall(
        "chunks without paged context attention",
        Rule.PAGED_CONTEXT,
        lambda _: None,
        replace(SPEC, use_paged_context_fmha=False),
    ),
    BadCall(
        "a chunk's positions from 0",
        Rule.POSITION_IDS,
        put("position_ids", slice(6, 9), torch.arange(3)),
    ),
    BadCall("a generation's next position", Rule.POSITION_IDS, put("position_ids", 9, 13)),
    BadCall("a negative token", Rule.TOKEN_IDS, put("input_ids", 0, -1)),
    BadCall("a token behind the vocabulary", Rule.TOKEN_IDS, put("input_ids", 9, 512)),
    BadCall("a secondary pool", Rule.POOL_POINTERS, put("host_kv_cache_pool_pointers", (0, 1), 64)),
    BadCall("a null pool", Rule.POOL_POINTERS, put("host_kv_cache_pool_pointers", (0, 0), 0)),
    BadCall("a pool from its second block", Rule.POOL_POINTERS, second_block_for_the_pool),
    BadCall("a freed pool", Rule.POOL_POINTERS, freed_pool),
    BadCall("a pool twice", Rule.POOL_POINTERS, second_pool),
    BadCall("another pool", Rule.POOL_MAPPING, put("host_kv_cache_pool_mapping", (1, 0), 1)),
    BadCall("another layer", Rule.POOL_MAPPING, put("host_kv_cache_pool_mapping", (2, 1), 1)),
    BadCall("short tables", Rule.NUM_BLOCKS, short_tables),
    BadCall("a block on the host", Rule.SECONDARY_POOL, put_both(OFFSETS, (0, 3, 0, 0), -(2**31))),
    BadCall("no block", Rule.SECONDARY_POOL, put_both(OFFSETS, (0, 0, 0, 20), -1)),
    BadCall("offsets with the layer", Rule.KEY_OFFSET, offsets_that_name_the_layer),
    BadCall("plain block ids", Rule.KEY_OFFSET, plain_block_ids),
    BadCall("K for V", Rule.VALUE_OFFSET, keys_for_values),
    BadCall("a block behind the pool", Rule.BLOCK_RANGE, put_block(3, 0, 64)),
    BadCall("half a block behind", Rule.UNUSED_OFFSET, put_both(OFFSETS, (0, 0, 0, 20), 3)),
    BadCall("a V without its K", Rule.UNUSED_OFFSET, put_both(OFFSETS, (0, 3, 1, 1), 6)),
    BadCall("a block twice", Rule.REPEATED_BLOCK, put_block(0, 1, 10)),
    BadCall("two writers", Rule.WRITTEN_BLOCK, put_block(3, 0, 31)),
    BadCall("a writer beside a reader", Rule.WRITTEN_BLOCK, put_block(2, 1, 22)),
    BadCall("a reader beside a writer", Rule.WRITTEN_BLOCK, put_block(3, 0, 20)),
    BadCall(
        "a block at another place",
        Rule.SHARED_BLOCK,
        all_of(put_block(2, 0, 21), put_block(2, 1, 20)),
    ),
    BadCall("a narrow window", Rule.WINDOW, put("host_max_attention_window_sizes", 1, 12)),
    BadCall("beams", Rule.CACHE_INDIRECTION, put("cache_indirection", (1, 0, 3), 1)),
    BadCall(
        "cache_indirection narrower than the window",
        Rule.CACHE_INDIRECTION,
        bind("cache_indirection", lambda t: t[..., :200].contiguous()),
    ),
    BadCall("a sink token", Rule.SINK, put("host_sink_token_length", 0, 1)),
    BadCall("an odd knob", Rule.PERF_KNOBS, put("host_runtime_perf_knobs", 0, 2)),
    BadCall("a third knob", Rule.PERF_KNOBS, put("host_runtime_perf_knobs", 2, 1)),
    BadCall("a progress pointer", Rule.CONTEXT_PROGRESS, put("host_context_progress", 0, 64)),
    BadCall(
        "no workspace",
        Rule.ALL_REDUCE,
        bind("all_reduce_workspace", torch.zeros_like),
        TWO_RANKS,
    ),
    BadCall("freed buffers", Rule.ALL_REDUCE, dropped_buffers, TWO_RANKS),
]
