"""The dashboard in a real browser, over three nodes under load."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from tests.integration.deployments import (
    Deployment,
    running,
    until,
    write_deployment,
)

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's package chromium")

KEY = "a-dashboard-key-for-tests"
CLASSES = ("high", "normal", "low")
CHARTS = ("gain", "attainment", "boundary", "steps", "blocks", "copies")
MOVING_CHARTS = ("boundary", "steps", "blocks", "copies")
"""The others may well stay at 100 %."""


class Load:
    """Requests of all classes, as long as it lasts, sent from a thread of its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send_all()))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    async def _send_all(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=120) as client:

            async def keep_sending(seed: int) -> None:
                draw = random.Random(seed)
                while not self._is_over.is_set():
                    draw.choice([40, 300])
                    body = {
                        "model": "smollm2-135m",
                        "prompt": [
                            draw.randrange(100, 40_000) for _ in range(draw.choice([40, 300]))
                        ],
                        "max_tokens": draw.choice([10, 40]),
                        "ignore_eos": True,
                        "priority": draw.choice(CLASSES),
                    }
                    (await client.post("/v1/completions", json=body)).raise_for_status()

            await asyncio.gather(*(keep_sending(seed) for seed in range(9)))


@pytest.fixture(scope="module")
def observed(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Three nodes with little memory, so that blocks are copied."""
    directory = tmp_path_factory.mktemp("dashboard")
    key_file = directory / "key"
    key_file.write_text(KEY)
    path = write_deployment(
        directory,
        engine_dir,
        num_nodes=3,
        engine={"device_kv_bytes": "20MiB", "host_kv_bytes": "64MiB", "num_threads": 1},
        node={"max_model_len": 512, "kv_cache": {"offload_threshold_blocks": 1}},
        router={"dashboard": {"key": {"secret_file": str(key_file)}}},
    )
    with running(path) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, observed: Deployment) -> Iterator[Page]:
    """The page before a key is given; nothing may go wrong on it, but for the key's refusal."""
    # The checker for accessibility is a script that the page itself would not allow.
    page = browser.new_page(bypass_csp=True)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None
    )
    page.goto(f"{observed.url}/dashboard")
    yield page
    page.close()
    assert [trouble for trouble in troubles if "401 (Unauthorized)" not in trouble] == []


def enter(page: Page, key: str = KEY) -> None:
    page.get_by_label("Dashboard key").fill(key)
    page.keyboard.press("Enter")


def shown(page: Page, table: str, row: int, column: int) -> float:
    """The number behind a cell, as `/metrics` has it."""
    cell = page.locator(f"#{table} tbody tr").nth(row).locator("td").nth(column)
    return float(cell.get_attribute("data-value") or "nan")


def label(page: Page, chart: str) -> str:
    """What a chart tells those who cannot see it: its newest numbers."""
    return page.locator(f"#chart-{chart}").get_attribute("aria-label") or ""


def num_points(page: Page, chart: str) -> int:
    return int(page.locator(f"#chart-{chart}").get_attribute("data-points") or 0)


def num_pictures(page: Page) -> int:
    return int(page.locator("body").get_attribute("data-pictures") or 0)


def test_every_panel_shows_what_the_metrics_say_and_moves(page: Page, observed: Deployment) -> None:
    enter(page)
    with Load(observed.url):
        until(lambda: num_pictures(page) >= 6, "the page has drawn some pictures")
        before = [shown(page, "classes", row, 3) for row in range(3)]
        labels = {name: label(page, name) for name in MOVING_CHARTS}
        points = {name: num_points(page, name) for name in CHARTS}
        until(
            lambda: all(label(page, name) != labels[name] for name in MOVING_CHARTS),
            "every chart has moved",
        )
        assert all(num_points(page, name) > points[name] for name in CHARTS)
        assert all(page.locator(f"#chart-{name} canvas").count() == 1 for name in CHARTS)
        assert page.locator("#nodes tbody tr").count() == 3
        until(lambda: page.locator("#requests tbody tr").count() >= 9, "requests are listed")
        until(
            lambda: all(shown(page, "classes", row, 3) > gain for row, gain in enumerate(before)),
            "each class has gained",
        )
    # At rest, page and /metrics speak of the same moment.
    settled = num_pictures(page) + 2
    until(lambda: num_pictures(page) >= settled, "the page has drawn the end")
    for row, name in enumerate(CLASSES):
        of_class = f'priority_class="{name}"'
        for column, metric in (
            (2, f"proserve_router_requests_in_progress{{{of_class}}}"),
            (3, f"proserve_router_service_gain_captured_total{{{of_class}}}"),
            (6, f'proserve_router_sequences_total{{objectives="met",{of_class}}}'),
            (7, f'proserve_router_sequences_total{{objectives="missed",{of_class}}}'),
        ):
            assert shown(page, "classes", row, column) == observed.router_metric(metric), metric
    for node in range(3):
        for column, metric in (
            (2, 'proserve_node_open_requests{state="running"}'),
            (4, 'proserve_node_boundary_requests{side="urgent"}'),
            (5, 'proserve_node_boundary_requests{side="normal"}'),
            (6, "proserve_node_kv_usage_fraction"),
            (7, "proserve_node_preemptions_total"),
        ):
            assert shown(page, "nodes", node, column) == observed.node_metric(metric, node=node)


def test_a_request_s_story_opens_by_keyboard(page: Page, observed: Deployment) -> None:
    answer = httpx.post(
        f"{observed.url}/v1/completions",
        json={"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 3},
    ).json()
    enter(page)
    link = page.get_by_role("button", name=answer["id"])
    link.wait_for()

    link.focus()
    page.keyboard.press("Enter")

    dialog = page.get_by_role("dialog")
    dialog.get_by_role("cell", name="ended").wait_for()
    text = dialog.inner_text()
    assert all(event in text for event in ("accepted", "sent", "received", "prefill", "finished"))
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_without_the_right_key_nothing_is_shown(page: Page, observed: Deployment) -> None:
    enter(page, "something else entirely")

    page.get_by_text("key is missing or wrong").wait_for()
    assert num_pictures(page) == 0
    for path in ("/dashboard/events", "/dashboard/requests/x"):
        assert httpx.get(observed.url + path).status_code == httpx.codes.UNAUTHORIZED


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_stands_in_anybody_s_way(page: Page, scheme: str, width: int) -> None:
    """axe looks at contrast, names, roles and order; nor does the page scroll sideways."""
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": 900})
    enter(page)
    until(lambda: num_pictures(page) >= 2, "the page has drawn something")

    found = Axe().run(page).response["violations"]

    assert [(each["id"], each["impact"]) for each in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
