"""Whatever a model wants to say, the sampler lets it say only what the request's grammar allows."""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.admission import check_request
from orchestrator.core.errors import RequestRejected
from orchestrator.core.request import Request, SamplingParams
from orchestrator.grammars import GrammarCompiler
from orchestrator.logit_adjustment import GrammarsFailed
from orchestrator.sampling import Sampler
from router.tokenizer import Tokenizer
from tests.factories import make_capabilities, make_request
from tests.forms import END_TOKEN, VOCAB_SIZE, json_grammar, regex_grammar, tiny_tokenizer

MAX_TOKENS = 400


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, GrammarCompiler]:
    return tiny_tokenizer(tmp_path_factory.mktemp("engine"))


def guided_request(grammar: str, request_id: str = "r", **sampling: Any) -> Request:
    params = {"max_tokens": MAX_TOKENS, "seed": 0, "stop_token_ids": (END_TOKEN,), **sampling}
    return make_request(request_id, sampling=SamplingParams(grammar=grammar, **params))


def random_logits(num_rows: int, seed: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def write(sampler: Sampler, request: Request, seed: int = 0) -> list[int]:
    """Let a model that babbles write a whole output; return its tokens without the end token."""
    while request.num_output_tokens < MAX_TOKENS:
        sampler.prepare([request])
        logits = random_logits(1, seed + request.num_output_tokens)
        (token,) = sampler.sample(logits, [request])
        if token.token_id in request.spec.sampling.stop_token_ids:
            return request.output_token_ids
        request.append_output_token(token.token_id, 0.0)
    pytest.fail("the output does not end")


# --- any form ------------------------------------------------------------------------------


def bounded_schemas() -> st.SearchStrategy[dict[str, Any]]:
    """Schemas whose values end by themselves, however a model babbles."""
    names = st.text(string.ascii_lowercase, min_size=1, max_size=3)
    scalars: st.SearchStrategy[dict[str, Any]] = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, None]}}]),
        st.integers(-50, 50).map(
            lambda low: {"type": "integer", "minimum": low, "maximum": low + 20}
        ),
        st.integers(0, 4).map(lambda n: {"type": "string", "minLength": n, "maxLength": n + 3}),
        st.lists(names, min_size=1, max_size=4, unique=True).map(lambda words: {"enum": words}),
        st.just({"type": "string", "pattern": "^[A-F]{2,5}-[0-9]{3}$"}),
    )

    def composed(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        arrays = st.tuples(inner, st.integers(0, 2)).map(
            lambda found: {
                "type": "array",
                "items": found[0],
                "minItems": found[1],
                "maxItems": found[1] + 2,
            }
        )
        objects = st.dictionaries(names, inner, max_size=3).flatmap(
            lambda properties: st.sets(st.sampled_from(sorted(properties) or ["a"])).map(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": sorted(required & properties.keys()),
                    "additionalProperties": False,
                }
            )
        )
        return st.one_of(arrays, objects, st.tuples(inner, inner).map(lambda f: {"anyOf": [*f]}))

    return st.recursive(scalars, composed, max_leaves=5)


@settings(deadline=None, max_examples=60)
@given(
    schema=bounded_schemas(),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_any_output_follows_its_json_schema(
    tiny: tuple[Tokenizer, GrammarCompiler], schema: dict[str, Any], temperature: float, seed: int
) -> None:
    tokenizer, compiler = tiny
    request = guided_request(json_grammar(schema), seed=seed, temperature=temperature)

    text = tokenizer.decode(write(Sampler(VOCAB_SIZE, compiler), request, seed))

    jsonschema.validate(json.loads(text), schema)


def regexes() -> st.SearchStrategy[str]:
    """Regular expressions that mean the same to Python, and whose matches are bounded."""
    atoms = st.sampled_from(["a", "é", "[0-9]", "[^x\n]", r"\.", "東", "[a-cX-Z]", " ", "/", '"'])

    def composed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map(lambda found: f"(?:{found[0]}|{found[1]})"),
            st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
                lambda found: f"(?:{found[0]}){{{found[1]},{found[1] + found[2]}}}"
            ),
            inner.map(lambda found: f"(?:{found})?"),
        )

    return st.recursive(atoms, composed, max_leaves=8)


@settings(deadline=None, max_examples=60)
@given(regex=regexes(), temperature=st.sampled_from([0.0, 1.0, 2.0]), seed=st.integers(0, 1000))
def test_any_output_matches_its_regular_expression(
    tiny: tuple[Tokenizer, GrammarCompiler], regex: str, temperature: float, seed: int
) -> None:
    tokenizer, compiler = tiny
    request = guided_request(regex_grammar(regex), seed=seed, temperature=temperature)

    text = tokenizer.decode(write(Sampler(VOCAB_SIZE, compiler), request, seed))

    assert re.fullmatch(regex, text)


