"""Conversations and tools as clients send them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from router.body_types import Body, RefusedKind, RefusedUnless, kind_of_text

MAX_TOOLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(Body):
    """Part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<list>")]
    | Annotated[Any, RefusedKind("a string or an array of text parts"), Tag("<other>")],
    Discriminator(kind_of_text),
]
"""Text, or parts of text that are joined without anything in between."""


def joined(content: str | list[TextPart] | None) -> str:
    """Return content as one string."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _check_role(value: object) -> object:
    """Name every role; the field's own type knows those of one kind of message."""
    if value in ("system", "developer", "user"):
        return value
    raise PydanticCustomError(
        "literal_error",
        "{expected}",
        {"expected": "'system', 'developer', 'user', 'assistant' or 'tool'"},
    )


class TextMessage(Body):
    """A message of the system or the user."""

    role: Annotated[Literal["system", "developer", "user"], BeforeValidator(_check_role)]
    """`developer` is rendered as `system`: models that are served here know only that."""

    content: Content
    name: Annotated[Any, RefusedUnless()] = None
    refusal: Annotated[Any, RefusedUnless()] = None
    audio: Annotated[Any, RefusedUnless()] = None
    annotations: Annotated[Any, RefusedUnless([])] = None
    function_call: Annotated[Any, RefusedUnless()] = None
    tool_calls: Annotated[Any, RefusedUnless([])] = None
    tool_call_id: Annotated[Any, RefusedUnless()] = None


class CalledFunction(Body):
    """Which function was called, and how."""

    name: FunctionName
    arguments: str
    """A JSON object, as text; nothing stands for one without members."""


class ToolCallBody(Body):
    """A call that an assistant made."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Body):
    """What the model answered before."""

    role: Literal["assistant"]
    content: Content | None = None
    """Required unless there are calls."""

    tool_calls: list[ToolCallBody] | None = None
    """Calls of functions, in order."""

    name: Annotated[Any, RefusedUnless()] = None
    refusal: Annotated[Any, RefusedUnless()] = None
    audio: Annotated[Any, RefusedUnless()] = None
    annotations: Annotated[Any, RefusedUnless([])] = None
    function_call: Annotated[Any, RefusedUnless()] = None
    tool_call_id: Annotated[Any, RefusedUnless()] = None


class ToolMessage(Body):
    """What a call has given."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    """The id of a call in a message before."""

    name: Annotated[Any, RefusedUnless()] = None


def _kind_of_message(value: object) -> str:
    role = value.get("role") if isinstance(value, dict) else None
    return f"<{role}>" if role in ("assistant", "tool") else "<text>"


Message = Annotated[
    Annotated[TextMessage, Tag("<text>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(_kind_of_message),
]
"""One message of a conversation."""


class FunctionBody(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    """What the model is told of it."""

    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments, of type `object`; none and an empty one allow none."""

    strict: bool | None = None
    """True: arguments follow the schema whenever the function is called. False: where the model
    must call a function, they may be any object."""


class ToolBody(Body):
    """Something that the model may use."""

    type: Literal["function"]
    function: FunctionBody


class ChosenFunction(Body):
    """A function by its name."""

    name: FunctionName


class NamedToolChoice(Body):
    """The function that the model must call."""

    type: Literal["function"]
    function: ChosenFunction


def _kind_of_choice(value: object) -> str:
    match value:
        case str():
            return "<word>"
        case dict():
            return "<function>"
        case _:
            return "<other>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedToolChoice, Tag("<function>")]
    | Annotated[
        Any, RefusedKind("'none', 'auto', 'required' or a function by name"), Tag("<other>")
    ],
    Discriminator(_kind_of_choice),
]

ToolList = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)]
