"""Requests with an `Idempotency-Key` run once: who repeats one gets the answer of the first.

The answer is made behind the clients' backs and recorded; whoever sends the key, first or again,
reads the record from its beginning and follows it while it grows. So a client that lost its
connection finds its answer, or the rest of it, without a second generation. A router that was
started anew has no record and makes the answer once more, with the same seeds.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from orchestrator.core.errors import NodeUnavailable
from orchestrator.core.ports import Clock
from router.access import RequestRecord
from router.config import IdempotencyConfig
from router.errors import Refused, TooManyRequests, cut
from router.metrics import RouterMetrics
from router.streaming import while_client_stays
from router.terms import TERMS_HEADERS

IDEMPOTENCY_HEADER = "Idempotency-Key"
RETRY_AFTER_S = 1.0
REPLAYED_HEADER = (b"idempotent-replayed", b"true")

_KEY = re.compile(r"[\x21-\x7e]{1,255}")

_log = structlog.get_logger("router")


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A client's name for one request."""

    text: str
    owner_digest: bytes
    """Of the key and whose it is, so that nobody reads another's answer."""

    content_digest: bytes
    """Of everything that the answer depends on."""

    @property
    def seed_source(self) -> bytes:
        """What seeds are made of for a request that names none.

        Drawn from the key, they are the same in a router that was started anew and has nothing
        recorded: the answer made there goes on as the one that was cut off.
        """
        return self.owner_digest + self.content_digest


def request_key(request: Request, content: bytes, *, client_name: str | None) -> RequestKey | None:
    """Return the key of a request with this body; None if it has none.

    Clients that have no names are told apart by their credentials.

    Raises:
        RequestRejected: the header is malformed, or there are several.
    """
    values = set(request.headers.getlist(IDEMPOTENCY_HEADER))
    if not values:
        return None
    text = values.pop()
    if values or not _KEY.fullmatch(text):
        raise Refused(
            f"{IDEMPOTENCY_HEADER} is {cut(repr(text))}, it must be sent once and be 1 to 255 "
            "visible ASCII characters",
            field=IDEMPOTENCY_HEADER,
            code="invalid_value",
        )
    owner = request.headers.get("authorization", "") if client_name is None else client_name
    terms = [f"{name}={request.headers.getlist(name)}" for name in TERMS_HEADERS]
    return RequestKey(
        text,
        owner_digest=_digest(text, str(client_name is None), owner),
        content_digest=_digest(request.url.path, *terms, _canonical(content)),
    )


def _canonical(content: bytes) -> bytes:
    """Return JSON without its layout; what is not JSON stays as it is, to be refused later."""
    try:
        return msgspec.json.encode(msgspec.json.decode(content), order="sorted")
    except (msgspec.DecodeError, RecursionError):  # the latter of what is nested too deeply
        return content


