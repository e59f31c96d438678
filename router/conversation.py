"""Conversations as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from router.body_types import Body, RefusedKind, RefusedUnless, kind_of_text


class TextPart(Body):
    """Part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is rendered as `system`: models that are served here know only that."""

    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<list>")]
        | Annotated[Any, RefusedKind("a string or an array of text parts"), Tag("<other>")],
        Discriminator(kind_of_text),
    ]
    """Text, or parts of text that are joined without anything in between."""

    name: Annotated[Any, RefusedUnless()] = None
    refusal: Annotated[Any, RefusedUnless()] = None
    audio: Annotated[Any, RefusedUnless()] = None
    annotations: Annotated[Any, RefusedUnless([])] = None
    function_call: Annotated[Any, RefusedUnless()] = None
    tool_calls: Annotated[Any, RefusedUnless([])] = None
    tool_call_id: Annotated[Any, RefusedUnless()] = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)
