"""Answers in one piece, and what nodes are told for them."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.errors import NodeUnavailable
from orchestrator.core.ports import TokenLogprobs
from orchestrator.core.request import FinishReason
from orchestrator.wire import GenerateRequest, TokenEvent
from router.errors import Refused
from router.generation import merged
from router.output_form import asked_grammar
from router.schema import CompletionBody
from router.tokenizer import Tokenizer
from router.translation import sequence_seed
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Refuse, Step, saying
from tests.router.servers import http_post


@pytest.fixture
def hello(tokenizer: Tokenizer) -> list[int]:
    """Tokens of "Hello there" and the end token."""
    return [
        *tokenizer.encode("Hello there", add_special_tokens=False),
        *tokenizer.eos_token_ids,
    ]


def test_a_chat_is_answered(router: RunningRouter, node: FakeNode, hello: list[int]) -> None:
    node.script = saying(hello)

    body = router.chat().json()

    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    num_prompt_tokens = len(node.requests[0].prompt_token_ids)
    assert body["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": len(hello),
        "total_tokens": num_prompt_tokens + len(hello),
    }


def test_a_chat_is_rendered_with_the_models_template(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    """A developer's message is the system's, and parts of a content are joined."""
    router.chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}] * 2},
            {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "Why?"},
        ]
    )

    assert list(node.requests[0].prompt_token_ids) == tokenizer.encode_chat(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "HiHi"},
            {"role": "assistant", "content": "Yes"},
            {"role": "user", "content": "Why?"},
        ]
    )


def test_a_completion_is_answered(router: RunningRouter, node: FakeNode, hello: list[int]) -> None:
    node.script = saying(hello)

    body = router.complete().json()

    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "Hello there", "logprobs": None, "finish_reason": "stop"}
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        pytest.param([5, 6], [(5, 6)], id="token ids"),
        pytest.param([[5], [6, 7]], [(5,), (6, 7)], id="several token lists"),
    ],
)
def test_token_ids_reach_the_node_as_they_are(
    router: RunningRouter, node: FakeNode, prompt: Any, expected: list[tuple[int, ...]]
) -> None:
    body = router.complete(prompt=prompt).json()

    assert sorted(r.prompt_token_ids for r in node.requests) == expected
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_several_prompts_are_answered_in_their_order(router: RunningRouter, node: FakeNode) -> None:
    """Prompt a gives choices 0 and 1, prompt b gives 2 and 3; the node repeats the prompt."""
    node.script = lambda request: saying(request.prompt_token_ids)(request)

    body = router.complete(prompt=["a", "b"], n=2).json()

    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in body["choices"]] == ["a", "a", "b", "b"]


def test_echo_puts_the_prompt_before_the_answer(
    router: RunningRouter, node: FakeNode, hello: list[int], tokenizer: Tokenizer
) -> None:
    node.script = saying(hello)
    token_ids = tokenizer.encode("Say: ", add_special_tokens=True)

    for prompt in ("Say: ", token_ids):
        body = router.complete(prompt=prompt, echo=True).json()

        assert body["choices"][0]["text"] == "Say: Hello there"


def test_sampling_parameters_reach_the_node(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    router.complete(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        repetition_penalty=1.1,
        seed=42,
        stop_token_ids=[9],
        logprobs=3,
    )

    sampling = node.requests[0].sampling
    assert sampling.max_tokens == 7
    assert sampling.temperature == 0.5
    assert sampling.top_p == 0.9
    assert sampling.top_k == 40
    assert sampling.min_p == 0.1
    assert sampling.presence_penalty == 0.2
    assert sampling.frequency_penalty == -0.3
    assert sampling.repetition_penalty == 1.1
    assert sampling.seed == 42
    assert sampling.stop_token_ids == (*tokenizer.eos_token_ids, 9)
    assert sampling.num_logprobs == 3


def test_what_is_not_given_has_openais_defaults(router: RunningRouter, node: FakeNode) -> None:
    """A completion gets 16 tokens, a chat what is left of the context of 256."""
    router.complete()
    router.chat()

    completion, chat = node.requests
    assert completion.sampling.max_tokens == 16
    assert completion.sampling.temperature == 1.0
    assert completion.sampling.num_logprobs is None
    assert chat.sampling.max_tokens == 256 - len(chat.prompt_token_ids)


def test_prompt_and_answer_may_fill_the_context(router: RunningRouter) -> None:
    response = router.complete(prompt=[5] * 200, max_tokens=56)

    assert response.status_code == 200
    assert router.complete(prompt=[5] * 200, max_tokens=57).status_code == 400


def test_an_answer_ends_at_every_end_token_of_the_engine(
    node: FakeNode,
    start_router: RouterFactory,
    engine_dir: Path,
    hello: list[int],
    tmp_path: Path,
) -> None:
    """The manifest of the real engine says so: `<|im_end|>` and `<|endoftext|>`."""
    directory = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    (directory / "manifest.json").write_text(json.dumps({"eos_token_ids": [2, 0]}))
    node.script = saying([*hello[:-1], 0])

    with start_router(
        [(node.endpoint_id, node.url)], tokenizer=Tokenizer.from_engine_dir(directory)
    ) as router:
        choice = router.complete().json()["choices"][0]

    assert node.requests[0].sampling.stop_token_ids == (2, 0)
    assert choice["text"] == "Hello there"
    assert choice["finish_reason"] == "stop"


def test_end_tokens_can_be_ignored(router: RunningRouter, node: FakeNode) -> None:
    router.complete(ignore_eos=True, stop_token_ids=[9])

    assert node.requests[0].sampling.stop_token_ids == (9,)


def test_the_newer_name_of_max_tokens_means_the_same(router: RunningRouter, node: FakeNode) -> None:
    router.chat(max_completion_tokens=5)
    router.chat(max_completion_tokens=5, max_tokens=5)

    assert [r.sampling.max_tokens for r in node.requests] == [5, 5]


def test_each_of_n_answers_has_a_seed_of_its_own_derived_from_the_clients(
    router: RunningRouter, node: FakeNode
) -> None:
    router.complete(n=3, seed=42)

    assert {r.request_id.rsplit("-", 1)[1]: r.sampling.seed for r in node.requests} == {
        "0": 42,
        "1": sequence_seed(42, None, 1, 1),
        "2": sequence_seed(42, b"a key", 7, 2),
    }
    assert len({r.sampling.seed for r in node.requests}) == 3


def test_without_a_seed_every_answer_gets_another_one(
    router: RunningRouter, node: FakeNode
) -> None:
    router.complete(prompt=["a", "b"], n=2)

    assert len({r.sampling.seed for r in node.requests}) == 4


def test_class_and_objectives_come_from_the_configuration_by_default(
    router: RunningRouter, node: FakeNode
) -> None:
    router.complete()

    request = node.requests[0]
    assert (request.priority_class, request.weight) == ("normal", 2.0)
    assert (request.ttft_s, request.tpot_s) == (2.0, 0.1)
    assert 0 < request.elapsed_s < 10


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        pytest.param({"priority": "high", "slo": {"ttft_ms": 300}}, {}, id="body"),
        pytest.param(
            {}, {"X-ProServe-Priority": "high", "X-ProServe-TTFT-MS": "300"}, id="headers"
        ),
        pytest.param(
            {"priority": "high", "slo": {"ttft_ms": 300}},
            {"X-ProServe-Priority": "high", "X-ProServe-TTFT-MS": "300.0"},
            id="both, and equal",
        ),
    ],
)
def test_a_request_may_name_its_class_and_objectives(
    router: RunningRouter, node: FakeNode, body: dict[str, Any], headers: dict[str, str]
) -> None:
    """The objective that is not named is that of the class."""
    router.http.headers.update(headers)

    router.complete(**body)

    request = node.requests[0]
    assert (request.priority_class, request.weight) == ("high", 4.0)
    assert (request.ttft_s, request.tpot_s) == (0.3, 0.05)


def test_a_class_without_objectives_sends_none(node: FakeNode, start_router: RouterFactory) -> None:
    classes = [{"name": "batch", "weight": 0.5}]
    with start_router(
        [(node.endpoint_id, node.url)], classes=classes, default_class="batch"
    ) as router:
        router.complete()

    assert (node.requests[0].ttft_s, node.requests[0].tpot_s) == (None, None)


def script_with_logprobs(tokenizer: Tokenizer) -> Any:
    """Return a script that says "a" with an impossible alternative, and half a character."""
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    token_a, token_b, half = by_bytes[b"a"], by_bytes[b"b"], by_bytes[b"\xc3"]
    minus_infinity = -1e30  # JSON cannot say more.
    events = [
        TokenEvent(
            (token_a,), (TokenLogprobs(-0.5, ((token_a, -0.5), (token_b, minus_infinity))),)
        ),
        TokenEvent((half,), (TokenLogprobs(-2.0, ((half, -2.0),)),), FinishReason.LENGTH),
    ]

    def script(request: GenerateRequest) -> list[Step]:
        assert request.sampling.num_logprobs is not None
        return list(events)

    return script


def test_a_chat_reports_logprobs(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    node.script = script_with_logprobs(tokenizer)

    choice = router.chat(logprobs=True, top_logprobs=2).json()["choices"][0]

    a = {"token": "a", "logprob": -0.5, "bytes": [97]}
    b = {"token": "b", "logprob": -9999.0, "bytes": [98]}
    half = {"token": "�", "logprob": -2.0, "bytes": [0xC3]}
    assert node.requests[0].sampling.num_logprobs == 2
    assert choice["logprobs"]["content"] == [
        {**a, "top_logprobs": [a, b]},
        {**half, "top_logprobs": [half]},
    ]


def test_a_completion_reports_logprobs(
    router: RunningRouter, node: FakeNode, tokenizer: Tokenizer
) -> None:
    node.script = script_with_logprobs(tokenizer)

    choice = router.complete(logprobs=2).json()["choices"][0]

    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"a": -0.5, "b": -9999.0}, {"bytes:\\xc3": -2.0}],
        "text_offset": [0, 1],
    }


def test_a_length_limit_is_told(router: RunningRouter, node: FakeNode, hello: list[int]) -> None:
    node.script = saying(hello)

    body = router.complete(max_tokens=1).json()

    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 1


def test_models_are_listed(quiet_router: RunningRouter) -> None:
    models = quiet_router.http.get("/v1/models").json()

    assert models["object"] == "list"
    assert [m["id"] for m in models["data"]] == ["tiny"]
    assert quiet_router.http.get("/v1/models/tiny").json() == models["data"][0]


def test_health_is_that_of_the_nodes(router: RunningRouter, node: FakeNode) -> None:
    good = router.http.get("/health")
    assert (good.status_code, good.json()["nodes"]) == (200, {"node-0": "ready"})

    node.is_draining = True
    num_polls = node.num_polls
    node.wait_until(lambda n: n.num_polls >= num_polls + 2, "two more polls")

    bad = router.http.get("/health")
    assert (bad.status_code, bad.json()["nodes"]) == (503, {"node-0": "draining"})


@pytest.mark.parametrize(
    ("sent", "is_kept"), [("job-17.b:c_d", True), ("has space", False), ("x" * 129, False)]
)
def test_a_sane_request_id_comes_back(
    quiet_router: RunningRouter, sent: str, *, is_kept: bool
) -> None:
    response = quiet_router.http.get("/v1/models", headers={"X-Request-Id": sent})

    assert (response.headers["x-request-id"] == sent) is is_kept
    assert response.headers["x-request-id"]


class BrokenTokenizer(Tokenizer):
    """Has a bug."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        raise ZeroDivisionError


