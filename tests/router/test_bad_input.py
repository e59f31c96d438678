"""What is refused, and in which words. Nothing that a client says is silently ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.router.conftest import RouterFactory, RunningRouter

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "tiny", "prompt": "Hi"}
USER = {"role": "user", "content": "Hi"}


def case(
    name: str,
    changes: dict[str, Any],
    param: str | None,
    *words: str,
    status: int = 400,
    code: str | None = None,
) -> Any:
    return pytest.param(changes, status, param, code, words, id=name)


def form(schema: Any, **changes: Any) -> dict[str, Any]:
    return {"name": "form", "schema": schema, **changes}


def json_form(schema: Any, **changes: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": form(schema, **changes)}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


RESULT = {"role": "tool", "tool_call_id": "c", "content": "x"}


def called(arguments: Any) -> dict[str, Any]:
    """Return a message of an assistant that calls a function."""
    function = {"name": "f", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "a", "type": "function", "function": function}],
    }


def tools(name: str = "f", **function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, **function}}]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def long_schema() -> dict[str, Any]:
    return {"type": "object", "description": "x" * 40_000}


COMMON_CASES = [
    case(
        "unknown model",
        {"model": "gpt-9"},
        "model",
        "'gpt-9'",
        "'tiny'",
        status=404,
        code="model_not_found",
    ),
    case("model of a wrong type", {"model": 5}, "model", "is 5", "a string", code="invalid_type"),
    case("negative temperature", {"temperature": -0.1}, "temperature", "-0.1", "at least 0"),
    case("temperature too high", {"temperature": 2.5}, "temperature", "2.5", "at most 2"),
    case(
        "temperature as text",
        {"temperature": "1"},
        "temperature",
        "'1'",
        "a number",
        code="invalid_type",
    ),
    case("temperature as truth", {"temperature": True}, "temperature", "true", "a number"),
    case("top_p of 0", {"top_p": 0}, "top_p", "0", "above 0"),
    case("top_p above 1", {"top_p": 1.1}, "top_p", "at most 1"),
    case("negative top_k", {"top_k": -1}, "top_k", "-1", "at least 0"),
    case("min_p above 1", {"min_p": 2}, "min_p", "at most 1"),
    case("presence penalty", {"presence_penalty": 3}, "presence_penalty", "3", "at most 2"),
    case("frequency penalty", {"frequency_penalty": -3}, "frequency_penalty", "at least -2"),
    case("repetition penalty", {"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
    case("tiny repetition penalty", {"repetition_penalty": 1e-40}, "repetition_penalty", "1e-40"),
    case("high repetition penalty", {"repetition_penalty": 101}, "repetition_penalty", "at most"),
    case("n of 0", {"n": 0}, "n", "0", "at least 1"),
    case("n too high", {"n": 129}, "n", "129", "128"),
    case("n as fraction", {"n": 1.5}, "n", "1.5", "whole number", code="invalid_type"),
    case("max_tokens of 0", {"max_tokens": 0}, "max_tokens", "0", "at least 1"),
    case(
        "max_tokens over the limit",
        {"max_tokens": 256},
        "max_tokens",
        "256",
        "at most",
        code="context_length_exceeded",
    ),
    case("negative seed", {"seed": -1}, "seed", "-1", "at least 0"),
    case("seed too large", {"seed": 2**63}, "seed", "at most 9223372036854775807"),
    case("empty stop string", {"stop": ""}, "stop", "at least 1 character"),
    case("empty stop string in a list", {"stop": ["a", ""]}, "stop[1]", "at least 1"),
    case("too many stop strings", {"stop": ["a"] * 17}, "stop", "17", "at most 16"),
    case(
        "stop of a wrong type",
        {"stop": 7},
        "stop",
        "7",
        "a string or an array of strings",
        code="invalid_type",
    ),
    case("stop token outside", {"stop_token_ids": [300]}, "stop_token_ids", "300", "below"),
    case("stream as text", {"stream": "yes"}, "stream", "'yes'", "true or false"),
    case("stream options alone", {"stream_options": {}}, "stream_options", "stream"),
    case(
        "unknown stream option",
        {"stream": True, "stream_options": {"usage": True}},
        "stream_options.usage",
        "unknown parameter",
        code="unknown_parameter",
    ),
    case(
        "counts without usage",
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
        "include_usage",
    ),
    case(
        "summary without usage",
        {"stream": True, "serving_summary": True},
        "serving_summary",
        "include_usage",
    ),
    case("form of a wrong type", {"response_format": "json"}, "response_format", "an object"),
    case(
        "unknown form",
        {"response_format": {"type": "xml"}},
        "response_format.type",
        "'xml'",
        "'json_schema'",
    ),
    case(
        "schema missing",
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "missing",
        code="missing_required_parameter",
    ),
    case(
        "schema of another form",
        {"response_format": {"type": "json_object", "json_schema": form({})}},
        "response_format.json_schema",
        "'json_object'",
    ),
    case(
        "schema without a name",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
        "required",
    ),
    case(
        "schema with a bad name",
        json_form({}, name="a b"),
        "response_format.json_schema.name",
        "'a b'",
        "of the form",
    ),
    case("schema that is a list", json_form([]), "response_format.json_schema.schema", "an object"),
    case("unusable schema type", json_form({"type": "strin"}), "response_format", "strin"),
    case(
        "unusable schema keyword", json_form({"uniqueItems": True}), "response_format", "uniqueIt"
    ),
    case("unusable schema reference", json_form({"$ref": "#/x"}), "response_format", "/x"),
    case("unusable schema without values", json_form({"enum": []}), "response_format", "anyOf"),
    case("unusable schema depth", json_form(nested(140)), "response_format", "recursion limit"),
    case(
        "unusable schema size",
        json_form({"enum": ["x" * 70_000]}),
        "response_format",
        "70,013",
        "65,536",
    ),
    case("unusable regex", {"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    case("unusable regex group", {"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    case("unusable regex size", {"guided_regex": "a" * 4097}, "guided_regex", "4,097", "4,096"),
    case("empty regex", {"guided_regex": ""}, "guided_regex", "at least 1"),
    case(
        "unusable regex beside a schema",
        json_form({}) | {"guided_regex": "a"},
        "guided_regex",
        "response_format",
        code="contradiction",
    ),
    case(
        "unusable regex without an end",
        {"guided_regex": "a", "ignore_eos": True},
        "ignore_eos",
        "guided_regex",
    ),
    case("bias too large", {"logit_bias": {"5": 101}}, "logit_bias.5", "101", "at most 100"),
    case("bias too small", {"logit_bias": {"5": -101}}, "logit_bias.5", "-101", "at least -100"),
    case("bias as text", {"logit_bias": {"5": "1"}}, "logit_bias.5", "'1'", "a number"),
    case("bias of no token", {"logit_bias": {"a": 1}}, "logit_bias", "'a'", "token ids"),
    case("bias of a padded id", {"logit_bias": {"05": 1}}, "logit_bias", "'05'", "token ids"),
    case("bias of a token outside", {"logit_bias": {"300": 1}}, "logit_bias", "300", "below"),
    case(
        "too many biases",
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        "logit_bias",
        "at most 1024",
    ),
    case("biases of a wrong type", {"logit_bias": [1]}, "logit_bias", "an array of 1", "an object"),
    case(
        "misspelt parameter",
        {"temprature": 1},
        "temprature",
        "did you mean 'temperature'",
        code="unknown_parameter",
    ),
    case("unknown parameter", {"<x>": 1}, "<x>", "unknown parameter", code="unknown_parameter"),
    case("unknown priority", {"priority": "vip"}, "priority", "'vip'", "high, normal, low"),
    case("priority as number", {"priority": 1}, "priority", "1", "a string"),
    case("objective of 0", {"slo": {"ttft_ms": 0}}, "slo.ttft_ms", "at least 0.001"),
    case("objective of no time", {"slo": {"ttft_ms": 5e-324}}, "slo.ttft_ms", "5e-324", "0.001"),
    case("objective too long", {"slo": {"tpot_ms": 1e9}}, "slo.tpot_ms", "at most 3600000"),
    case("unknown objective", {"slo": {"e2e_ms": 1}}, "slo.e2e_ms", "unknown parameter"),
    case("objectives of a wrong type", {"slo": 5}, "slo", "5", "an object"),
    case("user of a wrong type", {"user": 5}, "user", "5", "a string"),
]

CHAT_CASES = [
    *COMMON_CASES,
    case("no messages", {"messages": []}, "messages", "at least 1"),
    case("messages missing", {"messages": None}, "messages", "null", "an array"),
    case("message of a wrong type", {"messages": ["Hi"]}, "messages[0]", "'Hi'", "an object"),
    case(
        "unknown role",
        {"messages": [{"role": "robot", "content": "x"}]},
        "messages[0].role",
        "'robot'",
        "'user', 'assistant' or 'tool'",
    ),
    case(
        "no content",
        {"messages": [{"role": "user"}]},
        "messages[0].content",
        "required",
        code="missing_required_parameter",
    ),
    case(
        "content of a wrong type",
        {"messages": [USER, {"role": "user", "content": 5}]},
        "messages[1].content",
        "5",
        "text parts",
        code="invalid_type",
    ),
    case(
        "an image",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "'image_url'",
        "'text'",
    ),
    case(
        "a name",
        {"messages": [{**USER, "name": "Bob"}]},
        "messages[0].name",
        "not supported",
        code="unsupported_parameter",
    ),
    case(
        "a message's unknown field",
        {"messages": [{**USER, "mood": "glad"}]},
        "messages[0].mood",
        "unknown parameter",
    ),
    case(
        "an answer without anything",
        {"messages": [USER, {"role": "assistant", "tool_calls": []}]},
        "messages[1].content",
        "tool_calls",
        code="missing_required_parameter",
    ),
    case(
        "a result of nothing",
        {"messages": [RESULT]},
        "messages[0].tool_call_id",
        "a message before",
    ),
    case(
        "a result without an id",
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages[0].tool_call_id",
        "required",
    ),
    case(
        "arguments that are no text",
        {"messages": [called({})]},
        "messages[0].tool_calls[0].function.arguments",
        "an object",
        "a string",
    ),
    case(
        "arguments outside of JSON",
        {"messages": [called("{")]},
        "messages[0].tool_calls[0].function.arguments",
        "a JSON object",
    ),
    case(
        "arguments unlike an object",
        {"messages": [called("[1]")]},
        "messages[0].tool_calls[0].function.arguments",
        "a JSON object",
    ),
    case(
        "arguments of great depth",
        {"messages": [called('{"a":' + "[" * 9999)]},
        "messages[0].tool_calls[0].function.arguments",
        "a JSON object",
    ),
    case("tool without a type", {"tools": [{}]}, "tools[0].type", "required"),
    case("tool of another type", {"tools": [{"type": "custom"}]}, "tools[0].type", "'function'"),
    case("tool with a bad name", {"tools": tools(name="a b")}, "tools[0].function.name", "'a b'"),
    case("tool with an unknown field", {"tools": tools(mood="glad")}, "tools[0].function.mood"),
    case("too many tools", {"tools": tools() * 129}, "tools", "129", "at most 128"),
    case("a tool twice", {"tools": tools() * 2}, "tools", "'f' twice", code="contradiction"),
    case("unknown tool choice", {"tools": tools(), "tool_choice": "any"}, "tool_choice", "'any'"),
    case(
        "tool choice as number", {"tools": tools(), "tool_choice": 1}, "tool_choice", "'required'"
    ),
    case(
        "choice of an absent tool",
        {"tools": tools(), "tool_choice": named("g")},
        "tool_choice",
        "'g'",
        "tools has f",
    ),
    case("tool choice alone", {"tool_choice": "auto"}, "tool_choice", "needs tools"),
    case(
        "parallel calls alone", {"parallel_tool_calls": True}, "parallel_tool_calls", "needs tools"
    ),
    case(
        "tools and a form",
        {"tools": tools(), "response_format": {"type": "json_object"}},
        "response_format",
        "combined with tools",
        code="contradiction",
    ),
    case(
        "tools and a regex",
        {"tools": tools(), "guided_regex": "a"},
        "guided_regex",
        "combined with tools",
        code="contradiction",
    ),
    case(
        "a call that never ends",
        {"tools": tools(), "tool_choice": "required", "ignore_eos": True},
        "ignore_eos",
        "tools",
    ),
    case(
        "unusable parameters",
        {"tools": tools(parameters={"type": "object", "not": {}}), "tool_choice": "required"},
        "tools[0].function.parameters",
        "not",
    ),
    case(
        "unusable parameters of a list",
        {"tools": tools(parameters={"type": "array"}), "tool_choice": "required"},
        "tools[0].function.parameters.type",
        "'object'",
    ),
    case(
        "unusable parameters together",
        {
            "tools": [
                *tools(name="a", parameters=long_schema()),
                *tools(name="b", parameters=long_schema()),
            ],
            "tool_choice": "required",
        },
        "tools",
        "65,536",
    ),
    case("storing", {"store": True}, "store", "not supported"),
    case("service tier", {"service_tier": "priority"}, "service_tier", "not supported"),
    case("alternatives without logprobs", {"top_logprobs": 2}, "top_logprobs", "logprobs"),
    case(
        "too many alternatives",
        {"logprobs": True, "top_logprobs": 21},
        "top_logprobs",
        "21",
        "at most 20",
    ),
    case("logprobs as number", {"logprobs": 2}, "logprobs", "2", "true or false"),
    case(
        "two limits",
        {"max_tokens": 5, "max_completion_tokens": 6},
        "max_tokens",
        "5",
        "6",
        code="contradiction",
    ),
    case(
        "newer limit too high",
        {"max_completion_tokens": 999},
        "max_completion_tokens",
        "999",
        code="context_length_exceeded",
    ),
    case(
        "prompt too long",
        {"messages": [{"role": "user", "content": "x" * 300}]},
        "messages",
        "256",
        "shorten",
        code="context_length_exceeded",
    ),
]

COMPLETION_CASES = [
    *COMMON_CASES,
    case("prompt missing", {"prompt": None}, "prompt", "null", "a string"),
    case(
        "prompt of a wrong type",
        {"prompt": {"text": "Hi"}},
        "prompt",
        "an object",
        code="invalid_type",
    ),
    case("empty prompt", {"prompt": ""}, "prompt", "no tokens"),
    case("no prompts", {"prompt": []}, "prompt", "at least 1"),
    case("an empty one of several", {"prompt": ["Hi", ""]}, "prompt", "no tokens"),
    case("empty token list", {"prompt": [[]]}, "prompt[0]", "at least 1"),
    case("mixed prompt", {"prompt": [5, "Hi"]}, "prompt[1]", "'Hi'", "whole number"),
    case("negative token", {"prompt": [-5]}, "prompt[0]", "-5", "at least 0"),
    case("token outside the vocabulary", {"prompt": [[5], [300]]}, "prompt", "300", "below"),
    case(
        "prompt too long",
        {"prompt": [5] * 256},
        "prompt",
        "256",
        "shorten",
        code="context_length_exceeded",
    ),
    case("too many sequences", {"prompt": ["Hi"] * 65, "n": 2}, "n", "65", "128"),
    case("echo with logprobs", {"echo": True, "logprobs": 1}, "echo", "logprobs"),
    case("suffix", {"suffix": "."}, "suffix", "not supported", code="unsupported_parameter"),
    case("best_of", {"best_of": 2}, "best_of", "not supported", code="unsupported_parameter"),
    case("too many alternatives", {"logprobs": 21}, "logprobs", "21", "at most 20"),
    case("logprobs as truth", {"logprobs": True}, "logprobs", "true", "whole number"),
]


def check_refusal(
    response: Any, status: int, param: str | None, code: str | None, words: tuple[str, ...]
) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert all(word in error["message"] for word in words), error["message"]
    assert param is None or param.split("[")[0] in error["message"] or status == 404


@pytest.mark.parametrize(("changes", "status", "param", "code", "words"), CHAT_CASES)
def test_a_bad_chat_is_refused(
    quiet_router: RunningRouter,
    changes: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    words: tuple[str, ...],
) -> None:
    check_refusal(quiet_router.chat(**changes), status, param, code, words)


@pytest.mark.parametrize(("changes", "status", "param", "code", "words"), COMPLETION_CASES)
def test_a_bad_completion_is_refused(
    quiet_router: RunningRouter,
    changes: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    words: tuple[str, ...],
) -> None:
    check_refusal(quiet_router.complete(**changes), status, param, code, words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b"", "EOF", id="empty"),
        pytest.param(b'{"model": "tiny"', "EOF", id="cut"),
        pytest.param(b"{'model': 'tiny'}", "line 1 column 2", id="single quotes"),
        pytest.param(b'{"model": "\xff"}', "not valid JSON", id="not UTF-8"),
        pytest.param(b'{"model": "\\ud800"}', "not valid JSON", id="half a surrogate pair"),
        pytest.param(b"[" * 100_000, "recursion limit", id="nested too deeply"),
        pytest.param(b'{"seed": ' + b"9" * 5000 + b"}", "number out of range", id="endless number"),
    ],
)
def test_a_body_that_is_not_json_is_refused(
    quiet_router: RunningRouter, body: bytes, words: str
) -> None:
    response = quiet_router.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )

    check_refusal(response, 400, None, "invalid_json", (words,))


@pytest.mark.parametrize("body", ["[]", '"Hi"', "null", "5"])
def test_a_body_that_is_not_an_object_is_refused(quiet_router: RunningRouter, body: str) -> None:
    response = quiet_router.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )

    check_refusal(response, 400, None, "invalid_type", ("a JSON object",))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(quiet_router: RunningRouter, number: str) -> None:
    body = f'{{"model": "tiny", "prompt": "Hi", "temperature": {number}}}'

    response = quiet_router.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )

    check_refusal(response, 400, "temperature", None, ("finite",))


@pytest.mark.parametrize(
    ("body", "key"),
    [
        pytest.param('{"model": "tiny", "prompt": "Hi", "prompt": "Ho"}', "prompt", id="body"),
        pytest.param('{"model": "tiny", "prompt": "Hi", "n": 9, "\\u006e": 1}', "n", id="escaped"),
        pytest.param(
            '{"model": "tiny", "prompt": "Hi", "slo": {"ttft_ms": 1, "ttft_ms": 2}}',
            "ttft_ms",
            id="inner object",
        ),
    ],
)
def test_a_key_that_comes_twice_is_refused(
    quiet_router: RunningRouter, body: str, key: str
) -> None:
    """A parser would take the last value and say nothing."""
    response = quiet_router.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )

    check_refusal(response, 400, key, "contradiction", (f"'{key}'", "twice"))


def test_keys_may_come_again_in_other_objects_and_in_texts(quiet_router: RunningRouter) -> None:
    response = quiet_router.chat(messages=[USER, {**USER, "content": '{"a": 1, "a": 2}'}])

    assert response.status_code == 200


ENDLESS_NUMBER = 10**4_200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": ENDLESS_NUMBER}, "n"),
        # Together with the number of prompts it has more digits than Python will print.
        ({"n": 10**4_299, "prompt": ["Hi"] * 100}, "n"),
        ({"max_tokens": ENDLESS_NUMBER}, "max_tokens"),
        ({"top_k": ENDLESS_NUMBER}, "top_k"),
        ({"temperature": ENDLESS_NUMBER}, "temperature"),
        ({"model": "m" * 4_200}, "model"),
        ({"priority": "p" * 4_200}, "priority"),
        ({"stop": "\x01" * 300}, "stop"),
        ({"stream": "\U0010ffff" * 64}, "stream"),
        ({"p" * 4_200: 1}, None),
    ],
)
def test_a_huge_value_is_not_repeated_whole(
    quiet_router: RunningRouter, changes: dict[str, Any], param: str | None
) -> None:
    response = quiet_router.complete(**changes)

    error = response.json()["error"]
    assert response.status_code in {400, 404}
    assert param is None or error["param"] == param
    assert len(error["message"]) < 250, error["message"]


def test_two_huge_values_that_disagree_are_not_repeated_whole(quiet_router: RunningRouter) -> None:
    limits = {"max_tokens": ENDLESS_NUMBER, "max_completion_tokens": ENDLESS_NUMBER + 1}

    response = quiet_router.chat(**limits)

    check_refusal(response, 400, "max_tokens", "contradiction", ("max_completion_tokens",))
    assert len(response.json()["error"]["message"]) < 350


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_of_another_type_is_refused(quiet_router: RunningRouter, content_type: str) -> None:
    response = quiet_router.http.post(
        "/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": content_type}
    )

    check_refusal(response, 415, None, "unsupported_media_type", ("application/json",))


@pytest.mark.parametrize(
    ("headers", "changes", "param", "words"),
    [
        ({"X-ProServe-Priority": "vip"}, {}, "X-ProServe-Priority", ("'vip'", "high")),
        ({"X-ProServe-TTFT-MS": "soon"}, {}, "X-ProServe-TTFT-MS", ("'soon'", "milliseconds")),
        ({"X-ProServe-TTFT-MS": "-1"}, {}, "X-ProServe-TTFT-MS", ("'-1'", "at least 0.001")),
        ({"X-ProServe-TPOT-MS": "1e-323"}, {}, "X-ProServe-TPOT-MS", ("'1e-323'", "0.001")),
        ({"X-ProServe-TPOT-MS": "nan"}, {}, "X-ProServe-TPOT-MS", ("'nan'",)),
        ({"X-ProServe-Priority": "low"}, {"priority": "high"}, "priority", ("'low'", "'high'")),
        (
            {"X-ProServe-TTFT-MS": "100"},
            {"slo": {"ttft_ms": 200}},
            "slo.ttft_ms",
            ("100", "200", "X-ProServe-TTFT-MS"),
        ),
    ],
)
def test_a_bad_or_contradicting_header_is_refused(
    quiet_router: RunningRouter,
    headers: dict[str, str],
    changes: dict[str, Any],
    param: str,
    words: tuple[str, ...],
) -> None:
    response = quiet_router.http.post("/v1/completions", json=COMPLETION | changes, headers=headers)

    check_refusal(response, 400, param, None, words)


def test_a_header_sent_twice_with_different_values_is_refused(
    quiet_router: RunningRouter,
) -> None:
    response = quiet_router.http.post(
        "/v1/completions",
        json=COMPLETION,
        headers=[("X-ProServe-Priority", "low"), ("X-ProServe-Priority", "high")],
    )

    check_refusal(response, 400, "X-ProServe-Priority", "contradiction", ("2 times",))


def test_a_large_body_is_refused_by_its_announced_length(start_router: RouterFactory) -> None:
    with start_router([("n", "http://127.0.0.1:1")], max_body_bytes=1000) as router:
        response = router.complete(prompt="x" * 1000)

        check_refusal(response, 413, None, "body_too_large", ("1,000 bytes",))


def test_a_large_body_of_unknown_length_is_refused_while_it_comes(
    start_router: RouterFactory,
) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100

    with start_router([("n", "http://127.0.0.1:1")], max_body_bytes=1000) as router:
        response = router.http.post(
            "/v1/completions", content=endless(), headers={"content-type": "application/json"}
        )

        assert "content-length" not in response.request.headers
        check_refusal(response, 413, None, "body_too_large", ("1,000 bytes",))


def test_the_largest_allowed_body_is_read(start_router: RouterFactory) -> None:
    body = json.dumps(COMPLETION).encode()
    with start_router([("n", "http://127.0.0.1:1")], max_body_bytes=len(body)) as router:
        response = router.http.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )

        assert response.status_code == 503  # Read, understood, and there is no node.


def test_a_body_that_does_not_come_is_not_waited_for(start_router: RouterFactory) -> None:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{"
    )
    with (
        start_router([("n", "http://127.0.0.1:1")], body_timeout_s=0.05) as router,
        router.connect() as connection,
    ):
        connection.sendall(head)

        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_an_unknown_route_is_refused(quiet_router: RunningRouter) -> None:
    response = quiet_router.http.post("/v1/rerank", json={})

    check_refusal(response, 404, None, "unknown_route", ("POST /v1/rerank",))


def test_embeddings_are_refused_with_the_reason(quiet_router: RunningRouter) -> None:
    response = quiet_router.http.post("/v1/embeddings", json={"model": "tiny", "input": "Hi"})

    check_refusal(response, 404, None, "unsupported_route", ("generates text only",))


def test_a_wrong_method_is_refused(quiet_router: RunningRouter) -> None:
    response = quiet_router.http.get("/v1/chat/completions")

    check_refusal(response, 405, None, "method_not_allowed", ("GET /v1/chat/completions",))
    assert response.headers["allow"] == "POST"


def test_an_unknown_model_has_no_page(quiet_router: RunningRouter) -> None:
    response = quiet_router.http.get("/v1/models/org/other")

    check_refusal(response, 404, "model", "model_not_found", ("'org/other'", "'tiny'"))


def test_null_counts_as_absent(quiet_router: RunningRouter) -> None:
    nothing = dict.fromkeys(
        ("temperature", "n", "stop", "tools", "logit_bias", "stream", "slo", "priority", "seed")
    )

    assert quiet_router.chat(**nothing).status_code == 200


def test_harmless_values_of_unsupported_parameters_are_accepted(
    quiet_router: RunningRouter,
) -> None:
    response = quiet_router.chat(
        tools=[], tool_choice="none", response_format={"type": "text"}, store=False, logit_bias={}
    )

    assert response.status_code == 200