# --- a request's life ------------------------------------------------------------------------

DATE = r"[12][0-9]{3}-(?:0[1-9]|1[0-2])-[0-3][0-9] (?:and|or) [a-z]{5}"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_output_goes_on_alike_after_forgetting_and_elsewhere(
    tiny: tuple[Tokenizer, GrammarCompiler], tmp_path: Path, temperature: float
) -> None:
    """Cut behind every token."""
    grammar = regex_grammar(DATE)
    sampler = Sampler(VOCAB_SIZE, tiny[1])
    expected = list(write(sampler, guided_request(grammar, temperature=temperature)))
    assert len(expected) > 5
    elsewhere = Sampler(VOCAB_SIZE, tiny_tokenizer(tmp_path / "elsewhere")[1])

    for cut in range(1, len(expected)):
        for next_sampler in (sampler, elsewhere):
            request = guided_request(grammar, temperature=temperature)
            for token_id in expected[:cut]:
                request.append_output_token(token_id, 0.0)
            assert write(next_sampler, request) == expected
            next_sampler.forget(["r", "unknown"])


def test_requests_of_one_batch_follow_their_own_grammars_and_leave_others_alone(
    tiny: tuple[Tokenizer, GrammarCompiler],
) -> None:
    sampler = Sampler(VOCAB_SIZE, tiny[1])
    grammars = [regex_grammar("[0-9]{4}"), regex_grammar("[a-f]{4}")]
    logits = random_logits(3, seed=5)
    free = make_request("free", sampling=SamplingParams(max_tokens=9, seed=3))
    guided = [guided_request(g, str(i), seed=3) for i, g in enumerate(grammars)]

    batch = [guided[0], free, guided[1]]
    sampler.prepare(batch)
    together = [token.token_id for token in sampler.sample(logits, batch)]

    alone = [
        Sampler(VOCAB_SIZE, tiny[1]).sample(logits[row : row + 1], [request])[0].token_id
        for row, request in enumerate(batch)
    ]
    assert together == alone
    assert re.fullmatch("[0-9]+", tiny[0].decode(together[:1]))
    assert re.fullmatch("[a-f]+", tiny[0].decode(together[2:]))


def test_a_stop_token_comes_only_where_the_grammar_accepts(
    tiny: tuple[Tokenizer, GrammarCompiler],
) -> None:
    """`a` is a stop token here, and the grammar wants it twice before the output may end; the
    model wants nothing else. As text it can then never be drawn, and the grammar's `b` is."""
    tokenizer, compiler = tiny
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    request = guided_request(
        regex_grammar("(?:a|b){2}"),
        temperature=0.0,
        stop_token_ids=(END_TOKEN, a),
        logit_bias=((a, 100.0), (END_TOKEN, 90.0)),
    )
    sampler = Sampler(VOCAB_SIZE, compiler)

    output = write(sampler, request)

    assert tokenizer.decode(output) == "bb"
    assert sampler.sample(random_logits(1, 0), [request])[0].token_id == a


def test_the_models_own_end_is_not_drawn_where_it_does_not_stop_the_request(
    tiny: tuple[Tokenizer, GrammarCompiler],
) -> None:
    (dot,) = tiny[0].encode(".", add_special_tokens=False)
    request = guided_request(
        regex_grammar("a{1,9}"), stop_token_ids=(dot,), logit_bias=((END_TOKEN, 100.0),)
    )

    assert END_TOKEN not in write(Sampler(VOCAB_SIZE, tiny[1]), request)


def test_biases_and_penalties_choose_among_what_the_grammar_allows(
    tiny: tuple[Tokenizer, GrammarCompiler],
) -> None:
    """`z` is excluded, `b` begins; the penalties then give the turn to `c`."""
    tokenizer, compiler = tiny
    ids = {c: tokenizer.encode(c, add_special_tokens=False)[0] for c in "bcz"}
    request = guided_request(
        regex_grammar("[bc]{6}"),
        temperature=0.0,
        logit_bias=((ids["z"], 100.0), (ids["b"], 90.0), (ids["c"], 50.0)),
        presence_penalty=2.0,
        frequency_penalty=2.0,
        repetition_penalty=2.0,
    )

    text = tokenizer.decode(write(Sampler(VOCAB_SIZE, compiler), request))

    assert re.fullmatch("[bc]{6}", text)
    assert text.startswith("bc")


