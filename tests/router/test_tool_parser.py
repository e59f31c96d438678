"""What is a call, what is content, and that it does not matter how the text arrives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.tool_format import HERMES
from router.tool_parser import Item, ToolCallParser

NAMES = ("get", "ping")
START, END = "<tool_call>", "</tool_call>"


@dataclass
class Answer:
    """What a client makes of the items."""

    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    num_items: int = 0

    def take(self, items: Iterable[Item]) -> None:
        for item in items:
            self.num_items += 1
            if isinstance(item, str):
                assert item, "empty text is not delivered"
                self.content += item
            elif item.name is not None:
                assert item.index == len(self.calls), "a new call has the next index"
                self.calls.append((item.name, item.arguments))
            else:
                assert item.index == len(self.calls) - 1
                assert item.arguments, "empty pieces are not delivered"
                name, arguments = self.calls[-1]
                self.calls[-1] = (name, arguments + item.arguments)


def parsed(chunks: Sequence[str], *, max_calls: int | None = None) -> tuple[Answer, ToolCallParser]:
    parser = ToolCallParser(HERMES, NAMES, max_calls=max_calls)
    answer = Answer()
    for chunk in chunks:
        answer.take(parser.add(chunk))
    answer.take(parser.finish())
    return answer, parser


def call(arguments: str, name: str = "get") -> str:
    return f'{START}\n{{"name": "{name}", "arguments": {arguments}}}\n{END}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        pytest.param("Hello <tool> you", "Hello <tool> you", [], id="no call"),
        pytest.param(" \n", " \n", [], id="white space alone"),
        pytest.param(call('{"a": 1}'), "", [("get", '{"a": 1}')], id="a call"),
        pytest.param(
            f"Well.\n{call('{}')}", "Well.\n", [("get", "{}")], id="content before a call"
        ),
        pytest.param(
            f"\n{call('{}')}\n\n{call('{}', 'ping')}\n",
            "",
            [("get", "{}"), ("ping", "{}")],
            id="white space around calls",
        ),
        pytest.param(f"{call('{}')}\nDone", "\nDone", [("get", "{}")], id="content behind a call"),
        pytest.param(
            call('{"a": "</tool_call>}\\"", "b": [{"c": "é😀"}]}'),
            "",
            [("get", '{"a": "</tool_call>}\\"", "b": [{"c": "é😀"}]}')],
            id="tags and brackets in a string",
        ),
        pytest.param(
            f'{START}{{"name":"get","arguments":{{ }} }}{END}',
            "",
            [("get", "{ }")],
            id="other spacing",
        ),
        pytest.param(
            f'{START}{{"arguments": {{"a": 1.5}}, "name": "get"}}{END}',
            "",
            [("get", '{"a": 1.5}')],
            id="arguments first",
        ),
        pytest.param(f'{START}{{"name": "ping"}}{END}', "", [("ping", "{}")], id="no arguments"),
        pytest.param(
            f'{START}[{{"name": "ping"}}, {{"name": "get", "arguments": {{}}}}]{END}',
            "",
            [("ping", "{}"), ("get", "{}")],
            id="an array of calls",
        ),
        pytest.param(call("{}", "rm"), call("{}", "rm"), [], id="an unknown function"),
        pytest.param(call('"{}"'), call('"{}"'), [], id="arguments that are no object"),
        pytest.param(call("7"), call("7"), [], id="arguments that are a number"),
        pytest.param(
            f'{START}{{"name": "get", }}{END}', f'{START}{{"name": "get", }}{END}', [], id="no JSON"
        ),
        pytest.param(f"{START}[]{END}", f"{START}[]{END}", [], id="an empty array"),
        pytest.param(f"{START}{'[' * 9999}{END}", f"{START}{'[' * 9999}{END}", [], id="depth"),
        pytest.param(
            f'{START}{{"name": "get", "arguments": {{"a": 1e999}}, "b": 1}}{END}',
            f', "b": 1}}{END}',
            [("get", '{"a": 1e999}')],
            id="more than name and arguments",
        ),
        pytest.param(
            call('{"a": 1]}') + "Hm",
            "Hm",
            [("get", '{"a": 1]}}\n')],
            id="wrong brackets: arguments go to the end tag",
        ),
        pytest.param(
            call('{"a": "x}') + call("{}"),
            "",
            [("get", '{"a": "x}}\n'), ("get", "{}")],
            id="an open string ends with the line",
        ),
        pytest.param(
            f'{START}{{"name": "get", "arguments": {{"a": 1{END}',
            "",
            [("get", '{"a": 1')],
            id="brackets missing",
        ),
        pytest.param(
            f'{START}{{"name": "get", "arguments": {{}}{END}?',
            f"{END}?",
            [("get", "{}")],
            id="last brace missing",
        ),
        pytest.param(
            f'{START}{{"name": "get", "arguments": {{}}}}\n{call("{}", "ping")}',
            "",
            [("get", "{}"), ("ping", "{}")],
            id="end tag forgotten",
        ),
        pytest.param(f"Hi {START[:-1]}", f"Hi {START[:-1]}", [], id="ends in a start tag"),
        pytest.param(f'{START}{{"nam', f'{START}{{"nam', [], id="ends before its name"),
        pytest.param(f'{START}{{"name": "ping"}}', "", [("ping", "{}")], id="ends without a tag"),
        pytest.param(call("{}") + " ", "", [("get", "{}")], id="ends in white space"),
        pytest.param(
            f"{call('{}')}{START[:4]}", START[:4], [("get", "{}")], id="ends in another tag"
        ),
        pytest.param(call("{}")[:-3], "", [("get", "{}")], id="ends in its end tag"),
        pytest.param(
            call('{"a": tru<</tool', "get")[: -len(END) - 2],
            "",
            [("get", '{"a": tru<</tool')],
            id="ends in broken arguments",
        ),
    ],
)
def test_what_an_answer_holds(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    """Whole, and character by character."""
    for chunks in ([text], list(text)):
        answer, _ = parsed(chunks)

        assert (answer.content, answer.calls) == (content, calls)


def fragments() -> st.SearchStrategy[str]:
    """Texts full of what matters to the parser."""
    json_values = st.recursive(
        st.one_of(st.booleans(), st.integers(), st.text(max_size=4)),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=3,
    )
    arguments = st.dictionaries(st.text(max_size=3), json_values, max_size=2)
    names = st.sampled_from([*NAMES, "rm"])
    whole = st.builds(lambda value, name: call(json.dumps(value), name), arguments, names)
    tags = st.sampled_from([START, END, "</tool", "tool_call>", "<"])
    json_parts = ['{"name": "get", "arguments": ', '{"name": "ping"}', *'{}[]"\\\n aé']
    parts = tags | st.sampled_from(json_parts)
    return st.lists(whole | parts, max_size=12).map("".join)


@given(fragments(), st.data())
def test_how_the_text_is_cut_changes_nothing(text: str, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    bounds = [0, *cuts, len(text)]
    chunks = [text[a:b] for a, b in pairwise(bounds)]
    for max_calls in (None, 1):
        whole, parser = parsed([text], max_calls=max_calls)
        pieces, pieces_parser = parsed(chunks, max_calls=max_calls)

        assert (pieces.content, pieces.calls) == (whole.content, whole.calls)
        assert pieces_parser.is_in_arguments == parser.is_in_arguments
        assert pieces_parser.is_done == parser.is_done
        if START not in text:
            assert whole.content == text


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.lists(st.text())), max_size=3))
def test_valid_arguments_arrive_unchanged(arguments: dict[str, object]) -> None:
    for ensure_ascii in (False, True):
        written = json.dumps(arguments, ensure_ascii=ensure_ascii)
        answer, _ = parsed(list(call(written)))

        assert answer.calls == [("get", written)]
        assert answer.content == ""


def test_only_what_could_begin_a_tag_is_held_back() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    said = "".join(str(item) for item in parser.add("a < b <to") + parser.add("ad>"))

    assert said == "a < b <toad>"
    assert ToolCallParser(HERMES, NAMES).add("a < b <to") == ["a < b "]


def test_a_call_arrives_while_it_is_written() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    parser.add(f'{START}\n{{"name": "get", "arg')
    head = parser.add('uments": {')
    piece = parser.add('"city": "Par')

    assert [(p.index, p.name, p.arguments) for p in (*head, *piece) if not isinstance(p, str)] == [
        (0, "get", ""),
        (0, None, "{"),
        (0, None, '"city": "Par'),
    ]
    assert parser.is_in_arguments


def test_behind_the_last_call_that_is_wanted_nothing_is_delivered() -> None:
    parser = ToolCallParser(HERMES, NAMES, max_calls=1)
    answer = Answer()
    answer.take(parser.add(f"Well {call('{}')}"))
    assert parser.is_done
    answer.take([*parser.add(call("{}") + "more"), *parser.finish()])

    assert (answer.content, answer.calls) == ("Well ", [("get", "{}")])


def test_of_an_array_the_first_calls_count() -> None:
    text = f'{START}[{{"name": "ping"}}, {{"name": "get"}}]{END}'

    answer, parser = parsed([text], max_calls=1)

    assert answer.calls == [("ping", "{}")]
    assert parser.is_done
