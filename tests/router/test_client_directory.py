"""Who is let in by which header, and how a changed clients file takes effect."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from orchestrator.core.errors import ConfigError
from router.client_directory import Client, ClientDirectory
from router.config import DEFAULT_CLASSES
from router.errors import TooManyRequests, Unauthenticated
from router.keys import NewKey, make_key
from router.metrics import RouterMetrics
from router.terms import ServiceTerms
from tests.router.client_files import bearer, client, write_clients
from tests.router.clocks import ManualClock

NOW = datetime(2026, 11, 25, tzinfo=UTC)


class Door:
    """A directory over a file with the client acme, whose key is known."""

    def __init__(self, directory: Path) -> None:
        self.key = make_key()
        self.path = write_clients(directory / "clients.yaml", client("acme", self.key))
        self.metrics = RouterMetrics()
        self.clock = ManualClock()
        self.directory = ClientDirectory(
            self.path, DEFAULT_CLASSES, self.clock, self.metrics, poll_interval_s=1000.0
        )

    def opens_for(self, key: NewKey, now: datetime = NOW) -> bool:
        try:
            self.directory.identify(Headers(bearer(key)), now)
        except Unauthenticated:
            return False
        return True

    def client_of(self, key: NewKey) -> Client:
        return self.directory.identify(Headers(bearer(key)), NOW)[0]

    def metric(self, name: str) -> float:
        (line,) = [
            line
            for line in self.metrics.render({}, num_waiting=0).decode().splitlines()
            if line.startswith(f"{name} ")
        ]
        return float(line.rsplit(" ", 1)[1])


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


def test_a_key_tells_whose_request_it_is(door: Door) -> None:
    found, key_id = door.directory.identify(Headers(bearer(door.key)), NOW)

    assert found.name == "acme"
    assert key_id == door.key.key_id


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_schemes_case_and_spaces_do_not_matter(door: Door, scheme: str) -> None:
    headers = Headers({"authorization": f"{scheme} {door.key.token} "})

    assert door.directory.identify(headers, NOW)[0].name == "acme"


def test_a_refusal_says_what_to_send(door: Door) -> None:
    for headers, words in (
        ({}, "no API key; send one header `Authorization: Bearer KEY`"),
        ({"authorization": "Basic YTpi"}, "must be `Bearer KEY`"),
        (bearer(make_key()), "not valid here; ask the operator"),
    ):
        with pytest.raises(Unauthenticated, match=words) as refusal:
            door.directory.identify(Headers(headers), NOW)
        assert (refusal.value.status, refusal.value.code) == (401, "invalid_api_key")
        assert refusal.value.headers() == {"www-authenticate": "Bearer"}


def test_two_keys_at_once_are_none(door: Door) -> None:
    header = (b"authorization", f"Bearer {door.key.token}".encode())

    with pytest.raises(Unauthenticated, match="more than one"):
        door.directory.identify(Headers(raw=[header, header]), NOW)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_other_header_opens(door: Door, data: st.DataObject) -> None:
    """Whatever bytes come, nothing but the key itself is accepted, and nothing else is raised."""
    token = door.key.token
    value = data.draw(
        st.one_of(
            st.binary(max_size=100),
            st.text(max_size=100).map(lambda text: text.encode()),
            st.text(max_size=60).map(lambda text: f"Bearer {text}".encode()),
            st.from_regex(r"Bearer psk_[a-z]{8}_[A-Za-z0-9_-]{43}", fullmatch=True).map(str.encode),
            st.from_regex(rf"Bearer psk_{door.key.key_id}_[\w-]{{0,60}}", fullmatch=True).map(
                str.encode
            ),
            st.integers(0, len(token) - 1).map(lambda end: f"Bearer {token[:end]}".encode()),
            st.integers(1, len(token)).map(lambda start: f"Bearer {token[start:]}".encode()),
            st.sampled_from(
                ["", "Bearer", "Bearer ", token, f"Basic {token}", f"Bearer{token}"]
            ).map(str.encode),
            st.tuples(st.integers(0, len(token) - 1), st.characters(max_codepoint=255)).map(
                lambda edit: f"Bearer {token[: edit[0]]}{edit[1]}{token[edit[0] + 1 :]}".encode(
                    "latin-1"
                )
            ),
        ).filter(lambda found: found.decode("latin-1").strip().split() != ["Bearer", token])
    )

    with pytest.raises(Unauthenticated):
        door.directory.identify(Headers(raw=[(b"authorization", value)]), NOW)


def test_an_expired_key_is_named_as_such(tmp_path: Path) -> None:
    key = make_key()
    entry = client("acme", key)
    entry["keys"][0]["expires_at"] = NOW
    path = write_clients(tmp_path / "clients.yaml", entry)
    directory = ClientDirectory(
        path, DEFAULT_CLASSES, ManualClock(), RouterMetrics(), poll_interval_s=1000.0
    )

    directory.identify(Headers(bearer(key)), NOW - timedelta(seconds=1))
    with pytest.raises(Unauthenticated, match=f"{key.key_id} expired at 2026-11-25"):
        directory.identify(Headers(bearer(key)), NOW)


def test_a_file_with_mistakes_does_not_open_at_all(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "clients.yaml", client(priority_class="vip"))

    with pytest.raises(ConfigError, match=r"clients\.yaml:.*'vip'"):
        ClientDirectory(
            path, DEFAULT_CLASSES, ManualClock(), RouterMetrics(), poll_interval_s=1000.0
        )


async def test_new_keys_open_and_revoked_ones_do_not(door: Door) -> None:
    new = make_key()
    write_clients(door.path, client("acme", new), client("other"))
    assert not door.opens_for(new)

    await door.directory.refresh()

    assert door.opens_for(new)
    assert not door.opens_for(door.key)
    assert door.metric('proserve_router_clients_file_reloads_total{outcome="applied"}') == 1


@pytest.mark.parametrize(
    "content",
    [
        "clients: [",
        "",
        "clients: []\nx: 1",
        "\x00",
        "clients: 5",
        pytest.param("clients: " + "[" * 1000 + "]" * 1000, id="deep"),
        pytest.param(None, id="no file"),
    ],
)
async def test_a_broken_file_leaves_the_one_before_in_force(
    door: Door, content: str | None
) -> None:
    if content is None:
        door.path.unlink()
    else:
        door.path.write_text(content)
    with structlog.testing.capture_logs() as lines:
        await door.directory.refresh()
        await door.directory.refresh()

    assert door.opens_for(door.key)
    assert door.metric("proserve_router_clients_file_is_stale") == 1
    assert door.metric('proserve_router_clients_file_reloads_total{outcome="invalid"}') == 1
    (line,) = lines  # Once, although it is looked at twice.
    assert line["event"] == "clients_file_invalid"
    assert line["log_level"] == "error"
    assert str(door.path) in line["reason"]

    write_clients(door.path, client("acme", door.key), client("other"))
    await door.directory.refresh()
    assert door.metric("proserve_router_clients_file_is_stale") == 0


async def test_a_file_that_says_again_what_is_in_force_is_not_stale(door: Door) -> None:
    """Broken, then as it was in the beginning: that is new, compared with the last look."""
    good = door.path.read_bytes()
    door.path.write_text("broken")
    await door.directory.refresh()

    door.path.write_bytes(good)
    await door.directory.refresh()

    assert door.metric("proserve_router_clients_file_is_stale") == 0


async def test_an_unchanged_file_is_not_applied_again(door: Door) -> None:
    door.path.write_bytes(door.path.read_bytes())

    await door.directory.refresh()

    assert door.client_of(door.key) is door.client_of(door.key)
    with pytest.raises(ValueError, match="not enough values"):
        door.metric('proserve_router_clients_file_reloads_total{outcome="applied"}')


async def test_what_a_client_has_used_stays_used_when_the_file_changes(door: Door) -> None:
    """1 of 3 is used; of 2 then 1 is left."""
    limits = {"requests_per_s": 0.001, "request_burst": 3}
    write_clients(door.path, client("acme", door.key, limits=limits))
    await door.directory.refresh()
    door.client_of(door.key).limiter.take_request(100.0)

    write_clients(door.path, client("acme", door.key, limits={**limits, "request_burst": 2}))
    await door.directory.refresh()

    limiter = door.client_of(door.key).limiter
    limiter.take_request(100.0)
    with pytest.raises(TooManyRequests):
        limiter.take_request(100.0)


async def test_a_class_that_changes_counts_for_the_next_request(door: Door) -> None:
    assert door.client_of(door.key).terms.least_class.name == "low"

    write_clients(door.path, client("acme", door.key, allowed_classes=["high"]))
    await door.directory.refresh()

    assert door.client_of(door.key).terms.least_class.name == "high"


def named(name: str | None) -> Client:
    terms = ServiceTerms.of_everybody(DEFAULT_CLASSES, default_class="low")
    everybody = Client.everybody(terms)
    return Client(name, terms, everybody.limiter)


def test_nobody_shares_kv_with_another_client_whatever_user_is_named() -> None:
    """Two clients, the same with and without a user, and requests without a key: all differ."""
    salts = [
        named(name).cache_salt(user)
        for name in (None, "acme", "acme2")
        for user in (None, "me", "acme", "acme\n", "acme\nme", "\nme")
    ]

    assert len(set(salts)) == len(salts)


def test_a_client_counts_as_one_whatever_users_it_names() -> None:
    assert {named("acme").id_on_nodes(user) for user in (None, "a", "b")} == {"acme"}
    assert named(None).id_on_nodes("a") == "a"
    assert named(None).id_on_nodes(None) == ""
