from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.torch_engine.packed_step import (
    HostBlockTables,
    StepUpload,
    decode_buckets,
    pack_decodes,
    pack_step,
)
from orchestrator.core.ports import ScheduledRequest
from tests.factories import make_request


def make_part(
    name: str, num_computed_tokens: int, num_new_tokens: int, blocks: list[int]
) -> ScheduledRequest:
    """The request's token at position i is 100 + i."""
    num_tokens = num_computed_tokens + num_new_tokens
    request = make_request(name, prompt_token_ids=[100 + i for i in range(num_tokens)])
    return ScheduledRequest(request, num_computed_tokens, num_new_tokens, blocks)


def make_tables(max_num_seqs: int = 4) -> HostBlockTables:
    return HostBlockTables(max_num_seqs, max_model_len=40, block_size_tokens=4)


@pytest.mark.parametrize(
    ("max_num_seqs", "buckets"),
    [
        (1, (1,)),
        (6, (1, 2, 4, 6)),
        (20, (1, 2, 4, 8, 16, 20)),
        (70, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 70)),
    ],
)
def test_buckets_end_with_the_largest_batch(max_num_seqs: int, buckets: tuple[int, ...]) -> None:
    assert decode_buckets(max_num_seqs) == buckets


def test_buckets_stop_where_graphs_gain_nothing() -> None:
    assert decode_buckets(5000)[-2:] == (224, 256)


def test_decodes_are_padded_by_rows_that_read_and_write_nothing() -> None:
    """Token 5 of `a` goes to place 1 of its second block, 4 * 7 + 1; `b` begins a block."""
    parts = [make_part("a", 5, 1, [9, 7]), make_part("b", 8, 1, [3, 4, 5])]

    step = pack_decodes(parts, make_tables(), bucket=4)

    assert step.token_ids.tolist() == [105, 108, 0, 0]
    assert step.positions.tolist() == [5, 8, 0, 0]
    assert step.slots.tolist() == [29, 20, -1, -1]
    assert step.context_lens.tolist() == [6, 9, 0, 0]
    assert step.table_starts.tolist() == [0, 3, 0, 0]
    assert step.tables.tolist() == [9, 7, 0, 3, 4, 5]


def test_pieces_follow_the_decodes_and_are_cut_into_tiles() -> None:
    """`p` computes tokens 6 to 10 in tiles of 3 and 2, `q` its first two in one."""
    parts = [make_part("d", 5, 1, [9, 7])]
    pieces = [make_part("p", 6, 5, [3, 4, 5]), make_part("q", 0, 2, [8])]

    step = pack_step(parts, pieces, make_tables(), sampled_rows=(0, 5), tile_queries=3)

    assert step.token_ids.tolist() == [105, 106, 107, 108, 109, 110, 100, 101]
    assert step.positions.tolist() == [5, 6, 7, 8, 9, 10, 0, 1]
    assert step.slots.tolist() == [29, 18, 19, 20, 21, 22, 32, 33]
    assert step.context_lens.tolist() == [6]
    assert step.tile_rows.tolist() == [1, 4, 6]
    assert step.tile_counts.tolist() == [3, 2, 2]
    assert step.tile_positions.tolist() == [6, 9, 0]
    assert step.tile_table_starts.tolist() == [3, 3, 6]
    assert step.tables.reshape(3, 3)[1].tolist() == [3, 4, 5]
    assert step.sampled_rows.tolist() == [0, 5]


def test_tables_grow_with_their_requests_and_forget_those_that_lost_their_blocks() -> None:
    """A preempted request comes back with other blocks, in another sequence."""
    tables = make_tables(max_num_seqs=2)
    blocks = [9, 7]
    assert tables.update([make_part("a", 7, 1, blocks)]).tolist() == [[9, 7]]
    blocks.append(2)

    assert tables.update([make_part("a", 8, 1, blocks)]).tolist() == [[9, 7, 2]]
    assert tables.update([make_part("a", 0, 5, [1, 6])]).tolist() == [[1, 6]]


def test_rows_of_tables_are_free_for_others_as_soon_as_a_request_is_left_out() -> None:
    tables = make_tables(max_num_seqs=2)
    first = [make_part("a", 0, 4, [1]), make_part("b", 0, 4, [2])]
    second = [make_part("c", 0, 4, [3]), make_part("b", 4, 1, [2, 4])]

    assert tables.update(first).tolist() == [[1], [2]]
    assert tables.update(second)[1].tolist() == [2, 4]
    assert tables.update(first).tolist() == [[1], [2]]


def test_steps_of_one_bucket_arrive_at_the_same_addresses() -> None:
    """A graph reads them there, whatever the lengths of the tables."""
    upload = StepUpload(100, torch.device("cpu"))
    tables = make_tables()
    empty = upload.upload(pack_decodes((), tables, bucket=4))

    views = upload.upload(pack_decodes([make_part("a", 5, 1, [9, 7])], tables, bucket=4))

    assert views["slots"].tolist() == [29, -1, -1, -1]
    assert views["tables"][:2].tolist() == [9, 7]
    for name in ("token_ids", "positions", "slots", "context_lens", "table_starts", "tables"):
        assert views[name].data_ptr() == empty[name].data_ptr()
        assert views[name].data_ptr() % 16 == empty["token_ids"].data_ptr() % 16
    assert np.array_equal(empty["slots"].numpy(), views["slots"].numpy())
