from __future__ import annotations

from rich.console import Console

from orchestrator.command_line.watch import as_tables, story_lines
from orchestrator.journal import Story, StoryEvent
from router.dashboard.figures import ClassFigures, NodeFigures, Picture, RequestRow
from router.dashboard.routes import ToldStory, TracedRequest


def test_a_story_of_several_tellers_is_told_in_order() -> None:
    router = Story(
        "cmpl-1",
        (
            StoryEvent("accepted", 100.0, {"priority_class": "high"}),
            StoryEvent("sent", 100.001, {"node": "node-0", "expected_gain": 2.123456}),
            StoryEvent("ended", 101.0, {"status": 200}),
        ),
    )
    node = Story("cmpl-1-0", (StoryEvent("prefill", 100.5, {"num_tokens": 12}),), num_omitted=3)
    traced = TracedRequest(
        "cmpl-1", "req-1", [ToldStory("router", router), ToldStory("node-0", node)]
    )

    assert list(story_lines(traced)) == [
        "cmpl-1 (X-Request-Id req-1)",
        "    0.000 s  router  accepted: priority class high",
        "    0.001 s  router  sent: node node-0, expected gain 2.123",
        "    0.500 s  node-0  prefill: num tokens 12",
        "    1.000 s  router  ended: status 200",
        "node-0 has left out 3 events in between",
    ]


def test_the_tables_show_the_figures_and_a_dash_for_what_nobody_knows() -> None:
    picture = Picture(
        at_unix_s=0.0,
        window_s=5.0,
        waiting_sequences=2,
        classes=[ClassFigures("high", 4.0, 1, 30, 40, 3, 1, 99, 6.0, 0.75, None, None)],
        clients=[],
        nodes=[NodeFigures("node-0", is_usable=False, obstacle="does [not] answer", sequences=1)],
        requests=[
            RequestRow("cmpl-1", None, "high", "decoding", "node-0", 2, 10, 1_234, 1.25, None)
        ],
    )
    console = Console(width=200)

    with console.capture() as capture:
        console.print(as_tables(picture))

    text = capture.get()
    for shown in ("2 sequences waiting", "75.0%", "does [not] answer", "1,234", "1.2"):
        assert shown in text
