from __future__ import annotations

import pytest

from router.prefix_index import PrefixIndex, PrefixIndexOptions
from tests.router.fleets import make_routing_request

NODES = ("a", "b", "c")


def make_index(*, chunk_tokens: int = 4, max_chunks: int = 100) -> PrefixIndex:
    return PrefixIndex(PrefixIndexOptions(chunk_tokens=chunk_tokens, max_chunks=max_chunks))


def num_cached(
    index: PrefixIndex,
    tokens: range | list[int],
    *,
    cache_salt: str = "",
    endpoint_ids: tuple[str, ...] = NODES,
) -> list[float]:
    request = make_routing_request(prompt_token_ids=list(tokens), cache_salt=cache_salt)
    return list(index.num_cached(index.keys_of(request), endpoint_ids))


def note(
    index: PrefixIndex,
    tokens: range,
    row: int,
    *,
    cache_salt: str = "",
    endpoint_ids: tuple[str, ...] = NODES,
) -> None:
    """Send a prompt as policies do: they ask first."""
    num_cached(index, tokens, endpoint_ids=endpoint_ids)
    request = make_routing_request(prompt_token_ids=list(tokens), cache_salt=cache_salt)
    index.note(index.keys_of(request), endpoint_ids[row])


def test_each_node_has_the_beginning_that_it_was_sent() -> None:
    """Row 0 was sent 9 tokens and row 2 was sent 20; a prompt of 30 shares 8 and 16 of them."""
    index = make_index()
    note(index, range(9), 0)
    note(index, range(20), 2)

    assert num_cached(index, range(30)) == [8, 0, 16]


def test_the_last_token_is_always_computed() -> None:
    """The prompt's 8 tokens were sent, but the piece with the last one does not count."""
    index = make_index()
    note(index, range(20), 0)

    assert num_cached(index, range(8)) == [4, 0, 0]


def test_a_piece_counts_only_behind_equal_ones() -> None:
    index = make_index()
    note(index, range(20), 0)

    assert num_cached(index, [99, *range(1, 30)]) == [0, 0, 0]
    assert num_cached(index, [0, 1, 2, 3, 99, *range(5, 30)]) == [4, 0, 0]


def test_other_salts_share_nothing() -> None:
    index = make_index()
    note(index, range(20), 0, cache_salt="ada")

    assert num_cached(index, range(30), cache_salt="bob") == [0, 0, 0]
    assert num_cached(index, range(30), cache_salt="ada") == [16, 0, 0]


def test_what_was_not_seen_for_longest_is_forgotten_from_its_end() -> None:
    """Four pieces are remembered: the second prompt's three, and the first of the first one's."""
    index = make_index(max_chunks=4)
    note(index, range(13), 0)
    note(index, range(100, 113), 1)

    assert num_cached(index, range(100, 120)) == [0, 12, 0]
    assert num_cached(index, range(20)) == [4, 0, 0]


def test_more_nodes_than_a_machine_word_has_bits() -> None:
    index = make_index()
    nodes = tuple(f"node-{number:03d}" for number in range(131))
    note(index, range(9), 130, endpoint_ids=nodes)
    note(index, range(5), 7, endpoint_ids=nodes)

    counts = num_cached(index, range(30), endpoint_ids=nodes)

    assert {row: count for row, count in enumerate(counts) if count} == {7: 4, 130: 8}


def test_what_nodes_were_sent_follows_them_when_others_come_and_go() -> None:
    """Of a, b and c only c stays, behind two new ones, which have been sent nothing."""
    index = make_index()
    note(index, range(9), 0)
    note(index, range(20), 2)

    assert num_cached(index, range(30), endpoint_ids=("aa", "bb", "c")) == [0, 0, 16]
    assert num_cached(index, range(30)) == [0, 0, 16], "a was away"


@pytest.mark.parametrize("name", ["chunk_tokens", "max_chunks"])
def test_impossible_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, it must be at least 1"):
        PrefixIndexOptions(**{name: 0})
