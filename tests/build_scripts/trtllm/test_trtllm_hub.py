"""Downloads from a Hub of our own, in processes of their own: Hugging Face's library reads its
settings once, when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from build_scripts.trtllm.hub import main
from tests.build_scripts.trtllm.fake_machine import ROOT

REPOSITORY = "maker/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_test"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights again",
    "README.md": b"words",
}


@dataclass
class FakeHub:
    """Serves one repository to those who have the token."""

    url: str
    downloads: list[str] = field(default_factory=list)
    """Files whose content was asked for, in order."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, *, has_body: bool) -> None:
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"}, has_body=has_body)
        elif REPOSITORY not in path:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, has_body=has_body)
        elif COMMIT not in path:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, has_body=has_body)
        elif path.startswith("/api/"):
            self._send(200, json.dumps(_tree()).encode(), {}, has_body=has_body)
        else:
            name = path.rpartition("/")[2]
            if has_body:
                self.hub.downloads.append(name)
            headers = {"ETag": f'"{_object_id(name)}"', "X-Repo-Commit": COMMIT}
            self._send(200, FILES[name], headers, has_body=has_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, has_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


def _tree() -> list[dict[str, object]]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": _object_id(name)}
        for name, content in FILES.items()
    ]


def _object_id(name: str) -> str:
    return name.encode().hex().zfill(40)[:40]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    _Handler.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield _Handler.hub
    server.shutdown()
    server.server_close()
    thread.join()


def download(
    home: Path, repository: str = REPOSITORY, revision: str = COMMIT, **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "build_scripts.trtllm.hub", repository, revision],
        env=environment | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def snapshot(home: Path) -> Path:
    return home / "hub" / "models--maker--model" / "snapshots" / COMMIT


def test_what_a_build_reads_is_downloaded_with_the_token_of_the_environment(
    hub: FakeHub, tmp_path: Path
) -> None:
    result = download(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)

    assert result.returncode == 0, result.stderr
    assert {path.name for path in snapshot(tmp_path).iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    assert (snapshot(tmp_path) / "model.safetensors").read_bytes() == b"weights"


def test_what_is_there_is_not_downloaded_again_nor_is_the_hub_needed(
    hub: FakeHub, tmp_path: Path
) -> None:
    download(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    hub.downloads.clear()

    result = download(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    offline = download(tmp_path, HF_HUB_OFFLINE="1")

    assert (result.returncode, offline.returncode) == (0, 0)
    assert hub.downloads == []


def test_without_network_the_way_out_is_a_download_elsewhere(tmp_path: Path) -> None:
    result = download(tmp_path, HF_HUB_OFFLINE="1")

    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: {REPOSITORY}@{COMMIT}: is not, or not whole, in {snapshot(tmp_path).parents[2]}, "
        f"and the Hub cannot be reached from here; run `hf download {REPOSITORY} --revision "
        f"{COMMIT} --local-dir DIR` on a machine that reaches it, bring DIR here, and write "
        "`source: {path: DIR}` into the recipe"
    ]


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (
            (REPOSITORY, COMMIT),
            "hf_of_somebody_else",
            "and set HF_TOKEN to a token of that account",
        ),
        (("maker/other", COMMIT), TOKEN, "the Hub has no such repository, or only for some"),
        ((REPOSITORY, COMMIT[::-1]), TOKEN, "the repository has no such commit"),
    ],
    ids=["licence", "repository", "commit"],
)
def test_a_refusal_of_the_hub_is_one_line_with_the_way_out(
    hub: FakeHub, tmp_path: Path, arguments: tuple[str, str], token: str, message: str
) -> None:
    result = download(tmp_path, *arguments, HF_ENDPOINT=hub.url, HF_TOKEN=token)

    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_branch_is_no_commit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([REPOSITORY, "main"]) == 1
    assert "revision: must match pattern" in capsys.readouterr().err
