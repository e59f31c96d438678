from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from orchestrator.peers import Secret
from router.access import RequestRecord
from router.dashboard.observer import Observer, RecentRequests
from router.dashboard.routes import add_dashboard_routes
from router.errors import Refused, Unauthenticated
from router.metrics import RouterMetrics


class NoNodes:
    def obstacles(self, now_s: float) -> dict[str, str | None]:
        return {}

    def urls(self) -> dict[str, str]:
        return {}


async def no_metrics() -> str:
    return ""


def make_app(requests: RecentRequests, key: Secret | None) -> FastAPI:
    observer = Observer(
        NoNodes(), requests, own_metrics=no_metrics, class_weights={"high": 4.0}, now_s=lambda: 5.0
    )
    app = FastAPI()
    add_dashboard_routes(app, observer, requests, key)
    return app


def client_of(app: FastAPI, host: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(host, 1234))
    return httpx.AsyncClient(transport=transport, base_url="http://router")


def make_record(completion_id: str) -> RequestRecord:
    record = RequestRecord(f"req-{completion_id}", 1.0, RouterMetrics())
    record.completion_id = completion_id
    record.book.note("accepted")
    return record


@pytest.fixture
def requests() -> RecentRequests:
    found = RecentRequests()
    for completion_id in ("cmpl-0123456789", "cmpl-0123456zzz"):
        found.add(make_record(completion_id))
    return found


@pytest.mark.parametrize("request_id", ["cmpl-0123456789", "req-cmpl-0123456789", "cmpl-01234567"])
async def test_a_request_is_found_by_its_ids_and_by_how_it_begins(
    requests: RecentRequests, request_id: str
) -> None:
    async with client_of(make_app(requests, None), "127.0.0.1") as client:
        answer = await client.get(f"/dashboard/requests/{request_id}")

    assert answer.json()["completion_id"] == "cmpl-0123456789"
    (told,) = answer.json()["stories"]
    assert told["told_by"] == "router"
    assert told["story"]["events"][0]["name"] == "accepted"


@pytest.mark.parametrize("request_id", ["cmpl-012345", "cmpl-1123456789", ""])
async def test_too_little_of_an_id_finds_nothing(requests: RecentRequests, request_id: str) -> None:
    assert requests.find(request_id) is None


async def test_an_unknown_request_is_refused_in_words(requests: RecentRequests) -> None:
    async with client_of(make_app(requests, None), "127.0.0.1") as client:
        with pytest.raises(Refused, match="nothing is known of request 'nonsense'"):
            await client.get("/dashboard/requests/nonsense")


@pytest.mark.parametrize("path", ["/dashboard/events", "/dashboard/requests/cmpl-0123456789"])
async def test_without_a_key_other_machines_see_nothing(
    requests: RecentRequests, path: str
) -> None:
    async with client_of(make_app(requests, None), "10.1.2.3") as client:
        assert (await client.get("/dashboard")).status_code == httpx.codes.OK, "the page is empty"
        with pytest.raises(Unauthenticated, match=r"this machine alone; set dashboard\.key"):
            await client.get(path)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer something-else-entirely"}])
async def test_with_a_key_only_who_knows_it_sees_something(
    requests: RecentRequests, headers: dict[str, str]
) -> None:
    key = Secret("0123456789abcdef")
    path = "/dashboard/requests/cmpl-0123456789"
    async with client_of(make_app(requests, key), "127.0.0.1") as client:
        with pytest.raises(Unauthenticated, match="missing or wrong"):
            await client.get(path, headers=headers)
        known = {"authorization": key.authorization()}
        assert (await client.get(path, headers=known)).status_code == httpx.codes.OK


async def test_the_page_loads_nothing_from_elsewhere(requests: RecentRequests) -> None:
    async with client_of(make_app(requests, None), "127.0.0.1") as client:
        page = await client.get("/dashboard")
        script = await client.get("/dashboard/page/dashboard.js")
        with pytest.raises(Refused):
            await client.get("/dashboard/page/routes.py")

    assert "http://" not in page.text
    assert "https://" not in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"


class OneNode(NoNodes):
    def urls(self) -> dict[str, str]:
        return {"n": "http://127.0.0.1:9"}


async def test_who_watches_is_told_when_the_figures_end_and_may_ask_again() -> None:
    """The router's own figures cannot be read, once: nobody waits for a picture for ever."""
    texts = ["this is no metric", ""]

    async def own_metrics() -> str:
        return texts.pop(0)

    observer = Observer(
        OneNode(), RecentRequests(), own_metrics=own_metrics, class_weights={}, now_s=lambda: 0.0
    )

    assert [picture async for picture in observer.pictures()] == []
    again = observer.pictures()
    assert b'"nodes":[]' in await anext(again)
    await again.aclose()
    await observer.close()
