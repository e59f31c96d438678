"""Answers /tokenize and /detokenize: what a text is to the model, without generating any.

Bodies and answers have the shape of vLLM's routes of these names.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from router.errors import Refused
from router.schema import DetokenizeBody, TokenizeBody
from router.tokenizer import Tokenizer
from router.tool_calling import ToolCalling
from router.translation import model_not_found, off_loop_if_long


class TokenizeAnswer(msgspec.Struct, frozen=True):
    """Tokens of a prompt."""

    count: int
    max_model_len: int
    """Tokens of prompt and answer together."""

    tokens: list[int]
    token_strs: list[str] | None = None
    """None unless asked for."""


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """Text of tokens."""

    prompt: str


class Tokenization:
    """Counts and translates tokens of the served model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tool_calling: ToolCalling,
        *,
        model: str,
        max_model_len: Callable[[], int],
    ) -> None:
        """`max_model_len` is asked for each answer; it may raise NodeUnavailable."""
        self._tokenizer = tokenizer
        self._tool_calling = tool_calling
        self._model = model
        self._max_model_len = max_model_len

    async def tokenize(self, body: TokenizeBody) -> TokenizeAnswer:
        """Return the tokens that a generation would begin with.

        Raises:
            RequestRejected: there is no such model, not one prompt, or it cannot be tokenized.
            NodeUnavailable: no node has said yet what it can serve.
        """
        self._check_model(body.model)
        max_model_len = self._max_model_len()
        tokens = await self._tokens(body)
        strings = (
            [self._tokenizer.token_text(i) for i in tokens] if body.return_token_strs else None
        )
        return TokenizeAnswer(len(tokens), max_model_len, tokens, strings)

    async def detokenize(self, body: DetokenizeBody) -> DetokenizeAnswer:
        """Return the text of tokens, special ones by their names.

        Raises:
            RequestRejected: there is no such model, or no such token.
        """
        self._check_model(body.model)
        limit = self._tokenizer.vocab_size
        if max(body.tokens, default=0) >= limit:
            raise Refused(
                f"tokens has token id {max(body.tokens):,}, the model's ids are below {limit:,}",
                field="tokens",
            )
        text = await off_loop_if_long(
            len(body.tokens), lambda: self._tokenizer.text_of(body.tokens)
        )
        return DetokenizeAnswer(text)

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._model:
            raise model_not_found(model, served=self._model)

    async def _tokens(self, body: TokenizeBody) -> list[int]:
        prompt, messages = body.prompt, body.messages
        if prompt is not None and messages is None:
            if body.add_generation_prompt is not None:
                raise Refused("add_generation_prompt needs messages", field="add_generation_prompt")
            if body.tools:
                raise Refused("tools needs messages", field="tools")
            return await off_loop_if_long(
                len(prompt),
                lambda: self._tokenizer.encode(
                    prompt, add_special_tokens=body.add_special_tokens is not False
                ),
            )
        if messages is not None and prompt is None:
            if body.add_special_tokens:
                raise Refused(
                    "add_special_tokens must not be true with messages: the chat template writes "
                    "all special tokens",
                    field="add_special_tokens",
                )
            chat = self._tool_calling.prompt(messages, body.tools)
            return await off_loop_if_long(
                chat.num_characters,
                lambda: self._tokenizer.encode_chat(
                    chat.messages,
                    tools=chat.tools,
                    add_generation_prompt=body.add_generation_prompt is not False,
                ),
            )
        raise Refused("there must be either a prompt or messages; send one of them", field="prompt")
