"""A load generator that costs little: raw HTTP/1.1 over kept connections, one request at a time
on each."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

NUM_PROMPTS = 2000
NUM_PREFIXES = 8
PREFIX_CHARACTERS = 700
PROMPT_CHARACTERS = 1500

REQUEST_TIMEOUT_S = 60.0

_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "no",
    "more",
    "if",
    "out",
    "so",
    "what",
    "up",
    "said",
    "about",
    "than",
    "its",
    "into",
    "them",
    "can",
    "only",
    "other",
    "time",
    "new",
    "some",
    "could",
    "these",
    "two",
    "may",
    "first",
    "then",
    "do",
    "any",
    "like",
    "my",
    "now",
    "over",
    "such",
    "our",
    "man",
    "me",
    "even",
    "most",
    "made",
    "after",
    "also",
    "did",
    "many",
    "off",
    "before",
    "must",
    "well",
    "back",
    "through",
    "years",
    "where",
    "much",
    "your",
    "way",
    "down",
    "should",
    "because",
    "long",
    "each",
    "just",
    "state",
    "people",
    "those",
    "too",
    "how",
    "little",
    "good",
    "world",
    "make",
    "very",
    "year",
    "still",
    "see",
    "own",
    "work",
    "men",
    "day",
    "get",
    "here",
    "between",
    "both",
    "life",
    "being",
    "under",
    "three",
    "never",
    "know",
    "same",
    "last",
    "another",
    "while",
    "us",
    "might",
    "great",
    "go",
    "come",
    "since",
    "against",
    "right",
    "came",
    "take",
    "used",
    "himself",
    "few",
    "house",
    "use",
    "place",
    "during",
    "high",
    "without",
    "again",
    "home",
    "around",
    "small",
    "however",
    "found",
    "thought",
    "went",
    "say",
    "part",
    "once",
    "general",
]


@dataclass(frozen=True)
class Cell:
    """One kind of load."""

    name: str
    num_connections: int
    is_stream: bool
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    num_tokens: int = 64

    @property
    def is_paced(self) -> bool:
        return self.tpot_s > 0

    @property
    def mean_pause_s(self) -> float:
        """Of a connection between two requests: a tenth of one request where tokens are paced, so
        that requests do not stay in step."""
        return 0.1 * (self.ttft_s + self.num_tokens * self.tpot_s) if self.is_paced else 0.0


CELLS = (
    Cell("stream64", 64, is_stream=True),
    Cell("plain64", 64, is_stream=False),
    Cell("plain1", 1, is_stream=False),
    Cell("timed64", 64, is_stream=True, ttft_s=0.050, tpot_s=0.020, num_tokens=32),
)


@dataclass
class Outcome:
    """What came of the requests of one cell."""

    ttfts_s: list[float] = field(default_factory=list)
    """To the first event of each stream."""

    totals_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def make_prompts() -> list[str]:
    """Return prompts of English words, some of which begin alike; the same ones every time."""
    draw = random.Random(0)

    def text(num_characters: int) -> str:
        words: list[str] = []
        length = 0
        while length < num_characters:
            words.append(draw.choice(_WORDS))
            length += len(words[-1]) + 1
        return " ".join(words)

    prefixes = [text(PREFIX_CHARACTERS) for _ in range(NUM_PREFIXES)]
    rest = PROMPT_CHARACTERS - PREFIX_CHARACTERS
    return [f"{prefixes[i % NUM_PREFIXES]} {text(rest)}" for i in range(NUM_PROMPTS)]


def make_requests(cell: Cell, *, model: str, api_key: str) -> list[bytes]:
    """Return one request for each prompt, as it goes over a connection."""
    requests = []
    for prompt in make_prompts():
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": cell.num_tokens,
            "stream": cell.is_stream,
        }
        content = json.dumps(body, separators=(",", ":")).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            f"content-type: application/json\r\nauthorization: Bearer {api_key}\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        )
        requests.append(head.encode() + content)
    return requests


class _Connection(asyncio.Protocol):
    """Sends a request and collects its response."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] | None = None
        self.is_open = False

    async def ask(self, request: bytes, *, is_stream: bool) -> bytes:
        """Return the response; `first_event_s` and `sent_s` are then those of this request."""
        self._parts: list[bytes] = []
        self._tail = b""
        self._num_left: int | None = None
        self._is_stream = is_stream
        self.first_event_s: float | None = None
        self._done = self._loop.create_future()
        self.sent_s = time.perf_counter()
        self.transport.write(request)
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await self._done
        return b"".join(self._parts)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(f"connection lost: {exc}"))

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if self._is_stream:
            if self.first_event_s is None and b"data: " in data:
                self.first_event_s = time.perf_counter()
            self._tail = (self._tail + data)[-7:]
            is_complete = self._tail == b"\r\n0\r\n\r\n"
        else:
            is_complete = self._is_whole()
        if is_complete and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _is_whole(self) -> bool:
        received = b"".join(self._parts)
        head, separator, body = received.partition(b"\r\n\r\n")
        if not separator:
            return False
        for line in head.lower().split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name == b"content-length":
                return len(body) >= int(value)
        return body.endswith(b"0\r\n\r\n")


