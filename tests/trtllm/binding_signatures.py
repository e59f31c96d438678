"""Reads the signatures that nanobind and pybind11 write into docstrings.

`inspect.signature` knows nothing of functions of C++; their first lines say how to call them:

    await_responses(self, id: int, timeout: datetime.timedelta | None = None) -> list[Response]

An overloaded function has one such line each, which pybind11 and nanobind number when there is text
between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Param = dict[str, Any]
"""As in `api_surface.json`; `positional_only` beside what that knows."""

_OPENING, _CLOSING = "([{", ")]}"


def parse_signatures(docstring: str, name: str) -> list[list[Param]]:
    """Return the parameters of each overload of the function `name`, without `self`; empty if the
    docstring has no signature of it."""
    start = re.compile(rf"^(?:\d+\.\s*)?`*{re.escape(name)}\(", re.MULTILINE)
    found = (_arguments(docstring[match.end() :]) for match in start.finditer(docstring))
    return [_params(arguments) for arguments in found if arguments is not None]


def _arguments(text: str) -> list[str] | None:
    """Return the arguments in `text`, which begins behind the opening parenthesis; None if nothing
    closes that."""
    arguments, begin = [], 0
    for position, character in _outside(text):
        if character in (",", ")"):
            arguments.append(text[begin:position].strip())
            begin = position + 1
        if character == ")":
            return [argument for argument in arguments if argument]
    return None


def _outside(text: str) -> Iterator[tuple[int, str]]:
    """Yield the characters that stand in no brackets and no string, with their positions; the
    `<...>` of default values without a literal counts as brackets."""
    depth = 0
    quote = ""
    for position, character in enumerate(text):
        if quote:
            if character == quote and text[position - 1] != "\\":
                quote = ""
        elif character in "'\"":
            quote = character
        elif character in _OPENING or (character == "<" and text[position - 1] in "= "):
            depth += 1
        elif depth and (character in _CLOSING or (character == ">" and text[position - 1] != "-")):
            depth -= 1
        elif not depth:
            yield position, character


def _params(arguments: list[str]) -> list[Param]:
    params: list[Param] = []
    is_kw_only = False
    for argument in arguments:
        if argument == "*":
            is_kw_only = True
        elif argument == "/":
            for param in params:
                param["positional_only"] = True
        else:
            params.append(_param(argument, is_kw_only=is_kw_only))
    return params[1:] if params and params[0]["name"] == "self" else params


def _param(argument: str, *, is_kw_only: bool) -> Param:
    name = re.match(r"\**\w+", argument)
    assert name is not None, f"an argument without a name: {argument!r}"
    text = name.group()
    if text.startswith("**"):
        return {"name": text[2:], "required": False, "var_keyword": True}
    if text.startswith("*"):
        return {"name": text[1:], "required": False, "var_positional": True}
    default = _default(argument)
    param: Param = {"name": text, "required": default is None}
    if default is not None:
        param["default"] = default
    if is_kw_only:
        param["kw_only"] = True
    return param


def _default(argument: str) -> str | None:
    for position, character in _outside(argument):
        if character == "=":
            return argument[position + 1 :].strip()
    return None
