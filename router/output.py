"""Turns a sequence's token events into text and tool calls: stop strings, log-probabilities,
finish reason."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from orchestrator.core.ports import TokenLogprobs
from orchestrator.core.request import FinishReason
from orchestrator.wire import TokenEvent
from router.detokenizer import IncrementalDetokenizer
from router.tokenizer import Tokenizer
from router.tool_parser import CallPiece, Item, ToolCallParser

AnswerEnd = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class OutputLogprob:
    """Log-probabilities of one output token."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token_id, logprob), most likely first."""

    text_offset: int
    """Characters of the output before the one in which this token begins."""


class OutputDelta(msgspec.Struct, frozen=True):
    """What one token event adds to an answer; it may be nothing.

    A struct, since there is one for each token: making one costs a tenth of a frozen dataclass.
    """

    text: str
    num_new_tokens: int
    """Tokens received, up to the one that completes a stop string; the end token counts."""

    logprobs: tuple[OutputLogprob, ...]
    finish_reason: AnswerEnd | None
    calls: tuple[CallPiece, ...] = ()
    """What comes behind the text."""


class Assembler(Protocol):
    """Follows one sequence."""

    def add_all(self, events: Iterable[TokenEvent]) -> list[OutputDelta]:
        """Return what events add, at least one delta, up to the first that finishes the answer."""
        ...


class OutputAssembler:
    """Follows one sequence, all of which is text.

    A token's log-probabilities go out with the text in which it begins, so tokens of a stop
    string or of the model's end have none.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Collection[str], stop_token_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer, stop=list(stop))
        self._stop_token_ids = frozenset(stop_token_ids)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_decoded_characters = 0
        self._num_sent_characters = 0
        self._waiting: deque[OutputLogprob] = deque()

    def add_all(self, events: Iterable[TokenEvent]) -> list[OutputDelta]:
        """Return what each of `events` adds, up to the first that finishes the text."""
        deltas = []
        for event in events:
            delta = self._add_plain(event) or self.add(event)
            deltas.append(delta)
            if delta.finish_reason is not None:
                break
        return deltas

    def _add_plain(self, event: TokenEvent) -> OutputDelta | None:
        """Return what `add` would for a single token in the middle of an answer, sooner; None for
        other events."""
        token_ids = event.new_token_ids
        if event.finish_reason is not None or event.logprobs or len(token_ids) != 1:
            return None
        text = self._detokenizer.add_one(token_ids[0])
        self._num_sent_characters += len(text)
        logprobs = self._take(everything=False) if self._waiting else ()
        has_stopped = self._detokenizer.stopped_on is not None
        return OutputDelta(text, 1, logprobs, "stop" if has_stopped else None)

    def add(self, event: TokenEvent) -> OutputDelta:
        """Return what `event` adds. After a finish reason nothing more may be added."""
        pieces: list[str] = []
        num_new_tokens = 0
        finish_reason: AnswerEnd | None = None
        for position, token_id in enumerate(event.new_token_ids):
            num_new_tokens += 1
            is_last = position + 1 == len(event.new_token_ids)
            is_final = is_last and event.finish_reason is FinishReason.STOP
            if is_final and token_id in self._stop_token_ids:
                break  # The end itself is not part of the text.
            if event.logprobs:
                self._note(token_id, event.logprobs[position])
            pieces.append(self._detokenizer.add([token_id]))
            if self._detokenizer.stopped_on is not None:
                finish_reason = "stop"
                break
        if finish_reason is None and event.finish_reason is not None:
            pieces.append(self._detokenizer.finish())
            has_stopped = self._detokenizer.stopped_on is not None
            is_length = event.finish_reason is FinishReason.LENGTH and not has_stopped
            finish_reason = "length" if is_length else "stop"
        text = "".join(pieces)
        self._num_sent_characters += len(text)
        logprobs = self._take(everything=finish_reason == "length")
        return OutputDelta(text, num_new_tokens, logprobs, finish_reason)

    def _note(self, token_id: int, found: TokenLogprobs) -> None:
        self._waiting.append(
            OutputLogprob(token_id, found.token_logprob, found.top, self._num_decoded_characters)
        )
        if not self._tokenizer.is_special(token_id):
            text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
            self._num_decoded_characters += len(text)

    def _take(self, *, everything: bool) -> tuple[OutputLogprob, ...]:
        taken = []
        while self._waiting and (
            everything or self._waiting[0].text_offset < self._num_sent_characters
        ):
            taken.append(self._waiting.popleft())
        return tuple(taken)


class ToolCallAssembler:
    """Follows one sequence that may call functions.

    The answer ends when its last call is complete, even if the model would go on. Its calls are
    read from the text behind stop strings. Log-probabilities are those of all tokens, in the first
    delta that their text has become a part of.
    """

    def __init__(self, assembler: OutputAssembler, parser: ToolCallParser) -> None:
        self._assembler = assembler
        self._parser = parser

    def add_all(self, events: Iterable[TokenEvent]) -> list[OutputDelta]:
        """Return what each of `events` adds, up to the first that finishes the answer."""
        deltas: list[OutputDelta] = []
        for event in events:
            deltas += self._read(self._assembler.add(event))
            if deltas[-1].finish_reason is not None:
                break
        return deltas

    def _read(self, delta: OutputDelta) -> list[OutputDelta]:
        items = self._parser.add(delta.text)
        finish_reason = delta.finish_reason
        if finish_reason is not None:
            items += self._parser.finish()
        has_called = self._parser.num_calls > 0 and not self._parser.is_in_arguments
        if self._parser.is_done or (finish_reason == "stop" and has_called):
            finish_reason = "tool_calls"
        first, *others = [
            OutputDelta(text, 0, (), None, calls) for text, calls in _texts_and_calls(items)
        ]
        deltas = [
            msgspec.structs.replace(
                first, num_new_tokens=delta.num_new_tokens, logprobs=delta.logprobs
            ),
            *others,
        ]
        deltas[-1] = msgspec.structs.replace(deltas[-1], finish_reason=finish_reason)
        return deltas


def _texts_and_calls(items: Iterable[Item]) -> list[tuple[str, tuple[CallPiece, ...]]]:
    """Return items as pairs of a text and the pieces behind it, at least one."""
    found: list[tuple[str, tuple[CallPiece, ...]]] = [("", ())]
    for item in items:
        text, calls = found[-1]
        if isinstance(item, CallPiece):
            found[-1] = (text, (*calls, item))
        elif calls:
            found.append((item, ()))
        else:
            found[-1] = (text + item, ())
    return found