def test_a_bug_is_answered_with_500_and_the_request_id_and_the_router_goes_on(
    node: FakeNode, start_router: RouterFactory, engine_dir: Path
) -> None:
    tokenizer = BrokenTokenizer.from_engine_dir(engine_dir)
    with start_router([(node.endpoint_id, node.url)], tokenizer=tokenizer) as router:
        response = router.complete()

        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert response.headers["x-request-id"] in response.json()["error"]["message"]
        assert router.chat().status_code == 200


def test_a_client_that_leaves_while_it_sends_is_counted(router: RunningRouter) -> None:
    request = http_post("/v1/completions", {"model": "tiny", "prompt": "Hi"})
    with router.connect() as connection:
        connection.sendall(request[:-5])

    router.wait_for_metric(
        'proserve_router_requests_total{priority_class="none",'
        'route="/v1/completions",status="499"}',
        1,
    )


def test_refusals_have_a_request_id_too(quiet_router: RunningRouter) -> None:
    assert quiet_router.complete(n=0).headers["x-request-id"].startswith("req-")
    assert quiet_router.http.get("/nowhere").headers["x-request-id"].startswith("req-")


def test_a_node_is_told_the_biases_of_tokens(router: RunningRouter, node: FakeNode) -> None:
    router.chat(logit_bias={"17": 2.5, "0": -100}, n=2)
    router.complete(logit_bias={})

    assert [request.sampling.logit_bias for request in node.requests] == [
        ((17, 2.5), (0, -100.0)),
        ((17, 2.5), (0, -100.0)),
        (),
    ]