def _digest(*parts: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.digest()


class _Recording:
    """An answer that is being made, or has been."""

    def __init__(self, key: RequestKey, record: RequestRecord) -> None:
        """`record` is that of the request for which it is made."""
        self.key = key
        self.record = record
        self.num_readers = 0
        self.num_bytes = 0
        self.finished_at_s: float | None = None
        self.failure: BaseException | None = None
        """Why it has ended early."""

        self._messages: list[Message] = []
        self._changed = asyncio.Event()

    def add(self, message: Message) -> int:
        """Append a message; return how many bytes it takes."""
        self._messages.append(message)
        num_bytes = len(message.get("body", b""))
        self.num_bytes += num_bytes
        self._wake_readers()
        return num_bytes

    def finish(self, now_s: float, failure: BaseException | None) -> None:
        """Nothing is added any more."""
        self.finished_at_s, self.failure = now_s, failure
        self._wake_readers()

    async def messages(self) -> AsyncGenerator[Message]:
        """Yield all messages, from the first on, as they come.

        Raises what the making of the answer raised.
        """
        position = 0
        while True:
            while position < len(self._messages):
                yield self._messages[position]
                position += 1
            if self.failure is not None:
                raise self.failure
            if self.finished_at_s is not None:
                return
            await self._changed.wait()

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class KeptAnswers:
    """The answers of requests with keys. Belongs to one event loop.

    Answers that have ended well are kept for a while; a failed one is forgotten, so that a
    repetition tries again. When too much is kept, those that ended first go first; those that are
    being made stay, and make no room for new ones.
    """

    def __init__(self, config: IdempotencyConfig, clock: Clock, metrics: RouterMetrics) -> None:
        self._config = config
        self._clock = clock
        self._metrics = metrics
        self._recordings: dict[bytes, _Recording] = {}
        self._finished: dict[bytes, _Recording] = {}
        """Those that have ended, in that order; a part of `_recordings`."""

        self._tasks: dict[_Recording, asyncio.Task[None]] = {}
        self._num_bytes = 0

    async def close(self) -> None:
        """Give up what is being made."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def find(self, key: RequestKey, record: RequestRecord) -> Response | None:
        """Return the answer that is kept under a key; None if there is none.

        Raises:
            RequestRejected: it was made for another request.
        """
        self._forget_old()
        recording = self._recordings.get(key.owner_digest)
        if recording is None:
            return None
        if recording.key.content_digest != key.content_digest:
            raise Refused(
                f"{IDEMPOTENCY_HEADER} {cut(repr(key.text))} was sent with another request; use a "
                "new key for each request, and an old one only to repeat the same",
                field=IDEMPOTENCY_HEADER,
                status=422,
                code="idempotency_key_reused",
            )
        self._metrics.failover.idempotent_replays.inc()
        record.replay_of = recording.record
        return _KeptAnswer(self, recording, record, is_replay=True)

    def check_room(self) -> None:
        """Make room for one more answer.

        Raises:
            TooManyRequests: too many are being made.
        """
        config = self._config
        while self._finished and len(self._recordings) >= config.max_answers:
            self._forget(next(iter(self._finished.values())))
        if len(self._recordings) >= config.max_answers or self._num_bytes >= config.max_bytes:
            raise TooManyRequests(
                f"{len(self._recordings):,} requests with an {IDEMPOTENCY_HEADER} are under way, "
                "as many as the router keeps answers for; send this one later, or without a key",
                kind="overload",
                code="too_many_keys",
                retry_after_s=RETRY_AFTER_S,
            )

    def keep(self, key: RequestKey, answer: Response, request: Request) -> Response:
        """Begin to make an answer; return one that reads it.

        The request's record stays open until it is made.
        """
        record: RequestRecord = request.state.record
        found = self.find(key, record)  # while this one was being read
        if found is not None:
            return found
        record.hold()
        recording = _Recording(key, record)
        self._recordings[key.owner_digest] = recording
        task = asyncio.create_task(self._make(recording, answer, request.scope))
        self._tasks[recording] = task
        task.add_done_callback(partial(self._settle, recording))
        return _KeptAnswer(self, recording, record, is_replay=False)

    def attach(self, recording: _Recording) -> None:
        """A client reads an answer."""
        recording.num_readers += 1

    def detach(self, recording: _Recording) -> None:
        """It does not any more; an answer that is being made for nobody is given up in a while."""
        recording.num_readers -= 1
        if recording.num_readers == 0 and recording in self._tasks:
            loop = asyncio.get_running_loop()
            loop.call_later(self._config.abandon_after_s, self._abandon, recording)

    async def _make(self, recording: _Recording, answer: Response, scope: Scope) -> None:
        async def send(message: Message) -> None:
            self._count_bytes(recording.add(message))
            while self._num_bytes > self._config.max_bytes and self._finished:
                self._forget(next(iter(self._finished.values())))

        await answer(scope, _never_receive, send)

    def _settle(self, recording: _Recording, task: asyncio.Task[None]) -> None:
        del self._tasks[recording]
        record, now_s = recording.record, self._clock.now_s()
        failure: BaseException | None
        if task.cancelled():
            failure = NodeUnavailable("the answer was given up; send the request again")
        else:
            failure = task.exception()
        recording.finish(now_s, failure)
        # A stream that has begun tells its failure in an event, and the record.
        reason = record.error if failure is None else str(failure)
        if reason is None:
            self._finished[recording.key.owner_digest] = recording
        else:
            _log.info("kept answer failed", request_id=record.request_id, reason=reason)
            self._forget(recording)
        record.release(now_s)

    def _abandon(self, recording: _Recording) -> None:
        task = self._tasks.get(recording)
        if task is not None and recording.num_readers == 0:
            task.cancel()

    def _forget_old(self) -> None:
        oldest_s = self._clock.now_s() - self._config.keep_s
        for recording in list(self._finished.values()):
            if recording.finished_at_s is None or recording.finished_at_s >= oldest_s:
                break
            self._forget(recording)

    def _forget(self, recording: _Recording) -> None:
        self._finished.pop(recording.key.owner_digest, None)
        del self._recordings[recording.key.owner_digest]
        self._count_bytes(-recording.num_bytes)

    def _count_bytes(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self._metrics.failover.kept_answer_bytes.set(self._num_bytes)


class _KeptAnswer(Response):
    """Sends a recorded answer to one client, as fast as it is made and read."""

    def __init__(
        self, answers: KeptAnswers, recording: _Recording, record: RequestRecord, *, is_replay: bool
    ) -> None:
        super().__init__()
        self._answers = answers
        self._recording = recording
        self._record = record
        self._is_replay = is_replay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the answer ends or the client leaves."""
        self._answers.attach(self._recording)
        try:
            async with while_client_stays(receive, self._record):
                async for message in self._recording.messages():
                    await send(self._marked(message))
                    if _is_last(message):
                        break  # A server takes the client for gone from here on.
        finally:
            self._answers.detach(self._recording)

    def _marked(self, message: Message) -> Message:
        if message["type"] != "http.response.start":
            return message
        # A copy each: whoever sends it adds headers of this exchange.
        marks = [REPLAYED_HEADER] if self._is_replay else []
        return {**message, "headers": [*message["headers"], *marks]}


def _is_last(message: Message) -> bool:
    """Return whether a response ends with this message."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


async def _never_receive() -> Message:
    """Wait for ever: an answer that is recorded has no client that could leave."""
    nothing: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await nothing
