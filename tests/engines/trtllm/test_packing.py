"""The in-flight batch as exact tables. Blocks hold 4 tokens; a layer's K of one is one piece, so
that with 3 layers block b begins at piece 6 b."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engines.kv_pool import KVLayout
from engines.trtllm.packing import CONTEXT, GENERATION, PackedStep, pack_step
from orchestrator.core.ports import ScheduledRequest
from tests.factories import make_request

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, block_size_tokens=4, head_dim=8)
MAX_BLOCKS_PER_SEQ = 5
SURFACE = Path(__file__).parents[2] / "trtllm/api_surface.json"


def part(
    name: str,
    *,
    prompt: int,
    outputs: int = 0,
    computed: int = 0,
    new: int,
    blocks: tuple[int, ...] = (0, 1, 2, 3),
) -> ScheduledRequest:
    """Tokens of the prompt are 100, 101, ...; outputs 0, 1, ..."""
    request = make_request(
        name, prompt_token_ids=range(100, 100 + prompt), num_output_tokens=outputs
    )
    return ScheduledRequest(request, computed, new, blocks)


def pack(*parts: ScheduledRequest) -> PackedStep:
    return pack_step(parts, LAYOUT, max_blocks_per_seq=MAX_BLOCKS_PER_SEQ)


def rows(packed: PackedStep) -> list[dict[str, object]]:
    """Return the batch sequence by sequence, as a reader of the arrays would split it."""
    arrays = packed.arrays
    ends = arrays.last_token_ids.tolist()
    return [
        {
            "name": sequence.request_id,
            "ids": arrays.input_ids[start:end].tolist(),
            "positions": arrays.position_ids[start:end].tolist(),
            "context": context,
            "length": length,
            "past": past,
            "type": kind,
        }
        for sequence, start, end, context, length, past, kind in zip(
            packed.sequences,
            [0, *ends[:-1]],
            ends,
            arrays.context_lengths.tolist(),
            arrays.sequence_length.tolist(),
            arrays.host_past_key_value_lengths.tolist(),
            arrays.host_request_types.tolist(),
            strict=True,
        )
    ]


def row(
    ids: list[int], positions: list[int], *, context: int, length: int, past: int, kind: int
) -> dict[str, object]:
    return {
        "name": "r",
        "ids": ids,
        "positions": positions,
        "context": context,
        "length": length,
        "past": past,
        "type": kind,
    }


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        pytest.param(
            part("r", prompt=3, new=3),
            row([100, 101, 102], [0, 1, 2], context=3, length=3, past=3, kind=CONTEXT),
            id="a whole prompt",
        ),
        pytest.param(
            part("r", prompt=1, new=1),
            row([100], [0], context=1, length=1, past=1, kind=CONTEXT),
            id="a prompt of one token",
        ),
        pytest.param(
            part("r", prompt=9, new=4),
            row([100, 101, 102, 103], [0, 1, 2, 3], context=4, length=4, past=4, kind=CONTEXT),
            id="a first chunk",
        ),
        pytest.param(
            part("r", prompt=9, computed=4, new=2),
            row([104, 105], [4, 5], context=2, length=6, past=6, kind=CONTEXT),
            id="a chunk in the middle",
        ),
        pytest.param(
            part("r", prompt=9, computed=4, new=1),
            row([104], [4], context=1, length=5, past=5, kind=CONTEXT),
            id="a chunk of one token in the middle",
        ),
        pytest.param(
            part("r", prompt=9, computed=8, new=1),
            row([108], [8], context=1, length=9, past=9, kind=CONTEXT),
            id="a last chunk of one token, after earlier chunks or a shared beginning",
        ),
        pytest.param(
            part("r", prompt=9, outputs=1, computed=9, new=1),
            row([0], [9], context=9, length=10, past=9, kind=GENERATION),
            id="the first decode",
        ),
        pytest.param(
            part("r", prompt=1, outputs=1, computed=1, new=1),
            row([0], [1], context=1, length=2, past=1, kind=GENERATION),
            id="the first decode after a prompt of one token",
        ),
        pytest.param(
            part("r", prompt=9, outputs=4, computed=12, new=1),
            row([3], [12], context=9, length=13, past=12, kind=GENERATION),
            id="a later decode, or one that goes on after all its 12 tokens came from the host",
        ),
        pytest.param(
            part("r", prompt=3, outputs=3, new=6),
            row(
                [100, 101, 102, 0, 1, 2],
                [0, 1, 2, 3, 4, 5],
                context=6, length=6, past=6, kind=CONTEXT,
            ),
            id="prompt and output computed again at once",
        ),
        pytest.param(
            part("r", prompt=3, outputs=6, computed=4, new=2),
            row([1, 2], [4, 5], context=2, length=6, past=6, kind=CONTEXT),
            id="a chunk of output computed again",
        ),
        pytest.param(
            part("r", prompt=3, outputs=6, computed=4, new=1),
            row([1], [4], context=1, length=5, past=5, kind=CONTEXT),
            id="a chunk of one token of output computed again: not the request's last",
        ),
        pytest.param(
            part("r", prompt=3, outputs=6, computed=4, new=5),
            row([1, 2, 3, 4, 5], [4, 5, 6, 7, 8], context=5, length=9, past=9, kind=CONTEXT),
            id="the rest of the output computed again behind blocks from the host",
        ),
        pytest.param(
            part("r", prompt=3, outputs=6, computed=8, new=1),
            row([5], [8], context=3, length=9, past=8, kind=GENERATION),
            id="one token left after output was computed again: the state of any decode",
        ),
        pytest.param(
            part("r", prompt=5, outputs=3, computed=4, new=1),
            row([104], [4], context=1, length=5, past=5, kind=CONTEXT),
            id="the prompt's last token computed again, its output still to come",
        ),
        pytest.param(
            part("r", prompt=4, outputs=1, computed=3, new=2),
            row([103, 0], [3, 4], context=2, length=5, past=5, kind=CONTEXT),
            id="a chunk across the end of the prompt",
        ),
    ],
)  # fmt: skip
def test_a_sequence_alone(only: ScheduledRequest, expected: dict[str, object]) -> None:
    assert rows(pack(only)) == [expected]


def test_contexts_come_first_and_both_kinds_keep_their_order() -> None:
    packed = pack(
        part("d1", prompt=2, outputs=3, computed=4, new=1),
        part("p1", prompt=6, computed=4, new=2),
        part("d2", prompt=7, outputs=1, computed=7, new=1),
        part("p2", prompt=3, new=3),
        part("p3", prompt=1, new=1),
    )

    assert [sequence.request_id for sequence in packed.sequences] == ["p1", "p2", "p3", "d1", "d2"]
    arrays = packed.arrays
    assert arrays.input_ids.tolist() == [104, 105, 100, 101, 102, 100, 2, 0]
    assert arrays.position_ids.tolist() == [4, 5, 0, 1, 2, 0, 4, 7]
    assert arrays.last_token_ids.tolist() == [2, 5, 6, 7, 8]
    assert arrays.context_lengths.tolist() == [2, 3, 1, 2, 7]
    assert arrays.sequence_length.tolist() == [6, 3, 1, 5, 8]
    assert arrays.host_past_key_value_lengths.tolist() == [6, 3, 1, 4, 7]
    assert arrays.host_request_types.tolist() == [0, 0, 0, 1, 1]


def test_block_tables_follow_the_batch_and_hold_what_the_step_needs() -> None:
    """d has 5 tokens in two of its three blocks, p has 4 in one. 7 x 6 = 42."""
    packed = pack(
        part("d", prompt=2, outputs=3, computed=4, new=1, blocks=(7, 2, 9)),
        part("p", prompt=9, new=4, blocks=(5, 0, 1)),
    )

    assert packed.arrays.kv_cache_block_offsets.tolist() == [
        [
            [[30, 0, 0, 0, 0], [31, 0, 0, 0, 0]],
            [[42, 12, 0, 0, 0], [43, 13, 0, 0, 0]],
        ]
    ]


def test_a_sequence_may_fill_its_whole_table() -> None:
    packed = pack(part("r", prompt=20, new=20, blocks=(1, 2, 3, 4, 5)))

    assert packed.arrays.kv_cache_block_offsets[0, 0].tolist() == [
        [6, 12, 18, 24, 30],
        [7, 13, 19, 25, 31],
    ]


def test_nothing_is_lost_when_arrays_are_narrowed_to_be_sent() -> None:
    """The longest sequence has three blocks, the last of them block 0, whose K has offset 0."""
    arrays = pack(
        part("r", prompt=12, new=12, blocks=(5, 3, 0)), part("s", prompt=3, new=3, blocks=(7,))
    ).arrays

    narrow = arrays.narrowed()

    assert narrow.arrays.kv_cache_block_offsets.shape == (1, 2, 2, 3)
    for name, array in narrow.widened().by_name().items():
        np.testing.assert_array_equal(array, arrays.by_name()[name])


def test_all_arrays_are_32_bit_and_contiguous() -> None:
    """The engine is given addresses, not arrays."""
    arrays = pack(part("p", prompt=3, new=3), part("d", prompt=2, outputs=1, computed=2, new=1))

    for name, array in arrays.arrays.by_name().items():
        assert array.dtype == np.int32, name
        assert array.flags.c_contiguous, name


def test_arrays_have_names_and_types_of_the_recorded_surface() -> None:
    inputs = json.loads(SURFACE.read_text())["engine_io"]["inputs"]
    recorded = {entry["name"]: (entry["dtype"], len(entry["shape"])) for entry in inputs}

    for name, array in pack(part("r", prompt=3, new=3)).arrays.by_name().items():
        assert (str(array.dtype), array.ndim) == recorded[name]
