"""Which form an answer must have: `response_format` and `guided_regex` as grammars for nodes.

A grammar is checked here, before anything is queued. llguidance is imported when the first
request asks for one.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from router.errors import Refused, cut
from router.schema import GenerationBody, ResponseFormat

if TYPE_CHECKING:
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
    if body.ignore_eos:
        raise Refused(
            f"ignore_eos cannot be combined with {field}: an answer of a given form ends",
            field="ignore_eos",
        )
    # Mostly a millisecond, but some are made to take longer.
    return await asyncio.to_thread(_grammar, field, schema=schema, regex=regex)


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
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise Refused(
            f"{field} needs the package llguidance, which this router does not have; install it, "
            "or leave the parameter out",
            field=field,
            code="unsupported_parameter",
        ) from error
    try:
        grammar = (
            LLMatcher.grammar_from_regex(text)
            if schema is None
            else LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
        )
    except ValueError as error:  # of a schema that is nested too deeply
        raise _unusable(field, str(error)) from error
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        raise _unusable(field, problem)
    return grammar


def _unusable(field: str, problem: str) -> Refused:
    return Refused(
        f"{field} cannot be used: {cut(' '.join(problem.split()), MAX_SHOWN_PROBLEM)}",
        field=field,
        code="invalid_value",
    )
