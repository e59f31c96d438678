"""/tokenize and /detokenize agree with what generations begin with, and refuse the rest."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from router.tokenizer import Tokenizer
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode

MESSAGES = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def tokenize(router: RunningRouter, **body: Any) -> httpx.Response:
    return router.http.post("/tokenize", json=body)


def detokenize(router: RunningRouter, **body: Any) -> httpx.Response:
    return router.http.post("/detokenize", json=body)


def test_a_prompt_has_the_tokens_of_its_completion(router: RunningRouter, node: FakeNode) -> None:
    answer = tokenize(router, model="tiny", prompt="Hello <|im_end|> there")
    router.complete(prompt="Hello <|im_end|> there")

    tokens = list(node.requests[0].prompt_token_ids)
    assert answer.json() == {
        "count": len(tokens),
        "max_model_len": node.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }


def test_a_conversation_has_the_tokens_of_its_chat(router: RunningRouter, node: FakeNode) -> None:
    answer = tokenize(router, messages=MESSAGES)
    router.chat(messages=MESSAGES)

    assert answer.json()["tokens"] == list(node.requests[0].prompt_token_ids)


def test_tools_are_a_part_of_a_conversation(quiet_router: RunningRouter) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]

    alone = tokenize(quiet_router, messages=MESSAGES).json()
    with_tools = tokenize(quiet_router, messages=MESSAGES, tools=tools).json()
    refused = tokenize(quiet_router, prompt="Hi", tools=tools).json()["error"]

    shown = detokenize(quiet_router, tokens=with_tools["tokens"]).json()["prompt"]
    assert '"name": "clock"' in shown
    assert with_tools["count"] > alone["count"]
    assert (refused["param"], refused["message"]) == ("tools", "tools needs messages")


def test_a_conversation_may_be_told_without_the_beginning_of_an_answer(
    quiet_router: RunningRouter,
) -> None:
    whole = tokenize(quiet_router, messages=MESSAGES).json()["tokens"]
    open_ended = tokenize(quiet_router, messages=MESSAGES, add_generation_prompt=False).json()

    rest = detokenize(quiet_router, tokens=whole[open_ended["count"] :]).json()
    assert whole[: open_ended["count"]] == open_ended["tokens"]
    assert rest == {"prompt": "<|im_start|>assistant\n"}


def test_the_text_of_each_token_comes_when_asked_for(quiet_router: RunningRouter) -> None:
    answer = tokenize(quiet_router, prompt="Hello é", return_token_strs=True).json()

    assert len(answer["token_strs"]) == answer["count"] == len(answer["tokens"])
    assert "".join(answer["token_strs"]).startswith("Hello")


@pytest.mark.parametrize("prompt", ["Hello there", "é 東京 🙂", "a<|im_start|>b<|endoftext|>", ""])
def test_tokens_become_the_prompt_again(quiet_router: RunningRouter, prompt: str) -> None:
    tokens = tokenize(quiet_router, prompt=prompt).json()["tokens"]

    assert detokenize(quiet_router, tokens=tokens).json() == {"prompt": prompt}


def test_a_long_prompt_is_tokenized_too(quiet_router: RunningRouter, tokenizer: Tokenizer) -> None:
    prompt = "Hello there, " * 5_000

    answer = tokenize(quiet_router, prompt=prompt).json()

    assert answer["tokens"] == tokenizer.encode(prompt, add_special_tokens=True)
    assert answer["count"] > answer["max_model_len"]


@pytest.mark.parametrize(
    ("route", "body", "status", "param", "words"),
    [
        ("/tokenize", {}, 400, "prompt", "a prompt or messages"),
        ("/tokenize", {"prompt": "Hi", "messages": MESSAGES}, 400, "prompt", "one of them"),
        ("/tokenize", {"prompt": ["Hi"]}, 400, "prompt", "a string"),
        ("/tokenize", {"prompt": "Hi", "model": "gpt-9"}, 404, "model", "'tiny' does"),
        (
            "/tokenize",
            {"prompt": "Hi", "add_generation_prompt": True},
            400,
            "add_generation_prompt",
            "needs messages",
        ),
        (
            "/tokenize",
            {"messages": MESSAGES, "add_special_tokens": True},
            400,
            "add_special_tokens",
            "chat template",
        ),
        ("/tokenize", {"prompt": "Hi", "lora": 1}, 400, "lora", "unknown parameter"),
        ("/detokenize", {}, 400, "tokens", "required"),
        ("/detokenize", {"tokens": [1, 300]}, 400, "tokens", "300"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]", "at least 0"),
        ("/detokenize", {"tokens": "Hi"}, 400, "tokens", "an array"),
        ("/detokenize", {"tokens": [], "model": "gpt-9"}, 404, "model", "'tiny' does"),
    ],
)
def test_a_bad_request_is_refused(
    quiet_router: RunningRouter,
    route: str,
    body: dict[str, Any],
    status: int,
    param: str,
    words: str,
) -> None:
    answer = quiet_router.http.post(route, json=body)

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert words in error["message"]


def test_a_prompt_that_is_not_unicode_is_refused(quiet_router: RunningRouter) -> None:
    answer = quiet_router.http.post(
        "/tokenize",
        content=rb'{"prompt": "\ud800"}',
        headers={"content-type": "application/json"},
    )

    assert answer.status_code == 400


def test_without_a_node_the_length_of_prompts_is_not_known(start_router: RouterFactory) -> None:
    with start_router([("n", "http://127.0.0.1:1")]) as router:
        assert tokenize(router, prompt="Hi").status_code == 503
        assert detokenize(router, tokens=[70]).status_code == 200