async def run_cell(
    url: str, cell: Cell, requests: Sequence[bytes], *, seconds: float, expected_text: str
) -> Outcome:
    """Keep all connections of a cell busy for so long; every one's first answer is checked."""
    outcome = Outcome()
    host, _, port = url.removeprefix("http://").partition(":")
    begun_s = time.perf_counter()

    async def keep_asking(number: int) -> None:
        draw = random.Random(number)
        connection: _Connection | None = None
        position = number * len(requests) // cell.num_connections
        is_checked = False
        if cell.is_paced:
            await asyncio.sleep(draw.uniform(0, 10 * cell.mean_pause_s))
        while time.perf_counter() - begun_s < seconds:
            try:
                if connection is None or not connection.is_open:
                    loop = asyncio.get_running_loop()
                    _, connection = await loop.create_connection(_Connection, host, int(port))
                request = requests[position % len(requests)]
                position += 1
                response = await connection.ask(request, is_stream=cell.is_stream)
            except (OSError, TimeoutError) as error:
                outcome.problems.append(repr(error))
                connection = None
                continue
            outcome.totals_s.append(time.perf_counter() - connection.sent_s)
            if connection.first_event_s is not None:
                outcome.ttfts_s.append(connection.first_event_s - connection.sent_s)
            problem = _problem(response, cell, expected_text, in_detail=not is_checked)
            is_checked = True
            if problem is not None:
                outcome.problems.append(problem)
            if cell.mean_pause_s:
                await asyncio.sleep(draw.uniform(0, 2 * cell.mean_pause_s))
        if connection is not None:
            connection.transport.close()

    await asyncio.gather(*(keep_asking(number) for number in range(cell.num_connections)))
    outcome.seconds = time.perf_counter() - begun_s
    return outcome


def _problem(response: bytes, cell: Cell, expected_text: str, *, in_detail: bool) -> str | None:
    """Return what is wrong with a response; None if nothing is."""
    if not response.startswith(b"HTTP/1.1 200 "):
        return response[:800].decode(errors="replace")
    if cell.is_stream and b"[DONE]" not in response[-64:]:
        return "the stream ends without [DONE]"
    if in_detail and (text := answered_text(response)) != expected_text:
        return f"the answer is {text!r}, expected {expected_text!r}"
    return None


def answered_text(response: bytes) -> str:
    """Return the text of a response, streamed or not."""
    head, _, body = response.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = _joined_chunks(body)
    if b"text/event-stream" not in head.lower():
        return str(json.loads(body)["choices"][0]["message"]["content"])
    texts = []
    for line in body.split(b"\n"):
        data = line.strip().removeprefix(b"data: ")
        if data.startswith(b"{"):
            for choice in json.loads(data)["choices"]:
                texts.append(choice["delta"].get("content") or "")
    return "".join(texts)


def _joined_chunks(body: bytes) -> bytes:
    joined = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        num_bytes = int(size, 16)
        joined, body = joined + body[:num_bytes], body[num_bytes + 2 :]
        if num_bytes == 0:
            break
    return joined
