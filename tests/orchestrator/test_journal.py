from __future__ import annotations

from orchestrator.journal import MAX_EARLY_EVENTS, MAX_LATE_EVENTS, Journal, StoryBook


def test_a_story_tells_the_events_in_order_without_what_is_not_known() -> None:
    book = StoryBook()
    book.note("received", num_prompt_tokens=5, num_delivered_tokens=None)
    book.note("finished", reason="stop")

    story = book.story("a")

    assert [event.name for event in story.events] == ["received", "finished"]
    assert story.events[0].attributes == {"num_prompt_tokens": 5}
    assert story.num_omitted == 0


def test_an_event_may_have_happened_before_it_is_told() -> None:
    book = StoryBook()
    book.note("now")
    book.note("before", ago_s=10.0)

    now, before = book.story("a").events

    assert 9.9 < now.at_unix_s - before.at_unix_s < 10.1


def test_of_a_long_story_the_beginning_and_the_end_stay() -> None:
    book = StoryBook()
    most = MAX_EARLY_EVENTS + MAX_LATE_EVENTS
    for index in range(most + 7):
        book.note(str(index))

    story = book.story("a")

    assert len(story.events) == most
    assert story.num_omitted == 7
    assert story.events[0].name == "0"
    assert story.events[MAX_EARLY_EVENTS].name == str(MAX_EARLY_EVENTS + 7)
    assert story.events[-1].name == str(most + 6)


def test_the_newest_event_of_a_name_is_found() -> None:
    book = StoryBook()
    for node in ("a", "b"):
        book.note("sent", node=node)

    last = book.last("sent")

    assert last is not None
    assert last.attributes == {"node": "b"}
    assert book.last("ended") is None


def test_the_oldest_request_makes_room_and_one_that_comes_back_goes_on() -> None:
    journal = Journal(max_requests=2)
    first = journal.begin("a")
    journal.begin("b")

    assert journal.begin("a") is first, "a request that is resumed here"
    journal.begin("c")
    assert journal.book("b") is None
    assert journal.book("a") is first
