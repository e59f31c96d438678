from __future__ import annotations

import math

import pytest

from orchestrator.core.backoff import backoff_s
from orchestrator.core.request import ResumePoint
from orchestrator.core.slo import Slo
from router.policy import RoutingRequest
from router.retries import RetryRules, SequenceProgress

USUAL = Slo(ttft_s=1.0, tpot_s=0.1)
RULES = RetryRules(max_attempts=3, first_delay_s=0.05, max_delay_s=0.3, max_wait_s=30.0)


def progress(
    *,
    max_wait_s: float | None = None,
    slo: Slo = USUAL,
    max_tokens: int = 11,
) -> SequenceProgress:
    """A sequence that arrived at 100 s; its last token is due after 1 + 10 x 0.1 s, at 102."""
    routing = RoutingRequest(
        request_id="r",
        prompt_token_ids=tuple(range(40)),
        max_tokens=max_tokens,
        priority_class="normal",
        weight=2.0,
        slo=slo,
        arrival_s=100.0,
    )
    return SequenceProgress(routing, RULES, max_wait_s=max_wait_s)


def test_pauses_double_up_to_the_longest() -> None:
    pauses_s = [backoff_s(n, first_s=0.05, max_s=0.3) for n in (1, 2, 3, 4, 5, 10_000)]

    assert pauses_s == pytest.approx([0.05, 0.1, 0.2, 0.3, 0.3, 0.3])


@pytest.mark.parametrize("num_failures", [1, 2, 3, 50])
def test_a_pause_is_any_part_of_the_whole_one(num_failures: int) -> None:
    """Sequences that lost the same node at once do not come to the next one at once."""
    whole_s = backoff_s(num_failures, first_s=0.05, max_s=0.3)

    for chance in (0.0, 0.25, 0.999):
        assert RULES.delay_s(num_failures, chance) == pytest.approx(chance * whole_s)


def test_there_is_nothing_to_resume_before_the_first_token() -> None:
    sequence = progress()
    sequence.accept()
    sequence.receive((), 100.2)

    assert sequence.resume_point is None
    assert sequence.routing.num_prompt_tokens == 40


def test_the_next_node_learns_every_token_and_when_the_first_one_came() -> None:
    sequence = progress()
    for token_id, now_s in ((7, 100.5), (8, 100.6), (9, 100.7)):
        sequence.receive((token_id,), now_s)

    assert sequence.resume_point == ResumePoint((7, 8, 9), ttft_s=0.5)


def test_a_policy_sees_a_longer_prompt_and_the_deadlines_that_there_always_were() -> None:
    """Three tokens are delivered; the fourth is due 1 + 3 x 0.1 s after arrival, as ever."""
    sequence = progress()
    sequence.receive((7, 8, 9), 100.5)

    routing = sequence.routing

    assert routing.prompt_token_ids == (*range(40), 7, 8, 9)
    assert routing.max_tokens == 8
    assert routing.slo.ttft_s == pytest.approx(1.3)
    assert (routing.slo.tpot_s, routing.arrival_s) == (0.1, 100.0)


def test_no_promise_stays_no_promise() -> None:
    sequence = progress(slo=Slo())
    sequence.receive((7,), 100.5)

    assert sequence.routing.slo == Slo(math.inf, math.inf)
    assert sequence.why_no_retry(1e9) is None


def test_a_retry_needs_a_token_that_can_be_in_time() -> None:
    sequence = progress()
    sequence.accept()
    sequence.lose_node("a", 101.0, is_engine_error=False)

    assert sequence.why_no_retry(101.99) is None
    assert "no token of it can be in time any more" in str(sequence.why_no_retry(102.0))


def test_a_client_that_waits_gets_its_retry_however_late() -> None:
    """5 s from the moment that the node was lost, wherever the deadlines are."""
    sequence = progress(max_wait_s=5.0)
    sequence.accept()
    sequence.lose_node("a", 200.0, is_engine_error=False)

    assert sequence.why_no_retry(205.0) is None
    assert sequence.why_no_wait(204.9) is None
    assert sequence.why_no_retry(205.1) is not None
    assert sequence.why_no_wait(205.0) == "no node could take it within 5 s"


def test_a_client_that_does_not_wait_still_gets_a_retry_in_time() -> None:
    sequence = progress(max_wait_s=0.0)
    sequence.accept()
    sequence.lose_node("a", 101.0, is_engine_error=False)

    assert sequence.why_no_retry(101.5) is None
    assert sequence.why_no_wait(101.5) == "no node could take it within 0 s"


def test_what_no_node_has_taken_yet_waits_for_none_unless_asked() -> None:
    assert progress().why_no_wait(100.0) == "no other node can take it now"
    assert progress(max_wait_s=5.0).why_no_wait(104.9) is None
    assert progress(max_wait_s=5.0).why_no_wait(105.0) is not None


def test_what_a_node_had_taken_waits_for_another_up_to_the_limit() -> None:
    sequence = progress()
    sequence.accept()
    sequence.lose_node("a", 101.0, is_engine_error=False)

    assert sequence.why_no_wait(130.9) is None
    assert sequence.why_no_wait(131.0) == "no node could take it within 30 s"


def test_the_wait_begins_anew_with_each_node_that_took_it() -> None:
    sequence = progress()
    for now_s in (101.0, 150.0):
        sequence.accept()
        sequence.lose_node("a", now_s, is_engine_error=False)

    assert sequence.why_no_wait(150.0) is None


def test_the_wait_goes_on_over_nodes_that_never_took_it() -> None:
    sequence = progress()
    sequence.accept()
    for name, now_s in (("a", 101.0), ("b", 110.0), ("c", 120.0)):
        sequence.lose_node(name, now_s, is_engine_error=False)

    assert sequence.why_no_wait(131.0) is not None


def test_attempts_are_counted_over_the_whole_life() -> None:
    """Tokens shorten the pauses, but do not buy more attempts: a request that kills each node it
    comes to has to stop somewhere."""
    sequence = progress()
    for name in "abc":
        sequence.num_attempts += 1
        sequence.accept()
        sequence.receive((7,), 100.5)
        assert sequence.num_failures == 0
        sequence.lose_node(name, 100.5, is_engine_error=False)
        assert sequence.num_failures == 1

    assert sequence.failed_instances == {"a", "b", "c"}
    assert "sent to 3 nodes, the limit" in str(sequence.why_no_retry(100.5))


def test_one_failing_engine_is_replaced_at_once_or_not_at_all() -> None:
    sequence = progress(max_wait_s=60.0)
    sequence.accept()
    sequence.lose_node("a", 100.5, is_engine_error=True)

    assert sequence.why_no_retry(100.5) is None
    assert sequence.why_no_wait(100.5) == "no other node can take it now"

    sequence.lose_node("b", 100.6, is_engine_error=True)

    assert sequence.why_no_retry(100.6) == "2 engines have failed on it"