def test_a_node_is_told_the_grammar_of_the_form_that_is_asked_for(
    router: RunningRouter, node: FakeNode
) -> None:
    """The same for all answers, whatever the schema says of its own compilation."""
    schema = {"type": "object", "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    json_schema = {"name": "form", "strict": True, "schema": schema}
    form = {"type": "json_schema", "json_schema": json_schema}

    router.chat(response_format=form, n=2)
    router.chat(response_format={"type": "json_object"})
    router.complete(guided_regex="[0-9]+")
    router.complete(response_format={"type": "text"})

    of_schema, again, of_object, of_regex, none = [r.sampling.grammar for r in node.requests]
    assert of_schema is not None
    assert of_object is not None
    assert again == of_schema
    assert json.loads(of_schema) == json.loads(of_object)
    assert of_regex is not None
    assert "/[0-9]+/" in of_regex
    assert none is None


def test_a_node_that_cannot_give_a_form_says_so_to_the_client(
    router: RunningRouter, node: FakeNode
) -> None:
    node.script = lambda _: [Refuse(400, "this node cannot give a form")]

    answer = router.complete(guided_regex="[0-9]+")

    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "this node cannot give a form"


def test_a_router_without_the_package_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = CompletionBody.model_validate({"model": "tiny", "prompt": "Hi", "guided_regex": "a"})
    monkeypatch.setitem(sys.modules, "llguidance", None)

    with pytest.raises(Refused, match="needs the package llguidance"):
        asyncio.run(asked_grammar(body))


async def test_what_is_not_read_is_not_made() -> None:
    num_made = 0

    async def making() -> AsyncGenerator[int]:
        nonlocal num_made
        while True:
            num_made += 1
            yield num_made
            await asyncio.sleep(0)

    async with aclosing(merged([making(), making()])) as values:
        await anext(values)
        for _ in range(100):
            await asyncio.sleep(0)

    assert num_made <= 6  # One read, two waiting, one more in the hands of each; and one spare.


async def test_the_first_failure_ends_all() -> None:
    has_ended = False

    async def waiting() -> AsyncGenerator[int]:
        nonlocal has_ended
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            has_ended = True

    async def failing() -> AsyncGenerator[int]:
        yield 2
        raise NodeUnavailable("gone")

    values = merged([waiting(), failing()])
    assert sorted([await anext(values), await anext(values)]) == [1, 2]
    with pytest.raises(NodeUnavailable, match="gone"):
        await anext(values)

    assert has_ended
