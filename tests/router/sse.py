"""Reads server-sent events in tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx


def parsed(text: str) -> list[Any]:
    """Return the data of each event: parsed JSON, and "[DONE]" as it is."""
    *blocks, rest = text.split("\n\n")
    assert rest == "", "the stream ends in the middle of an event"
    data = [block.removeprefix("data: ") for block in blocks]
    return [d if d == "[DONE]" else json.loads(d) for d in data]


def arriving(response: httpx.Response) -> Iterator[Any]:
    """Yield the data of each event of an open stream."""
    for line in response.iter_lines():
        if line:
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
