from __future__ import annotations

from dataclasses import replace

from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import ScheduledRequest, SchedulerOutput
from orchestrator.request_marks import RequestMarks
from tests.engines.step_driver import make_plan
from tests.factories import make_request


def computing(request_id: str, *, num_computed: int, num_new: int) -> ScheduledRequest:
    """Return a part of a step for a request with a prompt of ten tokens."""
    return ScheduledRequest(make_request(request_id), num_computed, num_new, [])


def said(marks: RequestMarks, plan: SchedulerOutput) -> list[tuple[str, str, int | None]]:
    """Return what is marked as (request, name, number of tokens or blocks)."""
    found = marks.of_step(plan, 5.0)
    assert all(mark.began_s == 5.0 for mark in found)
    return [(m.request_id, m.name, m.num_tokens or m.num_blocks) for m in found]


def test_chunks_of_a_prompt_are_marked_and_single_tokens_are_not() -> None:
    marks = RequestMarks()
    marks.follow("a")

    steps = [
        said(marks, make_plan(computing("a", num_computed=start, num_new=count)))
        for start, count in ((0, 6), (6, 3), (9, 1), (10, 1), (11, 1))
    ]

    prefills = [[("a", "prefill", count)] for count in (6, 3, 1)]
    assert steps == [*prefills, [], []]


def test_what_happens_to_a_preempted_request_is_marked_in_order() -> None:
    marks = RequestMarks()
    marks.follow("a")
    offload = KVTransfer(1, "a", TransferDirection.OFFLOAD, (3, 4), (0, 1))
    onboard = KVTransfer(2, "a", TransferDirection.ONBOARD, (5,), (0,))

    leaving = said(marks, replace(make_plan(transfers=[offload]), preempted_ids=("a", "b")))
    coming = make_plan(computing("a", num_computed=8, num_new=4), transfers=[onboard])
    back = said(marks, coming)

    assert leaving == [("a", "preempted", None), ("a", "offload", 2)]
    assert back == [("a", "onboard", 1), ("a", "resumed", None), ("a", "prefill", 4)]
    assert said(marks, coming)[1:] == [("a", "prefill", 4)], "it is back once"


def test_nothing_is_marked_of_requests_that_are_unknown_or_have_ended() -> None:
    marks = RequestMarks()
    marks.follow("a")
    marks.forget("a")
    marks.forget("b")

    assert said(marks, make_plan(computing("a", num_computed=0, num_new=5))) == []
    marks.follow("c")
    assert said(marks, make_plan(computing("a", num_computed=0, num_new=5))) == []
