"""Finds the tool calls in the text of an answer as it arrives. Pure.

What becomes of a text does not depend on how it is divided over calls of `add`:

- Text outside of calls is content. White space before and between calls is left out.
- A call to a known function is delivered from its name on, while it is written. What the model
  writes as its arguments is passed on as it is, to the end of the JSON object; if it breaks
  JSON's rules, to the end tag.
- A call that begins otherwise is held back to its end tag. If it is JSON that calls known functions
  all the same, it is delivered whole; otherwise it is content, tags and all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from router.tool_format import ToolFormat

# Up to the brace with which the arguments begin.
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')

_CLOSING = {"{": "}", "[": "]"}


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of a tool call."""

    index: int
    """Of the call, in its answer."""

    name: str | None
    """Of the function, in the first piece of its call; None in the others."""

    arguments: str
    """What to put behind the arguments so far."""


Item = str | CallPiece
"""Content is text; empty text is never delivered."""


class ToolCallParser:
    """Follows one answer."""

    def __init__(
        self, tool_format: ToolFormat, names: Collection[str], *, max_calls: int | None = None
    ) -> None:
        """`names` are those of the functions that may be called; behind the arguments of the last
        of `max_calls` calls, nothing is delivered any more."""
        self._format = tool_format
        self._names = frozenset(names)
        self._max_calls = max_calls
        self._pending = ""
        """Text that is not decided yet, beginning in the present state."""

        self._read: Callable[[], bool] = self._read_text
        """The present state: takes from the pending text, and returns whether to go on in another
        state with what is left."""

        self._items: list[Item] = []
        self._has_text = False
        """There is content since the last call."""

        self._closing: list[str] = []
        """Brackets that have to come, the next one last."""

        self._is_in_string = self._is_escaped = False
        self.num_calls = 0

    @property
    def is_in_arguments(self) -> bool:
        """Whether the last call's arguments are not complete."""
        return self._read in (self._read_arguments, self._read_broken_arguments)

    @property
    def is_done(self) -> bool:
        """Whether no further text matters."""
        return self.num_calls == self._max_calls and not self.is_in_arguments

    def add(self, text: str) -> list[Item]:
        """Return what this text makes final, in order."""
        self._pending += text
        while not self.is_done and self._read():
            pass
        return self._take()

    def finish(self) -> list[Item]:
        """Return what was held back. No `add` follows."""
        if self.is_done:
            return []
        held, self._pending = self._pending, ""
        if self._read == self._read_text:
            if held.strip() or self.num_calls == 0 or self._has_text:
                self._say(held)
        elif self._read == self._read_header:
            self._finish_call(held, end="")
        elif self._read == self._read_broken_arguments:
            self._pass_on(held)
        return self._take()

    def _take(self) -> list[Item]:
        items, self._items = self._items, []
        return items

    # --- states -----------------------------------------------------------------------------

    def _read_text(self) -> bool:
        text, is_complete = self._up_to(self._format.call_start)
        if not self._has_text and not text.strip():
            if is_complete:
                self._enter(self._read_header, skip=len(text) + len(self._format.call_start))
            return is_complete
        self._say(text)
        self._pending = self._pending[len(text) :]
        if is_complete:
            self._enter(self._read_header, skip=len(self._format.call_start))
        return is_complete

    def _read_header(self) -> bool:
        found = _HEADER.match(self._pending)
        if found is not None and found[1] in self._names:
            self._begin_call(found[1])
            self._enter(self._read_arguments, skip=found.end())
            return True
        body, is_complete = self._up_to(self._format.call_end)
        if is_complete:
            end = self._format.call_end
            self._enter(self._read_text, skip=len(body) + len(end))
            self._finish_call(body, end=end)
        return is_complete

    def _read_arguments(self) -> bool:
        for position, character in enumerate(self._pending):
            if not self._follow(character):
                self._pass_on(self._pending[:position])
                self._enter(self._read_broken_arguments, skip=position)
                return True
            if not self._closing:
                self._pass_on(self._pending[: position + 1])
                self._enter(self._read_last_brace, skip=position + 1)
                return True
        self._pass_on(self._pending)
        self._pending = ""
        return False

    def _read_broken_arguments(self) -> bool:
        text, is_complete = self._up_to(self._format.call_end)
        self._pass_on(text)
        self._pending = self._pending[len(text) :]
        if is_complete:
            self._enter(self._read_text, skip=len(self._format.call_end))
        return is_complete

    def _read_last_brace(self) -> bool:
        self._pending = self._pending.lstrip()
        if not self._pending:
            return False
        if self._pending.startswith("}"):
            self._enter(self._read_end_tag, skip=1)
        else:
            self._enter(self._read_text, skip=0)
        return True

    def _read_end_tag(self) -> bool:
        self._pending = self._pending.lstrip()
        tag = self._format.call_end
        if tag.startswith(self._pending) and self._pending != tag:
            return False
        # Models forget it at times.
        self._enter(self._read_text, skip=len(tag) if self._pending.startswith(tag) else 0)
        return True

    # --- what states do ---------------------------------------------------------------------

    def _enter(self, state: Callable[[], bool], *, skip: int) -> None:
        self._pending = self._pending[skip:]
        self._read = state

    def _up_to(self, tag: str) -> tuple[str, bool]:
        """Return the pending text before `tag`, and True; or, if it is not there, the text that
        cannot be a part of it, and False."""
        before, found, _ = self._pending.partition(tag)
        if found:
            return before, True
        num_held = next(n for n in range(len(tag) - 1, -1, -1) if before.endswith(tag[:n]))
        return before[: len(before) - num_held], False

    def _say(self, text: str) -> None:
        if text:
            self._items.append(text)
            self._has_text = True

    def _begin_call(self, name: str, arguments: str = "") -> None:
        self._items.append(CallPiece(self.num_calls, name, arguments))
        self.num_calls += 1
        self._has_text = self._is_in_string = self._is_escaped = False
        self._closing = []

    def _pass_on(self, arguments: str) -> None:
        if arguments:
            self._items.append(CallPiece(self.num_calls - 1, None, arguments))

    def _follow(self, character: str) -> bool:
        """Take the next character of arguments; return whether they can still be JSON."""
        if self._is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_in_string = False
            return character >= " "
        match character:
            case '"':
                self._is_in_string = True
            case "{" | "[":
                self._closing.append(_CLOSING[character])
            case "}" | "]":
                if character != self._closing[-1]:
                    return False
                self._closing.pop()
        return character != "<"

    def _finish_call(self, body: str, *, end: str) -> None:
        """Deliver what stands behind a start tag and was held back."""
        calls = _whole_calls(body, self._names)
        if not calls:
            self._say(f"{self._format.call_start}{body}{end}")
        for name, arguments in calls:
            if self.num_calls != self._max_calls:
                self._begin_call(name, arguments)


def _whole_calls(text: str, names: Collection[str]) -> Sequence[tuple[str, str]]:
    """Return names and arguments of the calls, one or an array of them, that are written as JSON;
    none if it is anything else."""
    try:
        value = from_json(text, allow_inf_nan=False)
        calls = [_whole_call(item) for item in (value if isinstance(value, list) else [value])]
    except ValueError:
        return ()
    return calls if all(name in names for name, _ in calls) else ()


def _whole_call(value: Any) -> tuple[str, str]:
    match value:
        case {"name": str(name), "arguments": dict(arguments)}:
            return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        case {"name": str(name)} if "arguments" not in value:
            return name, "{}"
    raise ValueError("not a call")
