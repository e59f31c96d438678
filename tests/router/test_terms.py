"""What a client's requests may ask for: less than the client has, never more."""

from __future__ import annotations

import math
from typing import Any

import pytest
from starlette.datastructures import Headers

from orchestrator.core.slo import PriorityClass, Slo
from router.clients import ClientConfig
from router.config import DEFAULT_CLASSES, ServiceClassConfig
from router.errors import Refused
from router.schema import CompletionBody
from router.terms import ServiceTerms

BATCH = ServiceClassConfig(name="batch", weight=0.5)
CLASSES = (*DEFAULT_CLASSES, BATCH)


def terms_of(priority_class: str = "normal", **fields: Any) -> ServiceTerms:
    client = ClientConfig(name="acme", priority_class=priority_class, **fields)
    return ServiceTerms.of_client(client, CLASSES)


def ask(
    terms: ServiceTerms, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[PriorityClass, Slo]:
    body = CompletionBody.model_validate({"model": "tiny", "prompt": "Hi", **fields})
    return terms.of(body, Headers(headers or {}))


def refusal(terms: ServiceTerms, headers: dict[str, str] | None = None, **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        ask(terms, headers, **fields)
    return caught.value


def test_a_request_has_its_clients_class_by_default() -> None:
    priority_class, slo = ask(terms_of("normal"))

    assert (priority_class.name, priority_class.weight) == ("normal", 2.0)
    assert slo == Slo(ttft_s=2.0, tpot_s=0.1)


def test_a_client_may_have_another_default() -> None:
    assert ask(terms_of("high", default_class="low"))[0].name == "low"
    assert ask(terms_of("high", default_class="low"), priority="high")[0].name == "high"


@pytest.mark.parametrize("name", ["normal", "low", "batch"])
def test_a_request_may_lower_its_priority(name: str) -> None:
    assert ask(terms_of("normal"), priority=name)[0].name == name
    assert ask(terms_of("normal"), {"X-ProServe-Priority": name})[0].name == name


def test_a_request_may_not_raise_its_priority() -> None:
    by_body = refusal(terms_of("normal"), priority="high")
    by_header = refusal(terms_of("normal"), {"X-ProServe-Priority": "high"})

    for found, field in ((by_body, "priority"), (by_header, "X-ProServe-Priority")):
        assert (found.status, found.code, found.field) == (403, "class_not_allowed", field)
        assert str(found) == (
            f"{field} is 'high', client 'acme' may use these, most valuable first: normal, low, "
            "batch; name one, leave it out, or ask the operator for another class"
        )


def test_only_allowed_classes_may_be_named() -> None:
    terms = terms_of("high", allowed_classes=("high", "batch"))

    assert ask(terms, priority="batch")[0].name == "batch"
    assert refusal(terms, priority="normal").code == "class_not_allowed"


def test_a_class_that_does_not_exist_is_a_mistake_not_an_escalation() -> None:
    found = refusal(terms_of("normal"), priority="urgent")

    assert (found.status, found.code) == (400, "invalid_value")
    assert "normal, low, batch" in str(found)
    assert "high" not in str(found)


def test_classes_are_listed_from_the_most_valuable_however_they_are_configured() -> None:
    terms = ServiceTerms.of_everybody(CLASSES[::-1], default_class="low")

    assert "most valuable first: high, normal, low, batch" in str(refusal(terms, priority="5"))
    assert terms.least_class.name == "batch"


@pytest.mark.parametrize("ttft_ms", [2000, 2001, 60_000])
def test_a_request_may_take_more_time(ttft_ms: float) -> None:
    assert ask(terms_of("normal"), slo={"ttft_ms": ttft_ms})[1].ttft_s == ttft_ms / 1000


@pytest.mark.parametrize(
    ("headers", "fields", "field", "words"),
    [
        ({}, {"slo": {"ttft_ms": 1999}}, "slo.ttft_ms", "is 1999, client 'acme' is promised 2000"),
        ({}, {"slo": {"tpot_ms": 99.5}}, "slo.tpot_ms", "is 99.5, client 'acme' is promised 100"),
        ({"X-ProServe-TTFT-MS": "5"}, {}, "X-ProServe-TTFT-MS", "is 5"),
        ({"X-ProServe-TPOT-MS": "5"}, {}, "X-ProServe-TPOT-MS", "is 5"),
        ({}, {"slo": {"ttft_ms": 1}, "priority": "batch"}, "slo.ttft_ms", "is 1,"),
    ],
)
def test_a_request_may_not_take_less_time(
    headers: dict[str, str], fields: dict[str, Any], field: str, words: str
) -> None:
    found = refusal(terms_of("normal"), headers, **fields)

    assert (found.status, found.code, found.field) == (403, "objective_not_allowed", field)
    assert words in str(found)


def test_who_is_promised_nothing_may_ask_for_nothing() -> None:
    found = refusal(terms_of("batch"), slo={"ttft_ms": 3_600_000})

    assert "is promised none; leave it out" in str(found)
    assert ask(terms_of("batch"))[1].ttft_s == math.inf


def test_a_client_may_be_promised_more_or_less_than_its_class() -> None:
    faster = terms_of("normal", ttft_ms=500)
    slower = terms_of("normal", ttft_ms=9000)

    assert ask(faster)[1] == Slo(ttft_s=0.5, tpot_s=0.1)
    assert ask(faster, slo={"ttft_ms": 500})[1].ttft_s == 0.5
    assert refusal(faster, slo={"ttft_ms": 499}).code == "objective_not_allowed"
    assert ask(slower)[1].ttft_s == 9.0
    assert refusal(slower, slo={"ttft_ms": 2000}).code == "objective_not_allowed"


def test_a_lesser_class_brings_its_own_objectives_but_none_beyond_the_clients() -> None:
    """low promises 5 s and 200 ms."""
    assert ask(terms_of("high"), priority="low")[1] == Slo(ttft_s=5.0, tpot_s=0.2)
    assert ask(terms_of("high", ttft_ms=9000), priority="low")[1].ttft_s == 9.0


def test_a_lesser_class_may_keep_the_clients_objectives() -> None:
    assert ask(terms_of("high"), priority="low", slo={"ttft_ms": 1000})[1].ttft_s == 1.0


@pytest.mark.parametrize(
    ("weight", "name", "expected"),
    [
        (7.0, "high", 7.0),
        (7.0, "low", 1.0),
        (0.7, "high", 0.7),
        (0.7, "low", 0.7),
        (0.7, "batch", 0.5),
    ],
)
def test_a_clients_weight_replaces_its_classs_and_never_raises_a_lesser_one(
    weight: float, name: str, expected: float
) -> None:
    assert ask(terms_of("high", weight=weight), priority=name)[0].weight == expected


def test_a_class_of_equal_worth_may_be_named() -> None:
    twin = ServiceClassConfig(name="twin", weight=2.0, ttft_ms=100)
    client = ClientConfig(name="acme", priority_class="normal")
    terms = ServiceTerms.of_client(client, (*CLASSES, twin))

    priority_class, slo = ask(terms, priority="twin")

    assert priority_class.name == "twin"
    assert slo.ttft_s == 2.0  # The client's own, which is longer.


def test_everybody_may_ask_for_everything() -> None:
    terms = ServiceTerms.of_everybody(CLASSES, default_class="low")

    assert ask(terms)[0].name == "low"
    priority_class, slo = ask(terms, priority="high", slo={"ttft_ms": 1, "tpot_ms": 1})
    assert priority_class.weight == 4.0
    assert slo == Slo(ttft_s=0.001, tpot_s=0.001)
