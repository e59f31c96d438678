"""How models write tool calls, as data, and conversations with tools for templates without any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way of writing calls: JSON with a name and arguments between two tags."""

    call_start: str
    call_end: str
    result_start: str
    result_end: str
    preamble: str
    """Tells a model of its tools and of this format; has the field `tools`."""

    def call_text(self, call: Mapping[str, Any]) -> str:
        """Return a call, {"name": ..., "arguments": ...}, as the model writes it."""
        return f"{self.call_start}\n{_json(call)}\n{self.call_end}"

    def result_text(self, result: Mapping[str, Any]) -> str:
        """Return a call's result as the model reads it."""
        return f"{self.result_start}\n{_json(result)}\n{self.result_end}"

    def preamble_text(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Return what tells a model of these tools."""
        return self.preamble.format(tools="\n".join(map(_json, tools)))


# The format that Nous Research trained Hermes 2 Pro on; Qwen and SmolLM2 write the same tags.
HERMES = ToolFormat(
    call_start="<tool_call>",
    call_end="</tool_call>",
    result_start="<tool_response>",
    result_end="</tool_response>",
    preamble=(
        "You can call functions to help with the user's request. Their signatures, one in each "
        "line, are:\n<tools>\n{tools}\n</tools>\n\n"
        "To call one, write a JSON object with its name and its arguments between tags, as "
        "here:\n<tool_call>\n"
        '{{"name": "function-name", "arguments": {{"argument-name": "value"}}}}\n</tool_call>\n'
        "Write one such block for each call, and nothing behind the last one. The results are "
        "given to you between <tool_response> tags. Without need of a function, just answer."
    ),
)


def without_tool_roles(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tool_format: ToolFormat,
) -> list[dict[str, Any]]:
    """Return a conversation, as templates with tools know it, for a template without them.

    The tools are told in the system's message, calls are part of what the assistant said, and
    results, those in a row as one message, come from the user.
    """
    plain: list[dict[str, Any]] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            result = {"name": message["name"], "content": message["content"]}
            text = tool_format.result_text(result)
            if was_result:
                plain[-1]["content"] += f"\n{text}"
            else:
                plain.append({"role": "user", "content": text})
        else:
            calls = [call["function"] for call in message.get("tool_calls", ())]
            texts = [message["content"], *map(tool_format.call_text, calls)]
            content = "\n".join(filter(None, texts))
            plain.append({"role": message["role"], "content": content})
        was_result = is_result
    if tools:
        preamble = tool_format.preamble_text(tools)
        if plain and plain[0]["role"] == "system":
            plain[0]["content"] = f"{plain[0]['content']}\n\n{preamble}"
        else:
            plain.insert(0, {"role": "system", "content": preamble})
    return plain


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
