"""Bodies and stream events that clients receive, in OpenAI's shapes, and how they are filled."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from router.output import OutputDelta, OutputLogprob
from router.tokenizer import Tokenizer
from router.tool_parser import CallPiece

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; the number that OpenAI uses."""


class ServingSummary(msgspec.Struct, frozen=True):
    """How one answer was served, as its tokens reached the router."""

    index: int
    """Of the choice."""

    tokens: int
    tokens_on_time: int
    ttft_ms: float | None
    """From the request's arrival to the first token; null if there was none."""

    mean_tpot_ms: float | None
    """Per token after the first; null if there was none."""

    objectives_met: bool
    """Whether both times are below what was promised."""

    service_gain: float
    possible_service_gain: float
    """Had all its tokens been on time."""

    node: str
    """The one that finished it."""

    retries: int
    """How often it was sent on to another node, because one had failed."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    serving_summary: tuple[ServingSummary, ...] | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class ChatLogprob(msgspec.Struct, frozen=True):
    """A token that was chosen."""

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a chat choice."""

    content: tuple[ChatLogprob, ...]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a completion choice; the lists run in parallel."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Function(msgspec.Struct, frozen=True):
    """Which function is called, and how."""

    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model wants made."""

    id: str
    function: Function
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    """The model's whole answer."""

    content: str | None
    """None if it consists of calls."""

    role: str = "assistant"
    refusal: None = None
    tool_calls: Sequence[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class FunctionDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of a call: its function's name, or what to put behind its arguments so far."""

    arguments: str
    name: str | None = None


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of a call; only its first one has an id and a type."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of the model's answer."""

    role: str | None = None
    content: str | None = None
    tool_calls: tuple[ToolCallDelta, ...] | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer to a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """A piece of one answer to a conversation."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class CompletionChoice(msgspec.Struct, frozen=True):
    """One completion, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """Body of an answer, or of one stream event."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[ChatChoice | ChatChunkChoice | CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class Model(msgspec.Struct, frozen=True):
    """A served model."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "proserve"


class ModelList(msgspec.Struct, frozen=True):
    """Body of GET /v1/models."""

    data: tuple[Model, ...]
    object: str = "list"


@dataclass(slots=True)
class ChoiceOutput:
    """All of one answer, gathered."""

    text: str
    logprobs: list[OutputLogprob]
    finish_reason: str
    calls: list[CallPiece] = field(default_factory=list)


class AnswerFormat(Protocol):
    """How one of the two routes words its answers."""

    id_prefix: str
    answer_object: str
    chunk_object: str

    def choice(self, index: int, output: ChoiceOutput) -> ChatChoice | CompletionChoice:
        """Return a whole answer."""
        ...

    def chunks(
        self, index: int, delta: OutputDelta, *, is_first: bool
    ) -> Sequence[ChatChunkChoice | CompletionChoice]:
        """Return what to stream for `delta`: one event for each, and none for nothing."""
        ...


class ChatFormat:
    """Words the answers of /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, has_logprobs: bool, may_call: bool = False) -> None:
        """`may_call` says whether answers may be calls, without any content."""
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._first_content = None if may_call else ""

    def choice(self, index: int, output: ChoiceOutput) -> ChatChoice:
        """Return a whole answer."""
        calls = _whole_calls(output.calls)
        message = (
            ChatMessage(output.text or None, tool_calls=calls)
            if calls
            else ChatMessage(output.text)
        )
        return ChatChoice(index, message, self._logprobs(output.logprobs), output.finish_reason)

    def chunks(
        self, index: int, delta: OutputDelta, *, is_first: bool
    ) -> Sequence[ChatChunkChoice]:
        """Return first the role, then text, then pieces of calls, then the finish reason."""
        found = []
        if is_first:
            first = ChatDelta(role="assistant", content=self._first_content)
            found.append(ChatChunkChoice(index, first))
        if delta.text or delta.logprobs:
            found.append(
                ChatChunkChoice(
                    index, ChatDelta(content=delta.text), self._logprobs(delta.logprobs)
                )
            )
        for piece in delta.calls:
            found.append(ChatChunkChoice(index, ChatDelta(tool_calls=(_call_delta(piece),))))
        if delta.finish_reason is not None:
            found.append(ChatChunkChoice(index, ChatDelta(), finish_reason=delta.finish_reason))
        return found

    def _logprobs(self, logprobs: Sequence[OutputLogprob]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        return ChatLogprobs(
            tuple(
                ChatLogprob(
                    self._tokenizer.token_text(found.token_id),
                    max(found.logprob, LEAST_LOGPROB),
                    tuple(self._tokenizer.token_bytes(found.token_id)),
                    tuple(
                        TopLogprob(
                            self._tokenizer.token_text(token_id),
                            max(logprob, LEAST_LOGPROB),
                            tuple(self._tokenizer.token_bytes(token_id)),
                        )
                        for token_id, logprob in found.top
                    ),
                )
                for found in logprobs
            )
        )


def _call_delta(piece: CallPiece) -> ToolCallDelta:
    if piece.name is None:
        return ToolCallDelta(piece.index, FunctionDelta(piece.arguments))
    function = FunctionDelta(piece.arguments, piece.name)
    return ToolCallDelta(piece.index, function, _new_call_id(), "function")


def _whole_calls(pieces: Sequence[CallPiece]) -> list[ToolCall]:
    names: list[str] = []
    arguments: list[str] = []
    for piece in pieces:
        if piece.name is None:
            arguments[-1] += piece.arguments
        else:
            names.append(piece.name)
            arguments.append(piece.arguments)
    return [
        ToolCall(_new_call_id(), Function(*call)) for call in zip(names, arguments, strict=True)
    ]


def _new_call_id() -> str:
    return f"call_{uuid.uuid4().hex}"


class CompletionFormat:
    """Words the answers of /v1/completions."""

    id_prefix = "cmpl-"
    answer_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, *, has_logprobs: bool, echoes: Sequence[str]) -> None:
        """`echoes` has, for each choice, the text put before its answer."""
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs
        self._echoes = echoes

    def choice(self, index: int, output: ChoiceOutput) -> CompletionChoice:
        """Return a whole completion."""
        return CompletionChoice(
            index,
            self._echoes[index] + output.text,
            self._logprobs(output.logprobs),
            output.finish_reason,
        )

    def chunks(
        self, index: int, delta: OutputDelta, *, is_first: bool
    ) -> Sequence[CompletionChoice]:
        """Return text, with the finish reason on the last piece."""
        text = self._echoes[index] + delta.text if is_first else delta.text
        if not text and not delta.logprobs and delta.finish_reason is None:
            return ()
        return (CompletionChoice(index, text, self._logprobs(delta.logprobs), delta.finish_reason),)

    def _logprobs(self, logprobs: Sequence[OutputLogprob]) -> CompletionLogprobs | None:
        if not self._has_logprobs:
            return None
        return CompletionLogprobs(
            tokens=[self._token(found.token_id) for found in logprobs],
            token_logprobs=[max(found.logprob, LEAST_LOGPROB) for found in logprobs],
            top_logprobs=[
                {
                    self._token(token_id): max(logprob, LEAST_LOGPROB)
                    for token_id, logprob in ((found.token_id, found.logprob), *found.top)
                }
                for found in logprobs
            ],
            text_offset=[found.text_offset for found in logprobs],
        )

    def _token(self, token_id: int) -> str:
        r"""Return a token's text; one with half a character as OpenAI writes it, bytes:\xe2."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
