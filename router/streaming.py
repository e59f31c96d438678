"""Sends one generation to its client, in one piece or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from orchestrator.core.errors import ProServeError
from router.access import RequestRecord
from router.errors import error_answer
from router.generation import Generation
from router.output import OutputDelta
from router.responses import (
    Answer,
    AnswerFormat,
    ChatChoice,
    ChatChunkChoice,
    ChoiceOutput,
    CompletionChoice,
    Usage,
)
from router.schema import StreamOptions

_encoder = msgspec.json.Encoder()

_PLACE_OF_TEXT = "\0text\0"
"""Nothing else in an event has a control character: ids are ours and names of models have none."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every body and event of one answer repeats."""

    completion_id: str
    created_s: int
    """Seconds since 1970."""

    model: str
    num_choices: int


class WholeAnswer(Response):
    """Gathers a generation and sends it as one JSON body.

    A failure is raised, for the application to answer.
    """

    media_type = "application/json"

    def __init__(
        self,
        head: AnswerHead,
        generation: Generation,
        answer_format: AnswerFormat,
        record: RequestRecord,
    ) -> None:
        super().__init__()
        self._head = head
        self._generation = generation
        self._format = answer_format
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the generation and send what it gives."""
        async with (
            while_client_stays(receive, self._record),
            aclosing(self._generation.deltas()) as deltas,
        ):
            num_tokens = 0
            outputs = [ChoiceOutput("", [], "") for _ in range(self._head.num_choices)]
            with self._generation.until_shutdown():
                async for index, gained in deltas:
                    output = outputs[index]
                    output.text += "".join(delta.text for delta in gained)
                    for delta in gained:
                        output.logprobs += delta.logprobs
                        output.calls += delta.calls
                        num_tokens += delta.num_new_tokens
                    output.finish_reason = gained[-1].finish_reason or output.finish_reason
            choices = [self._format.choice(i, output) for i, output in enumerate(outputs)]
            body = _encoder.encode(
                _answer(
                    self._head,
                    self._format.answer_object,
                    choices,
                    self._generation.final_usage(num_tokens),
                )
            )
            await Response(body, media_type=self.media_type)(scope, receive, send)


class EventStream(Response):
    """Sends a generation as server-sent events, each as soon as there is something to say.

    Headers wait for the first token event and leave together with it. A failure before that
    is raised, for the application to answer with its own status; a later one is sent as an
    event in OpenAI's error shape, and the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        head: AnswerHead,
        generation: Generation,
        answer_format: AnswerFormat,
        options: StreamOptions,
        record: RequestRecord,
    ) -> None:
        # Proxies such as nginx hold a stream back unless told not to.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._head = head
        self._generation = generation
        self._format = answer_format
        self._options = options
        self._record = record
        self._texts: dict[int, _TextEvents] = {}
        """How text is sent, of the choices that have begun."""

        self._num_tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the generation and send what it gives."""
        async with (
            while_client_stays(receive, self._record),
            aclosing(self._generation.deltas()) as deltas,
        ):
            has_begun = False
            try:
                with self._generation.until_shutdown():
                    async for index, gained in deltas:
                        events = self._events(index, gained)
                        if not has_begun:
                            await send(self._start)
                            has_begun = True
                        elif not events:
                            continue
                        await _send_body(send, events)
                last = self._last_events()
            except ProServeError as error:
                if not has_begun:
                    raise
                _, answer = error_answer(error)
                self._record.fail(answer)
                last = _event(answer)
            await _send_body(send, last, is_last=True)

    @property
    def _start(self) -> Message:
        return {"type": "http.response.start", "status": 200, "headers": self.raw_headers}

    def _events(self, index: int, gained: Sequence[OutputDelta]) -> bytes:
        events: list[bytes] = []
        texts = self._texts.get(index)
        for delta in gained:
            self._num_tokens += delta.num_new_tokens
            is_plain = not (delta.logprobs or delta.calls or delta.finish_reason)
            if texts is not None and is_plain and not self._options.continuous_usage_stats:
                events += texts.of(delta.text)
                continue
            for choice in self._format.chunks(index, delta, is_first=texts is None):
                events.append(_event(self._answer((choice,), self._chunk_usage())))
            if texts is None:
                texts = self._texts[index] = self._text_events(index)
        return b"".join(events)

    def _text_events(self, index: int) -> _TextEvents:
        """Return how further text of a choice is sent."""
        delta = OutputDelta(_PLACE_OF_TEXT, 1, (), None)
        choices = self._format.chunks(index, delta, is_first=False)
        return _TextEvents(_event(self._answer(choices, self._chunk_usage())))

    def _last_events(self) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._options.include_usage:
            return done
        return _event(self._answer((), self._generation.final_usage(self._num_tokens))) + done

    def _chunk_usage(self) -> Usage | msgspec.UnsetType | None:
        if not self._options.include_usage:
            return msgspec.UNSET
        if not self._options.continuous_usage_stats:
            return None
        return self._generation.usage(self._num_tokens)

    def _answer(
        self,
        choices: Sequence[ChatChunkChoice | CompletionChoice],
        usage: Usage | msgspec.UnsetType | None,
    ) -> Answer:
        return _answer(self._head, self._format.chunk_object, choices, usage)


class _TextEvents:
    """The events of text and nothing else: alike but for the text, so they are made by putting it
    into one that was made in full."""

    def __init__(self, example: bytes) -> None:
        """`example` has `_PLACE_OF_TEXT` as its text."""
        self._before, self._after = example.split(_encoder.encode(_PLACE_OF_TEXT))

    def of(self, text: str) -> tuple[bytes, ...]:
        """Return the pieces of the event of a text; none for none."""
        return (self._before, _encoder.encode(text), self._after) if text else ()


@asynccontextmanager
async def while_client_stays(receive: Receive, record: RequestRecord) -> AsyncIterator[None]:
    """Run the body; cancel it, note that and go on behind it as soon as the client leaves.

    The request must have been read to its end.
    """
    serving = asyncio.current_task()
    assert serving is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        serving.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not has_left or serving.uncancel() > 0:
            raise
        record.has_client_left = True
    finally:
        watching.cancel()


def _answer(
    head: AnswerHead,
    object_name: str,
    choices: Sequence[ChatChoice | ChatChunkChoice | CompletionChoice],
    usage: Usage | msgspec.UnsetType | None,
) -> Answer:
    return Answer(head.completion_id, object_name, head.created_s, head.model, choices, usage)


def _event(message: msgspec.Struct) -> bytes:
    return b"data: %b\n\n" % _encoder.encode(message)


async def _send_body(send: Send, body: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})
