"""Bodies and stream events that clients receive, in OpenAI's shapes, and how they are filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from router.output import OutputDelta, OutputLogprob
from router.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; the number that OpenAI uses."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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


class ChatMessage(msgspec.Struct, frozen=True):
    """The model's whole answer."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of the model's answer."""

    role: str | None = None
    content: str | None = None


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

    def __init__(self, tokenizer: Tokenizer, *, has_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs

    def choice(self, index: int, output: ChoiceOutput) -> ChatChoice:
        """Return a whole answer."""
        return ChatChoice(
            index, ChatMessage(output.text), self._logprobs(output.logprobs), output.finish_reason
        )

    def chunks(
        self, index: int, delta: OutputDelta, *, is_first: bool
    ) -> Sequence[ChatChunkChoice]:
        """Return first the role, then text, then the finish reason."""
        found = []
        if is_first:
            found.append(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
        if delta.text or delta.logprobs:
            found.append(
                ChatChunkChoice(
                    index, ChatDelta(content=delta.text), self._logprobs(delta.logprobs)
                )
            )
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
