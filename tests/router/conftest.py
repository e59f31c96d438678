"""A tiny tokenizer, a fake node, and a real router in front of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers, trainers

import tests.fuzzing  # noqa: F401 - pytest has to know its profile before it reads its options
from router.app import create_app
from router.config import EndpointConfig, RouterConfig
from router.http_protocol import GuardedHttpProtocol
from router.tokenizer import Tokenizer
from router.workers import WorkerSeat
from tests.router.fake_node import FakeNode
from tests.router.servers import DEADLINE_S, RunningServer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class RunningRouter:
    """A router that serves, and a client for it."""

    url: str
    http: httpx.Client
    server: RunningServer
    app: FastAPI

    def end_open_requests(self) -> None:
        """Do what the router's server does when its time to shut down runs out."""
        self.server.call_soon(self.app.state.end_open_requests)

    def chat(self, **changes: Any) -> httpx.Response:
        """Ask /v1/chat/completions, with a valid body but for `changes`."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **changes}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, **changes: Any) -> httpx.Response:
        """Ask /v1/completions, with a valid body but for `changes`."""
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", **changes})

    def connect(self) -> socket.socket:
        """Return a bare connection to the router."""
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=DEADLINE_S)

    def metric(self, line_start: str) -> float:
        """Return the value of the one metric whose line begins so."""
        text = self.http.get("/metrics").text
        (line,) = [line for line in text.splitlines() if line.startswith(line_start)]
        return float(line.rsplit(" ", 1)[1])

    def wait_for_metric(self, line_start: str, value: float) -> None:
        """Scrape until the metric has this value; the test's own timeout bounds it."""
        while f"{line_start} {value:.1f}\n" not in self.http.get("/metrics").text:
            pass


RouterFactory = Callable[..., AbstractContextManager[RunningRouter]]


@pytest.fixture(scope="session")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory, as far as a router reads it."""
    directory = tmp_path_factory.mktemp("engine")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Hello there, this is a hall of mirrors. " * 3], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(engine_dir: Path) -> Tokenizer:
    return Tokenizer.from_engine_dir(engine_dir)


@pytest.fixture(scope="session")
def start_router(engine_dir: Path, tokenizer: Tokenizer) -> RouterFactory:
    """Return a context manager that runs a router over nodes, given as (endpoint_id, url)."""

    @contextmanager
    def start(nodes: Sequence[tuple[str, str]], **settings: Any) -> Iterator[RunningRouter]:
        used_tokenizer = settings.pop("tokenizer", tokenizer)
        clock = settings.pop("clock", None)
        protocol = settings.pop("protocol", GuardedHttpProtocol)
        tracer = settings.pop("tracer", None)
        seat: WorkerSeat | None = settings.pop("seat", None)
        config = RouterConfig(
            engine_dir=engine_dir,
            model="tiny",
            nodes=tuple(EndpointConfig(endpoint_id=i, url=url) for i, url in nodes),
            **{
                "snapshot_poll_interval_s": 0.02,
                # On a busy machine a router may wait for its turn longer than it waits for nodes.
                "connect_timeout_s": DEADLINE_S,
                "max_snapshot_age_s": DEADLINE_S,
                **settings,
            },
        )
        app = create_app(config, tokenizer=used_tokenizer, clock=clock, tracing=tracer, seat=seat)
        private_path = None if seat is None else seat.socket_path(seat.index)
        with (
            RunningServer(app, protocol=protocol, private_path=private_path) as server,
            httpx.Client(
                base_url=server.url, timeout=DEADLINE_S, trust_env=False, verify=False
            ) as http,
        ):
            yield RunningRouter(server.url, http, server, app)

    return start


@pytest.fixture
def node() -> Iterator[FakeNode]:
    """A running node without history."""
    fake = FakeNode()
    with fake.serve() as server:
        fake.url = server.url
        yield fake


@pytest.fixture
def router(node: FakeNode, start_router: RouterFactory) -> Iterator[RunningRouter]:
    """A router in front of `node`."""
    with start_router([(node.endpoint_id, node.url)]) as running:
        yield running


@pytest.fixture(scope="module")
def quiet_router(start_router: RouterFactory) -> Iterator[RunningRouter]:
    """A router for tests that leave nothing behind, shared by a file's tests."""
    fake = FakeNode()
    with fake.serve() as server, start_router([(fake.endpoint_id, server.url)]) as running:
        yield running
