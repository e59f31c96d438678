"""What the tools of a request mean: what the model is told, what it may write, how that is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from router.config import ToolCallsConfig
from router.conversation import (
    AssistantMessage,
    FunctionBody,
    Message,
    NamedToolChoice,
    ToolBody,
    ToolCallBody,
    ToolMessage,
    joined,
)
from router.errors import Refused
from router.output_form import CallForm, FunctionForm, calls_grammar
from router.schema import ChatCompletionBody
from router.tokenizer import Tokenizer
from router.tool_format import HERMES, ToolFormat, without_tool_roles
from router.tool_parser import ToolCallParser

_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}
_ROLES = {"developer": "system"}


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation as a chat template knows it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def num_characters(self) -> int:
        """About how long it is."""
        return sum(len(m["content"]) for m in self.messages) + len(str(self.tools or ""))


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """The functions that the answers to a request may call."""

    tool_format: ToolFormat
    names: tuple[str, ...]
    max_calls: int | None
    """In one answer; None leaves that to the model."""

    grammar: str | None
    """What all answers must match; None if they may be any text."""

    def parser(self) -> ToolCallParser:
        """Return what reads one answer."""
        return ToolCallParser(self.tool_format, self.names, max_calls=self.max_calls)


class ToolCalling:
    """How one model calls functions."""

    def __init__(self, config: ToolCallsConfig, tokenizer: Tokenizer) -> None:
        self._format = HERMES
        self._template_knows_tools = tokenizer.template_knows_tools
        tags = (self._format.call_start, self._format.call_end)
        self._token_tags = frozenset(tag for tag in tags if tokenizer.has_added_token(tag))
        self._obstacle = _obstacle(config, tokenizer, self._format)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[ToolBody] | None = None
    ) -> ChatPrompt:
        """Return what the model is told.

        Raises:
            RequestRejected: a message is wrong, or there are tools and the model has no use of
                them.
        """
        rendered = _rendered(messages)
        has_tools = tools or any("tool_calls" in m or m["role"] == "tool" for m in rendered)
        if not has_tools:
            return ChatPrompt(rendered)
        self._check(field="tools" if tools else "messages")
        shown = [_shown(tool.function) for tool in tools or ()]
        if self._template_knows_tools:
            return ChatPrompt(rendered, shown or None)
        return ChatPrompt(without_tool_roles(rendered, shown, self._format))

    async def offered(self, body: ChatCompletionBody) -> OfferedTools | None:
        """Return the functions that a request lets the model call; None if there are none.

        Raises:
            RequestRejected: they contradict something else in the request, or cannot be enforced.
        """
        tools, choice = body.tools or (), body.tool_choice
        if not tools:
            _refuse_without_tools(body)
            return None
        functions = {tool.function.name: tool.function for tool in tools}
        if len(functions) < len(tools):
            names = [tool.function.name for tool in tools]
            twice = next(name for name in names if names.count(name) > 1)
            raise Refused(
                f"tools has the function {twice!r} twice; send it once",
                field="tools",
                code="contradiction",
            )
        if isinstance(choice, NamedToolChoice) and choice.function.name not in functions:
            raise Refused(
                f"tool_choice names the function {choice.function.name!r}, tools has "
                f"{', '.join(functions)}",
                field="tool_choice",
                code="invalid_value",
            )
        if choice == "none":
            return None
        self._check(field="tools")
        _refuse_other_forms(body)
        must_call = choice == "required" or isinstance(choice, NamedToolChoice)
        max_calls = 1 if body.parallel_tool_calls is False else None
        if isinstance(choice, NamedToolChoice):
            functions, max_calls = {choice.function.name: functions[choice.function.name]}, 1
        grammar = None
        if must_call or any(function.strict for function in functions.values()):
            grammar = await calls_grammar(
                self._call_form(tools, functions, must_call=must_call, max_calls=max_calls),
                ignores_end=bool(body.ignore_eos),
            )
        return OfferedTools(self._format, tuple(functions), max_calls, grammar)

    def _call_form(
        self,
        tools: Sequence[ToolBody],
        functions: Mapping[str, FunctionBody],
        *,
        must_call: bool,
        max_calls: int | None,
    ) -> CallForm:
        """Return the form of an answer that calls `functions`, which are among the tools."""
        forms = []
        for index, tool in enumerate(tools):
            function = tool.function
            if function.name in functions:
                is_kept = function.strict is not False if must_call else function.strict
                forms.append(
                    FunctionForm(
                        function.name,
                        _checked_parameters(function, f"tools[{index}].function.parameters")
                        if is_kept
                        else {"type": "object"},
                        field=f"tools[{index}].function.parameters",
                    )
                )
        return CallForm(
            self._format.call_start,
            self._format.call_end,
            tuple(forms),
            must_call=must_call,
            max_calls=max_calls,
            token_tags=self._token_tags,
        )

    def _check(self, *, field: str) -> None:
        if self._obstacle is not None:
            raise Refused(
                f"{field}: this model cannot call functions here: {self._obstacle}",
                field=field,
                code="unsupported_parameter",
            )


def _obstacle(config: ToolCallsConfig, tokenizer: Tokenizer, tool_format: ToolFormat) -> str | None:
    """Return why the model cannot call functions; None if it can."""
    if config.format == "none":
        return "the router's configuration turns them off (tool_calls.format is none)"
    tag = tool_format.call_start
    if tokenizer.template_knows_tools and tag not in (tokenizer.chat_template or ""):
        return (
            f"the model's chat template does not write calls as {tag}, the only format that is "
            "read here"
        )
    if tokenizer.has_special_token(tag):
        return f"{tag} is a special token of the model, which its text does not show"
    return None


def _refuse_without_tools(body: ChatCompletionBody) -> None:
    if body.tool_choice not in (None, "none"):
        raise Refused("tool_choice needs tools; send some, or leave it out", field="tool_choice")
    if body.parallel_tool_calls is not None:
        raise Refused(
            "parallel_tool_calls needs tools; send some, or leave it out",
            field="parallel_tool_calls",
        )


def _refuse_other_forms(body: ChatCompletionBody) -> None:
    """Refuse a form for answers that may be calls."""
    form = body.response_format
    for field, is_given in (
        ("response_format", form is not None and form.type != "text"),
        ("guided_regex", body.guided_regex is not None),
    ):
        if is_given:
            raise Refused(
                f"{field} cannot be combined with tools: a call has a form of its own; leave one "
                "of them out, or set tool_choice to 'none'",
                field=field,
                code="contradiction",
            )


def _checked_parameters(function: FunctionBody, field: str) -> Mapping[str, Any]:
    """Return the schema of a function's arguments, to be kept to."""
    if not function.parameters:
        return {**_NO_ARGUMENTS, "additionalProperties": False}
    if function.parameters.get("type") != "object":
        raise Refused(
            f"{field} must have the type 'object': arguments have names", field=f"{field}.type"
        )
    return function.parameters


