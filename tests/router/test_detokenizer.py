"""The pieces of a stream are the whole text, and never more than is certain."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.core.errors import RequestRejected
from router.detokenizer import IncrementalDetokenizer
from router.tokenizer import Tokenizer
from tests.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_engine_dir(write_tiny_tokenizer(tmp_path_factory.mktemp("engine")))


# Any ids at all: mostly not UTF-8, some special, some that no token has.
any_ids = st.lists(st.integers(0, 430), max_size=40)
# Few letters, so that stop strings occur, overlap and almost occur.
dense_texts = st.text("ab東🙂\ufffd", max_size=30)
stop_lists = st.lists(st.text("ab東🙂\ufffd", min_size=1, max_size=5), max_size=3)


def first_stop(text: str, stop: list[str]) -> str | None:
    """Return the stop string whose first occurrence ends first, the longest of several."""
    ends = [(text.find(each) + len(each), -len(each), each) for each in stop if each in text]
    return min(ends)[2] if ends else None


def in_chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, position = [], 0
    for size in sizes:
        chunks.append(ids[position : position + size])
        position += size
    return [*chunks, ids[position:]]


@settings(deadline=None, max_examples=300)
@given(
    ids=any_ids,
    text=dense_texts,
    stop=stop_lists,
    sizes=st.lists(st.integers(0, 5)),
    include_stop=st.booleans(),
)
@example(ids=[], text="aab", stop=["aaa", "ab"], sizes=[1, 1], include_stop=False)
def test_pieces_together_are_the_decoded_text_cut_at_the_first_stop_string(
    tokenizer: Tokenizer,
    ids: list[int],
    text: str,
    stop: list[str],
    sizes: list[int],
    *,
    include_stop: bool,
) -> None:
    ids = ids + tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    detokenizer = IncrementalDetokenizer(tokenizer, stop, include_stop=include_stop)

    streamed = ""
    for chunk in in_chunks(ids, sizes):
        streamed += detokenizer.add(chunk)
    streamed += detokenizer.finish()

    found = first_stop(whole, stop)
    if found is None:
        expected = whole
    else:
        expected = whole[: whole.find(found) + (len(found) if include_stop else 0)]
    assert streamed == expected
    assert detokenizer.stopped_on == found


# A decode of half a character shows U+FFFD where a stream still waits.
unbroken = st.text("ab東🙂", max_size=30)


@settings(deadline=None)
@given(text=unbroken, stop=st.lists(st.text("ab東🙂", min_size=1, max_size=5), max_size=3))
def test_consumed_tokens_end_with_the_one_that_completes_the_stop_string(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, stop)

    detokenizer.add(ids)

    assert detokenizer.num_tokens == next(
        (n for n in range(len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stop)),
        len(ids),
    )


@settings(deadline=None)
@given(text=dense_texts, stop=stop_lists)
def test_what_was_sent_is_final_and_what_is_held_might_be_a_stop_string(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    """At each token: the valid text so far, less its longest end that begins a stop string."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, stop)
    sent = ""
    for position, token_id in enumerate(ids):
        sent += detokenizer.add([token_id])
        if detokenizer.stopped_on is not None:
            return
        valid = b"".join(map(tokenizer.token_bytes, ids[: position + 1])).decode("utf-8", "ignore")
        num_held = max((n for s in stop for n in range(len(s)) if valid.endswith(s[:n])), default=0)

        assert sent == valid[: len(valid) - num_held]


def test_a_character_is_sent_when_its_last_byte_comes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ф", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(tokenizer, [])

    pieces = [detokenizer.add([token_id]) for token_id in ids]

    assert pieces == [*[""] * (len(ids) - 1), "ф"]


def test_an_unfinished_character_is_flushed_as_in_a_full_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("aф", add_special_tokens=False)[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer, [])

    assert detokenizer.add(ids) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert tokenizer.decode(ids) == "a\ufffd"


def test_the_longest_of_stop_strings_that_end_together_is_cut(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, ["D", "END", "ND"])

    assert detokenizer.add(tokenizer.encode("the END", add_special_tokens=False)) == "the "
    assert detokenizer.stopped_on == "END"


def test_nothing_comes_after_a_stop_string(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, ["fox"])
    detokenizer.add(tokenizer.encode("the fox", add_special_tokens=False))
    num_tokens = detokenizer.num_tokens

    assert detokenizer.add(tokenizer.encode(" jumps", add_special_tokens=False)) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.num_tokens == num_tokens


def test_special_tokens_are_left_out_even_inside_a_stop_string(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the f<|im_start|>ox", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, ["fox"])

    assert detokenizer.add(ids) == "the "
    assert detokenizer.stopped_on == "fox"
    assert detokenizer.num_tokens == len(ids)


def test_an_empty_stop_string_is_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestRejected, match="empty") as caught:
        IncrementalDetokenizer(tokenizer, ["a", ""])

    assert caught.value.field == "stop"


def test_a_long_stop_string_costs_no_more_per_character(tokenizer: Tokenizer) -> None:
    """20,000 tokens against a stop string that almost matches all along."""
    stop = "a" * 5_000 + "b"
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, [stop])

    sent = "".join(detokenizer.add([a]) for _ in range(20_000)) + detokenizer.finish()

    assert sent == "a" * 20_000
