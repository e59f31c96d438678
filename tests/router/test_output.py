from __future__ import annotations

from collections.abc import Sequence

import pytest

from orchestrator.core.ports import TokenLogprobs
from orchestrator.core.request import FinishReason
from orchestrator.wire import TokenEvent
from router.output import OutputAssembler, OutputDelta
from router.tokenizer import Tokenizer


def run(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    *,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    finish: FinishReason = FinishReason.STOP,
    tokens_per_event: int = 1,
) -> list[OutputDelta]:
    """Feed these tokens, each with log-probability -1, until the assembler is finished."""
    assembler = OutputAssembler(tokenizer, stop=stop, stop_token_ids=stop_token_ids)
    deltas: list[OutputDelta] = []
    for start in range(0, len(token_ids), tokens_per_event):
        piece = tuple(token_ids[start : start + tokens_per_event])
        is_last = start + tokens_per_event >= len(token_ids)
        event = TokenEvent(
            new_token_ids=piece,
            logprobs=tuple(TokenLogprobs(-1.0, ()) for _ in piece),
            finish_reason=finish if is_last else None,
        )
        deltas.append(assembler.add(event))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def bytes_as_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return tokens of one byte each."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in text.encode()]


def test_a_character_is_never_sent_in_halves(tokenizer: Tokenizer) -> None:
    """Four bytes, four tokens: three that say nothing, one that says it all."""
    deltas = run(tokenizer, bytes_as_tokens(tokenizer, "🙂"), finish=FinishReason.LENGTH)

    assert [d.text for d in deltas] == ["", "", "", "🙂"]


def test_logprobs_go_out_with_the_text_in_which_their_token_begins(tokenizer: Tokenizer) -> None:
    deltas = run(tokenizer, bytes_as_tokens(tokenizer, "é!"), finish=FinishReason.LENGTH)

    assert [len(d.logprobs) for d in deltas] == [0, 2, 1]
    assert [entry.text_offset for d in deltas for entry in d.logprobs] == [0, 0, 1]


@pytest.mark.parametrize("tokens_per_event", [1, 2, 3, 100])
def test_a_stop_string_ends_the_text_however_tokens_are_grouped(
    tokenizer: Tokenizer, tokens_per_event: int
) -> None:
    tokens = bytes_as_tokens(tokenizer, "one STOP two")

    deltas = run(tokenizer, tokens, stop=["STOP"], tokens_per_event=tokens_per_event)

    assert "".join(d.text for d in deltas) == "one "
    assert deltas[-1].finish_reason == "stop"


def test_tokens_of_a_stop_string_have_no_logprobs(tokenizer: Tokenizer) -> None:
    deltas = run(tokenizer, bytes_as_tokens(tokenizer, "abSTOP"), stop=["STOP"])

    assert sum(len(d.logprobs) for d in deltas) == 2


def test_tokens_after_a_stop_string_do_not_count(tokenizer: Tokenizer) -> None:
    """`aX` are two tokens; the three behind them came in the same event and are not used."""
    assembler = OutputAssembler(tokenizer, stop=["X"], stop_token_ids=())

    delta = assembler.add(TokenEvent(new_token_ids=tuple(bytes_as_tokens(tokenizer, "aXbcd"))))

    assert delta.num_new_tokens == 2


def test_text_that_might_have_become_a_stop_string_is_sent_at_the_end(
    tokenizer: Tokenizer,
) -> None:
    deltas = run(
        tokenizer, bytes_as_tokens(tokenizer, "aST"), stop=["STOP"], finish=FinishReason.LENGTH
    )

    assert [d.text for d in deltas] == ["a", "", "ST"]
    assert [len(d.logprobs) for d in deltas] == [1, 0, 2]
    assert deltas[-1].finish_reason == "length"


def test_the_end_token_is_not_text(tokenizer: Tokenizer) -> None:
    tokens = bytes_as_tokens(tokenizer, "ab")
    end = bytes_as_tokens(tokenizer, ".")[0]

    deltas = run(tokenizer, [*tokens, end], stop_token_ids=[end])

    assert "".join(d.text for d in deltas) == "ab"
    assert sum(len(d.logprobs) for d in deltas) == 2
    assert deltas[-1].finish_reason == "stop"


def test_an_end_token_that_was_to_be_ignored_is_text(tokenizer: Tokenizer) -> None:
    tokens = bytes_as_tokens(tokenizer, "a.")

    deltas = run(tokenizer, tokens, stop_token_ids=[], finish=FinishReason.LENGTH)

    assert "".join(d.text for d in deltas) == "a."


def test_an_unfinished_character_at_the_end_becomes_a_replacement_mark(
    tokenizer: Tokenizer,
) -> None:
    tokens = bytes_as_tokens(tokenizer, "a🙂")[:-1]

    deltas = run(tokenizer, tokens, finish=FinishReason.LENGTH)

    assert "".join(d.text for d in deltas) == "a�"
