"""A model server without a model, cheap enough not to be what a router waits for.

    python -m benchmarks.peers.mock_worker ENDPOINT_ID PORT TOKENS_FILE

Speaks two protocols over the same clock: OpenAI's /v1/chat/completions for routers that pass it
on, and a node's /v1/generate for ours. Every answer has the same tokens. How fast they come is
said by POST /pace, for all requests that follow.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec
import uvloop

from orchestrator.core.latency import LatencyProfile
from orchestrator.core.ports import EngineCapabilities, QueueSummary, SchedulerLoad
from orchestrator.core.request import FinishReason
from orchestrator.wire import NodeDescription, NodeSnapshot, TokenEvent

MODEL = "mock"
SNAPSHOT_PAUSE_S = 0.05
"""Between two snapshots of a stream; that of a real node with news all the time."""

_PROFILE = LatencyProfile(
    prefill_quadratic_s=0.0,
    prefill_context_s=0.0,
    prefill_token_s=2e-5,
    prefill_cached_s=0.0,
    decode_context_s=0.0,
    decode_token_s=1e-5,
    mixed_step_s=0.005,
    decode_step_s=0.004,
)
_CAPABILITIES = EngineCapabilities(
    block_size_tokens=16,
    num_device_blocks=100_000,
    num_host_blocks=0,
    max_num_batched_tokens=8192,
    max_num_seqs=256,
    max_model_len=8192,
)


class Token(msgspec.Struct, frozen=True):
    """One token that every answer has."""

    token_id: int
    text: str


class Pace(msgspec.Struct, frozen=True):
    """How the tokens of an answer come."""

    num_tokens: int = 64
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    in_one_write: bool = False
    """All tokens together, as soon as the first is there."""


class Answers:
    """The bytes of all answers, made once for each pace."""

    def __init__(self, tokens: tuple[Token, ...], pace: Pace) -> None:
        self.pace = pace
        used = tokens[: pace.num_tokens]
        events = [_openai_event(token.text, is_first=i == 0) for i, token in enumerate(used)]
        events[-1] += _openai_event(None) + b"data: [DONE]\n\n"
        self.openai_stream = _chunked(b"text/event-stream", events)
        lines = [
            TokenEvent(
                new_token_ids=(token.token_id,),
                finish_reason=FinishReason.LENGTH if i + 1 == len(used) else None,
            )
            for i, token in enumerate(used)
        ]
        encoded = [msgspec.json.encode(line) + b"\n" for line in lines]
        self.node_stream = _chunked(b"application/x-ndjson", encoded)
        self.openai_whole = _json_response(
            {
                "id": "chatcmpl-0123456789abcdef0123456789abcdef",
                "object": "chat.completion",
                "created": 1_800_000_000,
                "model": MODEL,
                "choices": [
                    {
                        "index": 0,
                        "message": {
                            "content": "".join(token.text for token in used),
                            "role": "assistant",
                            "refusal": None,
                        },
                        "logprobs": None,
                        "finish_reason": "length",
                    }
                ],
                "usage": {
                    "prompt_tokens": 350,
                    "completion_tokens": len(used),
                    "total_tokens": 350 + len(used),
                },
            }
        )


class Worker:
    """What all connections of a worker share."""

    def __init__(self, endpoint_id: str, tokens: tuple[Token, ...]) -> None:
        self.endpoint_id = endpoint_id
        self.tokens = tokens
        self.answers = Answers(tokens, Pace())
        self.num_running = 0
        self.num_snapshots = 0

    def set_pace(self, body: bytes) -> bytes:
        """Take a new pace; return the response."""
        self.answers = Answers(self.tokens, msgspec.json.decode(body, type=Pace))
        return _json_response({})

    def description(self) -> NodeDescription:
        """Return what a node says of itself."""
        return NodeDescription(
            endpoint_id=self.endpoint_id,
            instance_id=self.endpoint_id,
            model=MODEL,
            capabilities=_CAPABILITIES,
            latency_profile=_PROFILE,
            manifest_sha256="0" * 64,
        )

    def snapshot(self) -> NodeSnapshot:
        """Return what a node that only decodes would say."""
        self.num_snapshots += 1
        num_running = self.num_running
        return NodeSnapshot(
            endpoint_id=self.endpoint_id,
            instance_id=self.endpoint_id,
            seq_no=self.num_snapshots,
            age_s=0.0,
            load=SchedulerLoad(0, num_running, num_running, 0, 90_000, 100_000),
            queue=QueueSummary(
                due_in_s=(),
                weight=(),
                work_s=(),
                num_prefills=(),
                decode_context_tokens=400 * num_running,
                decode_weight=2.0 * num_running,
                min_decode_tpot_s=0.1 if num_running else None,
                max_weight=2.0 if num_running else 0.0,
                latency_budget_s=None,
                latency_profile=_PROFILE,
            ),
            is_draining=False,
        )


class Connection(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._timer: asyncio.Handle | None = None
        self._is_running = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._end_answer()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, rest = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        num_bytes = _content_length(head)
        if len(rest) >= num_bytes:
            self._received = rest[num_bytes:]
            self._answer(head.split(b" ", 2)[1], rest[:num_bytes])

    def _answer(self, path: bytes, body: bytes) -> None:
        worker, answers = self._worker, self._worker.answers
        match path:
            case b"/v1/generate":
                self._begin(answers.node_stream)
            case b"/v1/chat/completions" if _asks_for_stream(body):
                self._begin(answers.openai_stream)
            case b"/v1/chat/completions":
                self._begin([answers.openai_whole])
            case b"/v1/node":
                self._transport.write(_json_response(worker.description()))
            case b"/v1/snapshot":
                self._transport.write(_json_response(worker.snapshot()))
            case b"/v1/snapshots":
                self._stream_snapshots(_head(b"application/x-ndjson"))
            case b"/pace":
                self._transport.write(worker.set_pace(body))
            case b"/v1/models":
                models = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
                self._transport.write(_json_response(models))
            case b"/health" | b"/get_server_info" | b"/get_model_info" | b"/server_info":
                self._transport.write(_json_response({"status": "ready", "model_path": MODEL}))
            case _:
                self._transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")

    def _begin(self, pieces: list[bytes]) -> None:
        pace = self._worker.answers.pace
        self._is_running = True
        self._worker.num_running += 1
        pause_s = pace.ttft_s
        if pace.in_one_write or len(pieces) == 1:
            pieces = [b"".join(pieces)]
            pause_s += 0 if pace.in_one_write else pace.tpot_s * (pace.num_tokens - 1)
        self._after(pause_s, lambda: self._write(pieces, 0, self._loop.time(), pace.tpot_s))

    def _write(self, pieces: list[bytes], index: int, begun_s: float, tpot_s: float) -> None:
        self._transport.write(pieces[index])
        index += 1
        if index == len(pieces):
            self._end_answer()
        else:
            # Counted from the first, so that lateness does not add up.
            pause_s = begun_s + index * tpot_s - self._loop.time() if tpot_s else 0.0
            self._after(pause_s, lambda: self._write(pieces, index, begun_s, tpot_s))

    def _after(self, pause_s: float, callback: Callable[[], None]) -> None:
        if pause_s > 0:
            self._timer = self._loop.call_later(pause_s, callback)
        else:
            self._timer = self._loop.call_soon(callback)

    def _end_answer(self) -> None:
        self._timer = None
        if self._is_running:
            self._is_running = False
            self._worker.num_running -= 1

    def _stream_snapshots(self, head: bytes) -> None:
        line = msgspec.json.encode(self._worker.snapshot()) + b"\n"
        self._transport.write(head + _chunk(line))
        self._after(SNAPSHOT_PAUSE_S, lambda: self._stream_snapshots(b""))


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return 0


def _asks_for_stream(body: bytes) -> bool:
    return b'"stream":true' in body or b'"stream": true' in body


def _openai_event(text: str | None, *, is_first: bool = False) -> bytes:
    """Return the event of one token, with the role before the first; of the end for None."""

    def event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {
            "id": "chatcmpl-0123456789abcdef0123456789abcdef",
            "object": "chat.completion.chunk",
            "created": 1_800_000_000,
            "model": MODEL,
            "choices": [choice],
        }
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    if text is None:
        return event({}, "length")
    role = event({"role": "assistant", "content": ""}) if is_first else b""
    return role + event({"content": text})


def _head(content_type: bytes) -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: " + content_type + b"\r\ntransfer-encoding: chunked"
        b"\r\n\r\n"
    )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _chunked(content_type: bytes, pieces: list[bytes]) -> list[bytes]:
    """Return a response as pieces, the headers with the first and the end with the last."""
    chunks = [_chunk(piece) for piece in pieces]
    chunks[0] = _head(content_type) + chunks[0]
    chunks[-1] += b"0\r\n\r\n"
    return chunks


def _json_response(value: object) -> bytes:
    body = msgspec.json.encode(value)
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


async def _serve(endpoint_id: str, port: int, tokens: tuple[Token, ...]) -> None:
    worker = Worker(endpoint_id, tokens)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(worker), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    """Serve until killed."""
    endpoint_id, port, tokens_file = sys.argv[1:]
    tokens = msgspec.json.decode(Path(tokens_file).read_bytes(), type=tuple[Token, ...])
    uvloop.run(_serve(endpoint_id, int(port), tokens))


if __name__ == "__main__":
    main()
