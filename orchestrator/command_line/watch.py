"""`proserve top` and `proserve trace`: what the dashboard shows, in a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from orchestrator.core.errors import ConfigError, ProServeError

if TYPE_CHECKING:
    import httpx

    from orchestrator.journal import StoryEvent
    from router.dashboard.figures import NodeFigures, Picture
    from router.dashboard.routes import TracedRequest

KEY_VARIABLE = "PROSERVE_DASHBOARD_KEY"
_TIMEOUT_S = 10.0
_MAX_REQUESTS = 12
_SHOWN_ID = 17
"""Characters of a request's id, enough for `proserve trace`."""

Url = Annotated[str, typer.Option(help="Address of the router.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(help=f"File with the dashboard's key; by default, {KEY_VARIABLE} has it."),
]


class WatchFailed(ProServeError):
    """The router does not show its figures."""


def add_watch_commands(app: typer.Typer, console: Console) -> None:
    """Add the commands to the command line."""

    @app.command()
    def top(
        url: Url = "http://127.0.0.1:8000",
        key_file: KeyFile = None,
        num_pictures: Annotated[
            int | None, typer.Option("--count", help="End after so many pictures.", min=1)
        ] = None,
    ) -> None:
        """Show live what a router and its nodes do; Ctrl-C ends it."""
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            for index, picture in enumerate(pictures(url, read_key(key_file)), 1):
                live.update(as_tables(picture), refresh=True)
                if index == num_pictures:
                    break

    @app.command()
    def trace(
        request_id: Annotated[
            str, typer.Argument(help="Of an answer, or how it begins; or its X-Request-Id.")
        ],
        url: Url = "http://127.0.0.1:8000",
        key_file: KeyFile = None,
    ) -> None:
        """Tell what became of a recent request, on the router and on every node it was sent to."""
        for line in story_lines(fetch_story(url, read_key(key_file), request_id)):
            console.print(escape(line), highlight=False, soft_wrap=True)


def read_key(key_file: Path | None) -> str | None:
    """Return the dashboard's key, if there is one.

    Raises:
        ConfigError: the file cannot be read.
    """
    if key_file is None:
        return os.environ.get(KEY_VARIABLE)
    try:
        return key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--key-file {key_file}: cannot be read: {error}") from error


def pictures(url: str, key: str | None) -> Iterator[Picture]:
    """Yield the router's figures once a second, until the router ends.

    Raises:
        WatchFailed: there is no router, or it wants another key.
    """
    import httpx
    import msgspec

    from router.dashboard.figures import Picture

    decoder = msgspec.json.Decoder(Picture)
    try:
        with (
            httpx.Client(base_url=url, headers=_headers(key), timeout=_TIMEOUT_S) as client,
            client.stream("GET", "/dashboard/events") as answer,
        ):
            _check(answer)
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield decoder.decode(line.removeprefix("data: "))
    except httpx.HTTPError as error:
        raise WatchFailed(f"{url} does not answer: {error}") from error


def fetch_story(url: str, key: str | None, request_id: str) -> TracedRequest:
    """Return what is known of a request.

    Raises:
        WatchFailed: nothing is; there is no router, or it wants another key.
    """
    import httpx
    import msgspec

    from router.dashboard.routes import TracedRequest

    try:
        with httpx.Client(base_url=url, headers=_headers(key), timeout=_TIMEOUT_S) as client:
            answer = client.get(f"/dashboard/requests/{request_id}")
            _check(answer)
    except httpx.HTTPError as error:
        raise WatchFailed(f"{url} does not answer: {error}") from error
    return msgspec.json.decode(answer.content, type=TracedRequest)


def story_lines(traced: TracedRequest) -> Iterator[str]:
    """Yield a request's life, one event a line, in the order of the machines' clocks."""
    events = [(told.told_by, event) for told in traced.stories for event in told.story.events]
    events.sort(key=lambda pair: pair[1].at_unix_s)
    yield f"{traced.completion_id} (X-Request-Id {traced.request_id})"
    width = max((len(told_by) for told_by, _ in events), default=0)
    first_s = events[0][1].at_unix_s if events else 0.0
    for told_by, event in events:
        after_s = event.at_unix_s - first_s
        yield f"{after_s:9.3f} s  {told_by:{width}}  {_told(event)}"
    omitted = {told.told_by: told.story.num_omitted for told in traced.stories}
    for told_by, count in omitted.items():
        if count:
            yield f"{told_by} has left out {count} events in between"


def as_tables(picture: Picture) -> Group:
    """Return the figures as tables for a terminal."""
    return Group(_classes(picture), _nodes(picture.nodes), _requests(picture))


def _classes(picture: Picture) -> Table:
    table = _table(
        f"classes; {picture.waiting_sequences:.0f} sequences waiting",
        "class", "in progress", "gain", "of possible", "lately", "met", "missed", "TTFT ms",
    )  # fmt: skip
    for each in picture.classes:
        ratio = each.gain_captured / each.gain_possible if each.gain_possible else None
        table.add_row(
            each.name,
            _number(each.requests_in_progress),
            _number(each.gain_captured, 1),
            _percent(ratio),
            _percent(each.recent_gain_ratio),
            _number(each.sequences_met),
            _number(each.sequences_missed),
            _number(each.recent_ttft_ms),
        )
    return table


def _nodes(nodes: Iterable[NodeFigures]) -> Table:
    table = _table(
        "nodes; steps measured and predicted in ms",
        "node", "state", "run", "wait", "urgent", "normal", "KV", "preempted",
        "tokens/s", "step", "pred.",
    )  # fmt: skip
    for each in nodes:
        table.add_row(
            each.endpoint_id,
            "ready" if each.is_usable else escape(each.obstacle or ""),
            _number(each.running),
            _number(each.waiting),
            _number(each.urgent),
            _number(each.normal),
            _percent(each.kv_usage_fraction),
            _number(each.preemptions),
            _number(each.recent_tokens_per_s),
            _number(each.recent_step_ms, 1),
            _number(each.recent_predicted_step_ms, 1),
        )
    return table


def _requests(picture: Picture) -> Table:
    table = _table(
        "latest requests",
        "request", "class", "state", "node", "tried", "tokens", "age s", "TTFT ms",
    )  # fmt: skip
    for each in picture.requests[:_MAX_REQUESTS]:
        table.add_row(
            each.completion_id[:_SHOWN_ID],
            each.priority_class,
            escape(each.state),
            each.node or "-",
            _number(each.num_nodes),
            _number(each.num_completion_tokens),
            _number(each.age_s, 1),
            _number(each.ttft_ms),
        )
    return table


def _table(title: str, first: str, *others: str) -> Table:
    # Narrow enough for 80 columns.
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
        collapse_padding=True,
    )
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _told(event: StoryEvent) -> str:
    details = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else
        f"{name.replace('_', ' ')} {value}"
        for name, value in event.attributes.items()
    )  # fmt: skip
    return f"{event.name.replace('_', ' ')}{': ' if details else ''}{details}"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def _check(answer: httpx.Response) -> None:
    if answer.is_success:
        return
    content = answer.read()
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = content[:200].decode(errors="replace")
    way_out = f"; give it by --key-file or {KEY_VARIABLE}" if answer.status_code == 401 else ""
    raise WatchFailed(f"{answer.url} answers {answer.status_code}: {message}{way_out}")