def test_an_end_that_is_possible_is_not_forced(tiny: tuple[Tokenizer, GrammarCompiler]) -> None:
    request = guided_request(regex_grammar("a*"), temperature=0.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    (a,) = tiny[0].encode("a", add_special_tokens=False)
    logits[0, a] = 1.0

    (token,) = Sampler(VOCAB_SIZE, tiny[1]).sample(logits, [request])

    assert token.token_id == a


# --- what cannot be followed -----------------------------------------------------------------


def test_a_broken_grammar_is_told_with_its_request(
    tiny: tuple[Tokenizer, GrammarCompiler],
) -> None:
    sampler = Sampler(VOCAB_SIZE, tiny[1])
    batch = [guided_request("nonsense", "bad"), guided_request(regex_grammar("a"), "good")]

    with pytest.raises(GrammarsFailed, match="bad") as caught:
        sampler.sample(random_logits(2, 0), batch)

    assert caught.value.reasons.keys() == {"bad"}
    assert "cannot be compiled" in caught.value.reasons["bad"]
    (token,) = sampler.sample(random_logits(1, 0), batch[1:])
    assert tiny[0].decode([token.token_id]) == "a"


def test_delivered_tokens_that_do_not_match_are_told(
    tiny: tuple[Tokenizer, GrammarCompiler],
) -> None:
    request = guided_request(regex_grammar("[0-9]+"))
    request.append_output_token(tiny[0].encode("x", add_special_tokens=False)[0], 0.0)

    with pytest.raises(GrammarsFailed, match="cannot be followed"):
        Sampler(VOCAB_SIZE, tiny[1]).sample(random_logits(1, 0), [request])


def test_a_grammar_that_turns_out_too_complex_is_told(
    tiny: tuple[Tokenizer, GrammarCompiler],
) -> None:
    """Behind the first of 1,200 optional properties, each other one may come."""
    properties = {f"p{i}": {"type": "string", "maxLength": 9} for i in range(1200)}
    request = guided_request(json_grammar({"type": "object", "properties": properties}))

    with pytest.raises(GrammarsFailed, match="cannot be followed: Parser Error") as caught:
        write(Sampler(VOCAB_SIZE, tiny[1]), request)
    assert "\n" not in str(caught.value)


def test_a_sampler_without_a_tokenizer_says_so() -> None:
    with pytest.raises(GrammarsFailed, match="no tokenizer"):
        Sampler(VOCAB_SIZE).sample(random_logits(1, 0), [guided_request(regex_grammar("a"))])


def test_a_vocabulary_smaller_than_the_tokenizer_is_told(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    compiler = GrammarCompiler(tmp_path, vocab_size=97, end_token_ids=[END_TOKEN])

    with pytest.raises(GrammarsFailed, match=r"tokenizer.json cannot be used: vocab"):
        Sampler(97, compiler).sample(torch.zeros(1, 97), [guided_request(regex_grammar("a"))])


def test_the_obstacles_of_a_node_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine says them before it takes requests, so they are found with the tokenizer."""

    def obstacle(vocab_size: int = VOCAB_SIZE) -> str | None:
        return GrammarCompiler(tmp_path, vocab_size=vocab_size, end_token_ids=[END_TOKEN]).obstacle

    without_file = obstacle()
    tiny_tokenizer(tmp_path)
    with_file, with_another_model = obstacle(), obstacle(vocab_size=97)
    monkeypatch.delitem(sys.modules, "llguidance")
    monkeypatch.setattr(sys, "path", [])
    without_package = obstacle()

    assert with_file is None
    for found, words in (
        (without_file, "tokenizer.json is missing"),
        (with_another_model, "tokenizer.json cannot be used: vocab"),
        (without_package, "llguidance is not installed"),
    ):
        assert found is not None
        assert words in found


@pytest.mark.parametrize(
    ("obstacle", "stop_token_ids", "words"),
    [
        ("it is made of stone", (2,), "it is made of stone"),
        (None, (), "could never end"),
    ],
)
def test_a_node_refuses_what_it_cannot_follow(
    obstacle: str | None, stop_token_ids: tuple[int, ...], words: str
) -> None:
    request = guided_request(regex_grammar("a"), stop_token_ids=stop_token_ids)
    capabilities = make_capabilities(grammar_obstacle=obstacle)

    with pytest.raises(RequestRejected, match=words):
        check_request(request.spec, capabilities)


def test_a_node_that_says_nothing_of_grammars_refuses_them() -> None:
    request = guided_request(regex_grammar("a"))

    with pytest.raises(RequestRejected, match="does not choose tokens by a grammar"):
        check_request(request.spec, make_capabilities())
