"""Which form an answer must have: what a request says of it as a grammar for nodes.

A grammar is checked here, before anything is queued. llguidance is imported when the first
request asks for one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from router.errors import Refused, cut
from router.schema import GenerationBody, ResponseFormat

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

MAX_SCHEMA_CHARACTERS = 65_536
"""Of a JSON schema without white space. Compiling one of this size took up to 0.2 s of one busy
core (AMD EPYC), on each node that serves it."""

MAX_REGEX_CHARACTERS = 4_096

MAX_SHOWN_PROBLEM = 240
"""Characters of what llguidance says, which repeats a part of what the client sent."""

# On one line, as models write JSON most often: with any white space allowed, small models are lost
# in endless white space. A keyword that cannot be enforced is an error, whatever the schema says.
_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


async def asked_grammar(body: GenerationBody) -> str | None:
    """Return the grammar that the answers to a request must match; None if they may be anything.

    Raises:
        RequestRejected: the form is invalid, too large or not supported, or contradicts something
            else in the request.
    """
    schema, regex = _json_schema(body.response_format), body.guided_regex
    field = form_field(body)
    if schema is None and regex is None:
        return None
    if schema is not None and regex is not None:
        raise Refused(
            "guided_regex and response_format both say which form the answer has; send one",
            field="guided_regex",
            code="contradiction",
        )
    _refuse_ignored_end(field, ignores_end=bool(body.ignore_eos))
    # Mostly a millisecond, but some are made to take longer.
    return await asyncio.to_thread(_grammar, field, schema=schema, regex=regex)


@dataclass(frozen=True, slots=True)
class FunctionForm:
    """What a call of one function looks like."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments."""

    field: str
    """Where in the request that stands."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """What an answer with calls looks like."""

    call_start: str
    call_end: str
    functions: tuple[FunctionForm, ...]
    must_call: bool
    """Calls are all that there is; otherwise text may stand around them."""

    max_calls: int | None
    """1, or None for any number."""

    token_tags: frozenset[str] = frozenset()
    """Tags that are tokens of their own. llguidance takes such tokens for special, which do not
    match their text."""


async def calls_grammar(form: CallForm, *, ignores_end: bool) -> str:
    """Return the grammar of answers with calls.

    Raises:
        RequestRejected: a schema is invalid, too large or not supported, or the answer is not to
            end.
    """
    _refuse_ignored_end("tools", ignores_end=ignores_end)
    return await asyncio.to_thread(_calls_grammar, form)


def _refuse_ignored_end(field: str, *, ignores_end: bool) -> None:
    if ignores_end:
        raise Refused(
            f"ignore_eos cannot be combined with {field}: an answer of a given form ends",
            field="ignore_eos",
        )


def form_field(body: GenerationBody) -> str:
    """Return which parameter says the form of the answers."""
    return "response_format" if body.guided_regex is None else "guided_regex"


def _json_schema(form: ResponseFormat | None) -> str | None:
    """Return the JSON schema of a `response_format`; None if any text will do."""
    if form is None:
        return None
    if form.type != "json_schema" and form.json_schema is not None:
        raise Refused(
            f"response_format.json_schema needs the type 'json_schema', found {form.type!r}",
            field="response_format.json_schema",
        )
    match form.type:
        case "text":
            return None
        case "json_object":
            return '{"type":"object"}'
        case "json_schema":
            if form.json_schema is None:
                raise Refused(
                    "response_format.json_schema is missing, the type 'json_schema' requires it",
                    field="response_format.json_schema",
                    code="missing_required_parameter",
                )
            return json.dumps(form.json_schema.schema_object, separators=(",", ":"))


def _grammar(field: str, *, schema: str | None, regex: str | None) -> str:
    """Return the checked grammar of a JSON schema or a regular expression, one of which is None."""
    text, limit = schema, MAX_SCHEMA_CHARACTERS
    if text is None:
        text, limit = regex, MAX_REGEX_CHARACTERS
    assert text is not None
    if len(text) > limit:
        raise Refused(
            f"{field} has {len(text):,} characters, at most {limit:,} are taken; shorten it",
            field=field,
            code="invalid_value",
        )
    matcher = _matcher_type(field)
    try:
        grammar = (
            matcher.grammar_from_regex(text)
            if schema is None
            else matcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
        )
    except ValueError as error:  # of a schema that is nested too deeply
        raise _unusable(field, str(error)) from error
    problem = matcher.validate_grammar(grammar)
    if problem:
        raise _unusable(field, problem)
    return grammar


def _calls_grammar(form: CallForm) -> str:
    """Return the checked grammar of answers with calls."""
    num_characters = 0
    for function in form.functions:
        schema = json.dumps(function.parameters, separators=(",", ":"))
        num_characters += len(schema)
        _grammar(function.field, schema=schema, regex=None)  # or says what is wrong with it
    if num_characters > MAX_SCHEMA_CHARACTERS:
        raise Refused(
            f"the parameters of tools have {num_characters:,} characters together, at most "
            f"{MAX_SCHEMA_CHARACTERS:,} are taken; shorten them",
            field="tools",
            code="invalid_value",
        )
    matcher = _matcher_type("tools")
    grammar = matcher.grammar_from_lark(_lark(form))
    problem = matcher.validate_grammar(grammar)
    if problem:
        raise _unusable("tools", problem)
    return grammar


def _lark(form: CallForm) -> str:
    """Return the grammar of answers with calls in llguidance's dialect of Lark."""
    spelled, line_end = json.dumps(form.call_start), json.dumps("\n")
    start_tag, end_tag = (
        tag if tag in form.token_tags else json.dumps(tag)
        for tag in (form.call_start, form.call_end)
    )
    functions = []
    for index, function in enumerate(form.functions):
        head = json.dumps(f'{{"name": "{function.name}", "arguments": ')
        parameters = json.dumps({**function.parameters, "x-guidance": _JSON_OPTIONS})
        functions.append(f'function_{index}: {head} %json {parameters} "}}"')
    names = " | ".join(f"function_{index}" for index in range(len(functions)))
    if form.must_call:
        more = "" if form.max_calls == 1 else f" ({line_end} call)*"
        rules = [f"start: call{more}", f"call: {start_tag} inside"]
    else:
        calls = "begun inside | text" if form.max_calls == 1 else "(begun inside)* text"
        rules = [
            f"start: {calls}",
            "begun: until_tag" if start_tag == spelled else f"begun: text {start_tag} | until_tag",
            # A lazy terminal ends with the first tag, so that text does not run on over it.
            f"until_tag[lazy]: /(.|\\n)*/ {spelled}",
            "text: /(.|\\n)*/",
        ]
    rules.append(f"inside: {line_end} ({names}) {line_end} {end_tag}")
    return "\n".join([*rules, *functions])


def _matcher_type(field: str) -> type[LLMatcher]:
    """Return what makes and checks grammars."""
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise Refused(
            f"{field} needs the package llguidance, which this router does not have; install it, "
            "or leave the parameter out",
            field=field,
            code="unsupported_parameter",
        ) from error
    return LLMatcher


def _unusable(field: str, problem: str) -> Refused:
    return Refused(
        f"{field} cannot be used: {cut(' '.join(problem.split()), MAX_SHOWN_PROBLEM)}",
        field=field,
        code="invalid_value",
    )
