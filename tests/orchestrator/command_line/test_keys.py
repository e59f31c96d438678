"""`proserve keys` as an operator types it, and with a router that follows the file."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestrator.command_line.clients_file import add_key, read_clients, revoke_key
from orchestrator.command_line.main import app
from orchestrator.core.errors import ConfigError
from router.keys import id_in, is_same, make_key
from tests.router.client_files import client, write_clients

ROOT = Path(__file__).parents[3]

COMMENTED = """\
# Who may use the router.

clients:
  # The most valuable one.
  - name: acme
    priority_class: high   # not normal!
    limits: {requests_per_s: 5}

  - name: other            # pays less
    priority_class: 'low'
"""


def keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def only_key_ids(path: Path) -> list[str]:
    return [key.key_id for found in read_clients(path).clients for key in found.keys]


def test_the_first_key_makes_client_and_file(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"

    result = keys("add", str(path), "acme", "--priority-class", "high")

    assert result.exit_code == 0, result.output
    (token,) = result.stdout.splitlines()
    (found,) = read_clients(path).clients
    assert (found.name, found.priority_class) == ("acme", "high")
    assert [key.key_id for key in found.keys] == [id_in(token)]
    assert is_same(token, found.keys[0].sha256)
    assert "cannot be shown again" in result.stderr


def test_the_file_never_has_the_key_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(COMMENTED)
    path.chmod(0o644)

    key = add_key(path, "acme", priority_class=None, expires_at=None)

    assert key.token.split("_", 2)[2] not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_everything_else_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(COMMENTED)

    key = add_key(path, "other", priority_class=None, expires_at=None)

    assert path.read_text() == COMMENTED + (
        f'    keys:\n      - key_id: {key.key_id}\n        sha256: "{key.sha256}"\n'
    )


def test_a_key_may_expire(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"

    result = keys(
        "add", str(path), "acme", "--priority-class", "high", "--expires-at", "2027-01-31"
    )

    assert result.exit_code == 0, result.output
    assert read_clients(path).clients[0].keys[0].expires_at == datetime(2027, 1, 31, tzinfo=UTC)


def test_a_key_cannot_have_expired_when_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"

    result = keys("add", str(path), "a", "--priority-class", "high", "--expires-at", "2020-01-31")

    assert result.exit_code == 2
    assert "is in the past" in result.stderr
    assert not path.exists()


def test_a_revoked_key_is_gone_and_the_others_are_not(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "clients.yaml", client("acme"), client("other"))
    key = add_key(path, "acme", priority_class=None, expires_at=None)
    before = only_key_ids(path)

    result = keys("revoke", str(path), key.key_id)

    assert result.exit_code == 0, result.output
    assert f"revoked key {key.key_id} of client acme" in result.stdout
    assert only_key_ids(path) == [key_id for key_id in before if key_id != key.key_id]


def test_the_list_shows_ids_and_no_hashes(tmp_path: Path) -> None:
    past = make_key()
    entry = client("acme", past)
    entry["keys"][0]["expires_at"] = datetime(2020, 1, 1, tzinfo=UTC)
    path = write_clients(tmp_path / "clients.yaml", entry, {"name": "new", "priority_class": "low"})

    result = keys("list", str(path))

    assert result.exit_code == 0, result.output
    for words in ("acme", "high", past.key_id, "2020-01-01 00:00 UTC (expired)", "new", "none"):
        assert words in result.stdout
    assert past.sha256 not in result.stdout


@pytest.mark.parametrize(
    ("client_name", "priority_class", "words"),
    [
        ("acne", None, "has no client 'acne', it has: acme, other; to make it"),
        ("acme", "low", "client 'acme' is in class 'high', not 'low'"),
        ("a b", "low", "clients[2].name: must match pattern"),
    ],
)
def test_what_cannot_be_added_changes_nothing(
    tmp_path: Path, client_name: str, priority_class: str | None, words: str
) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(COMMENTED)

    with pytest.raises(ConfigError) as caught:
        add_key(path, client_name, priority_class=priority_class, expires_at=None)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == COMMENTED
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["clients: [", "clients: 5", ""])
def test_a_file_with_mistakes_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(content)

    with pytest.raises(ConfigError, match=r"clients\.yaml"):
        add_key(path, "acme", priority_class="high", expires_at=None)
    with pytest.raises(ConfigError, match=r"clients\.yaml"):
        revoke_key(path, "abcdefgh")

    assert path.read_text() == content


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "clients.yaml", client("acme"))

    with pytest.raises(ConfigError, match="no key 'abcdefgh'"):
        revoke_key(path, "abcdefgh")
    with pytest.raises(ConfigError, match="does not exist; to make it"):
        add_key(tmp_path / "none.yaml", "acme", priority_class=None, expires_at=None)
    with pytest.raises(ConfigError, match="cannot be opened"):
        add_key(tmp_path / "no" / "x.yaml", "acme", priority_class="low", expires_at=None)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text(COMMENTED)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)

    key = add_key(link, "acme", priority_class=None, expires_at=None)

    assert link.is_symlink()
    assert only_key_ids(path) == [key.key_id]


def test_nothing_is_lost_when_many_add_at_once(tmp_path: Path) -> None:
    """The lock holds between threads as between processes: each opens the directory anew."""
    path = write_clients(tmp_path / "clients.yaml", client("acme"))

    with ThreadPoolExecutor(8) as threads:
        made = list(
            threads.map(
                lambda _: add_key(path, "acme", priority_class=None, expires_at=None), range(24)
            )
        )

    assert {key.key_id for key in made} <= set(only_key_ids(path))
    assert len(only_key_ids(path)) == 25


def test_a_mistake_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "orchestrator.command_line.main", "keys", "list", "nowhere.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )

    assert result.returncode == 2
    assert result.stderr == "proserve: nowhere.yaml: cannot be read: No such file or directory\n"
