"""Nodes that a file lists, which changes while the router runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.core.errors import ConfigError
from orchestrator.wire import TokenEvent
from router.config import RouterConfig
from tests.router import sse
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode, Stall, saying


@pytest.fixture
def other() -> Iterator[FakeNode]:
    fake = FakeNode("node-1")
    with fake.serve() as server:
        fake.url = server.url
        yield fake


@pytest.fixture
def path(tmp_path: Path, node: FakeNode) -> Path:
    return write(tmp_path / "nodes.json", [node])


@pytest.fixture
def router(path: Path, start_router: RouterFactory) -> Iterator[RunningRouter]:
    with start_router([], nodes_file=path) as running:
        yield running


def write(path: Path, nodes: Sequence[FakeNode]) -> Path:
    """List nodes, in one step for whoever reads."""
    new = path.with_suffix(".new")
    entries = [{"endpoint_id": node.endpoint_id, "url": node.url} for node in nodes]
    new.write_text(json.dumps({"nodes": entries}))
    return new.replace(path)


def wait_for_nodes(router: RunningRouter, *endpoint_ids: str) -> None:
    """Wait until the router can use these nodes, and no other; the test's own timeout bounds it."""
    while router.http.get("/health").json()["nodes"] != dict.fromkeys(endpoint_ids, "ready"):
        pass


def test_a_node_that_is_added_is_used_and_one_that_is_taken_out_finishes_what_it_has(
    router: RunningRouter, node: FakeNode, other: FakeNode, path: Path
) -> None:
    node.script = lambda _: [TokenEvent((70,)), Stall(), *saying([71, 72])(_)]
    other.script = saying([73])
    body = {"model": "tiny", "prompt": "Hi", "stream": True}

    with router.http.stream("POST", "/v1/completions", json=body) as response:
        chunks = sse.arriving(response)
        next(chunks)
        write(path, [other])
        wait_for_nodes(router, "node-1")
        second = router.complete()
        node.release()
        *_, done = chunks

    assert done == "[DONE]"
    assert second.status_code == 200
    assert (len(node.requests), len(other.requests)) == (1, 1)


def test_a_node_that_moves_is_followed(
    router: RunningRouter, node: FakeNode, other: FakeNode, path: Path
) -> None:
    other.endpoint_id = node.endpoint_id
    write(path, [other])

    while not other.requests:
        assert router.complete().status_code in {200, 503}


def test_a_wrong_file_leaves_the_nodes_as_they_are(
    router: RunningRouter, node: FakeNode, other: FakeNode, path: Path
) -> None:
    for content in ["nodes: [", '{"nodes": [{"endpoint_id": "node-1"}]}', ""]:
        path.write_text(content)
        assert router.complete().status_code == 200
    path.unlink()
    assert router.complete().status_code == 200
    write(path, [node, other])

    wait_for_nodes(router, "node-0", "node-1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        ('{"nodes": [{"endpoint_id": "a", "url": "ftp://x"}]}', "is not the address of a service"),
        (
            '{"nodes": [{"endpoint_id": "a", "url": "http://x:1"},'
            ' {"endpoint_id": "a", "url": "http://x:2"}]}',
            "each may be listed once",
        ),
    ],
)
def test_a_router_does_not_start_with_a_wrong_file(
    start_router: RouterFactory, tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "nodes.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(ConfigError, match=words), start_router([], nodes_file=path):
        pass


def test_a_file_and_a_list_are_not_both_given(tmp_path: Path, node: FakeNode) -> None:
    nodes = [{"endpoint_id": "a", "url": node.url}]
    settings = {"engine_dir": tmp_path, "model": "tiny", "nodes_file": tmp_path / "nodes.json"}

    with pytest.raises(ValueError, match="nodes_file lists all nodes there are"):
        RouterConfig.model_validate({**settings, "nodes": nodes})