def _shown(function: FunctionBody) -> dict[str, Any]:
    """Return a function as chat templates know it."""
    described = {
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters or _NO_ARGUMENTS,
    }
    return {
        "type": "function",
        "function": {key: value for key, value in described.items() if value is not None},
    }


def _rendered(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages as chat templates know them, after a look at what refers to what."""
    rendered: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        found: dict[str, Any] = {
            "role": _ROLES.get(message.role, message.role),
            "content": joined(message.content),
        }
        match message:
            case AssistantMessage(tool_calls=[_, *_] as calls):
                names.update((call.id, call.function.name) for call in calls)
                found["tool_calls"] = [
                    _rendered_call(call, f"{field}.tool_calls[{position}]")
                    for position, call in enumerate(calls)
                ]
            case AssistantMessage(content=None):
                raise Refused(
                    f"{field}.content is missing, it is required where there are no tool_calls",
                    field=f"{field}.content",
                    code="missing_required_parameter",
                )
            case ToolMessage(tool_call_id=call_id):
                if call_id not in names:
                    raise Refused(
                        f"{field}.tool_call_id is not the id of a call in a message before it",
                        field=f"{field}.tool_call_id",
                        code="invalid_value",
                    )
                found |= {"name": names[call_id], "tool_call_id": call_id}
        rendered.append(found)
    return rendered


def _rendered_call(call: ToolCallBody, field: str) -> dict[str, Any]:
    text = call.function.arguments
    try:
        arguments = from_json(text, allow_inf_nan=False) if text.strip() else {}
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise Refused(
            f"{field}.function.arguments is not a JSON object; send one, as text",
            field=f"{field}.function.arguments",
            code="invalid_value",
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
