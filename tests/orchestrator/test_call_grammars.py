"""Where functions must be called, whatever a model wants to say becomes valid calls."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from orchestrator.grammars import GrammarCompiler
from orchestrator.sampling import Sampler
from router.config import ToolCallsConfig
from router.schema import ChatCompletionBody
from router.tokenizer import Tokenizer
from router.tool_calling import OfferedTools, ToolCalling
from router.tool_parser import CallPiece, Item
from tests.forms import END_TOKEN, VOCAB_SIZE, tiny_tokenizer
from tests.orchestrator.test_grammars import guided_request, write

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "unit": {"$ref": "#/$defs/unit"},
        "city": {"type": "string", "maxLength": 5, "description": '%json {"}\n'},
        "days": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 2},
    },
    "required": ["unit", "city"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "</tool_call>"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.fixture(scope="module", params=["a token of its own", "text"])
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, GrammarCompiler]:
    """The tiny tokenizer, with <tool_call> as the parameter says."""
    folder = tmp_path_factory.mktemp("engine")
    tokenizer, compiler = tiny_tokenizer(folder)
    if request.param == "text":
        path = folder / "tokenizer.json"
        described = json.loads(path.read_text())
        described["added_tokens"] = [t for t in described["added_tokens"] if t["special"]]
        path.write_text(json.dumps(described))
        tokenizer = Tokenizer.from_engine_dir(folder)
        compiler = GrammarCompiler(folder, vocab_size=VOCAB_SIZE, end_token_ids=[END_TOKEN])
    assert tokenizer.has_added_token("<tool_call>") == (request.param != "text")
    return tokenizer, compiler


def offered(tokenizer: Tokenizer, **fields: Any) -> OfferedTools:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    found = asyncio.run(
        ToolCalling(ToolCallsConfig(), tokenizer).offered(
            ChatCompletionBody.model_validate(body | fields)
        )
    )
    assert found is not None
    return found


def calls_in(items: list[Item]) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for item in items:
        if isinstance(item, CallPiece):
            name, before = (item.name, "") if item.name is not None else calls.pop()
            calls.append((name, before + item.arguments))
    return calls


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        pytest.param({"tool_choice": "required"}, {"weather", "clock"}, id="required"),
        pytest.param(
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
            {"weather"},
            id="by name",
        ),
    ],
)
def test_calls_that_must_come_are_valid(
    tiny: tuple[Tokenizer, GrammarCompiler], fields: dict[str, Any], names: set[str]
) -> None:
    tokenizer, compiler = tiny
    tools = offered(tokenizer, **fields, parallel_tool_calls=False)
    assert tools.grammar is not None
    called = set()
    for seed in range(8):
        request = guided_request(tools.grammar)
        token_ids = write(Sampler(VOCAB_SIZE, compiler), request, seed=1000 * seed)
        parser = tools.parser()
        items = parser.add(tokenizer.decode(token_ids)) + parser.finish()

        ((name, arguments),) = calls_in(items)
        assert not any(isinstance(item, str) for item in items)
        if name == "weather":
            jsonschema.validate(json.loads(arguments), SCHEMA)
        else:
            assert json.loads(arguments) == {}
        called.add(name)

    assert called == names


@pytest.mark.parametrize(
    ("written", "is_allowed"),
    [
        ("Hello <tool> you", True),
        ('Hm <tool_call>\n{"name": "clock", "arguments": {"any": [1]}}\n</tool_call> so', True),
        ('<tool_call>\n{"name": "weather", "arguments": {"unit": "C", "city": ""}}\n', True),
        ("Hm <tool_call>{", False),
        ('Hm <tool_call>\n{"name": "rm"', False),
        ('<tool_call>\n{"name": "weather", "arguments": {"city"', False),
    ],
)
def test_with_a_strict_function_only_calls_are_bound(
    tiny: tuple[Tokenizer, GrammarCompiler], written: str, *, is_allowed: bool
) -> None:
    """Text is free, and so are the arguments of a function that is not strict."""
    tokenizer, compiler = tiny
    grammar = offered(tokenizer).grammar
    assert grammar is not None
    token_ids = tokenizer.encode(written, add_special_tokens=False)

    num_taken = compiler.new_matcher(grammar).try_consume_tokens(token_ids)

    assert (num_taken == len(token_ids)) == is_allowed
