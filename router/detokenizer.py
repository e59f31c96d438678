"""The text of one sequence as its tokens arrive, cut at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from orchestrator.core.errors import RequestRejected
from router.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Returns each piece of text once it is final.

    The pieces together are `tokenizer.decode` of all tokens, cut at the first stop string,
    however the tokens are divided over calls. Held back until decided: bytes that may become a
    character, and text that may become a stop string. The work per character does not grow
    with the length of the sequence.

    The first stop string is the one that is complete first, as a reader of the stream would
    find it; of several that end together, the longest.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], *, include_stop: bool = False
    ) -> None:
        """Start a sequence; with `include_stop`, the stop string is part of the text.

        Raises:
            RequestRejected: a stop string is empty.
        """
        if "" in stop:
            raise RequestRejected("a stop string is empty; leave it out", field="stop")
        self._tokenizer = tokenizer
        self._include_stop = include_stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_StopMatcher(text) for text in stop]
        self._held = ""
        self._is_between_characters = not stop
        """Nothing is held back, and there is nothing to look for."""

        self.stopped_on: str | None = None
        """The stop string that ended the text."""

        self.num_tokens = 0
        """Tokens consumed; none is, after the one that completes a stop string."""

    def add_one(self, token_id: int) -> str:
        """Return the text that a token makes final, perhaps none."""
        if self._is_between_characters:
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                self.num_tokens += 1
                return text
        return self.add((token_id,))

    def add(self, token_ids: Iterable[int]) -> str:
        """Return the text that these tokens make final, perhaps none."""
        pieces = []
        for token_id in token_ids:
            if self.stopped_on is not None:
                break
            self.num_tokens += 1
            if not self._tokenizer.is_special(token_id):
                text = self._decoder.decode(self._tokenizer.token_bytes(token_id))
                pieces.append(self._until_stop(text))
        self._is_between_characters = not self._matchers and not self._decoder.getstate()[0]
        return "".join(pieces)

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD. No `add` follows."""
        if self.stopped_on is not None:
            return ""
        text = self._until_stop(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _until_stop(self, text: str) -> str:
        """Return the part of held and new text that no stop string can take any more."""
        if not self._matchers:
            return text
        pending = self._held + text
        for end in range(len(self._held) + 1, len(pending) + 1):
            complete = [m for m in self._matchers if m.advance(pending[end - 1])]
            if complete:
                self.stopped_on = max((m.text for m in complete), key=len)
                self._held = ""
                return pending[: end if self._include_stop else end - len(self.stopped_on)]
        num_held = max(m.num_matched for m in self._matchers)
        final, self._held = pending[: len(pending) - num_held], pending[len(pending) - num_held :]
        return final


class _StopMatcher:
    """Knows how much of a stop string the text so far ends with (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        # fallbacks[n]: the longest proper prefix of text[:n + 1] that also ends it.
        self._fallbacks = [0] * len(text)
        for position in range(1, len(text)):
            self._fallbacks[position] = self._extended(
                self._fallbacks[position - 1], text[position]
            )

    def advance(self, character: str) -> bool:
        """Take the next character; return whether the stop string is now complete."""
        self.num_matched = self._extended(self.num_matched, character)
        return self.num_matched == len(self.text)

    def _extended(self, num_matched: int, character: str) -> int:
        while num_matched and self.text[num_matched] != character:
            num_matched = self._fallbacks[num_matched - 1]
        return num_matched + (self.text[num_matched] == character)
