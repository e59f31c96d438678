"""The clients file: what it may say, and how its mistakes are named."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.core.errors import ConfigError
from router.clients import ClientConfig, ClientsConfig, KeyConfig, LimitsConfig, parse_clients
from router.config import DEFAULT_CLASSES
from router.keys import make_key
from router.rate_limits import Limits, Rate

EXAMPLE = Path(__file__).parents[2] / "configs" / "clients" / "example.yaml"
PATH = Path("clients.yaml")
HASH = "0" * 64


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_clients(text.encode(), path=PATH, classes=DEFAULT_CLASSES)
    return str(caught.value).splitlines()


def test_the_example_is_valid_and_shows_every_field() -> None:
    config = parse_clients(EXAMPLE.read_bytes(), path=EXAMPLE, classes=DEFAULT_CLASSES)

    shown = set().union(*(c.model_fields_set for c in config.clients))
    shown |= set().union(*(c.limits.model_fields_set for c in config.clients))
    shown |= set().union(*(k.model_fields_set for c in config.clients for k in c.keys))
    known = {*ClientConfig.model_fields, *LimitsConfig.model_fields, *KeyConfig.model_fields}
    assert shown == known


def test_every_field_is_explained() -> None:
    for model in (ClientsConfig, ClientConfig, LimitsConfig, KeyConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clients: {}", "clients.yaml:1:1: clients: must be a valid tuple, got a mapping"),
        (
            "clients: []\nclient: []",
            "clients.yaml:2:1: client: unknown key 'client'; did you mean 'clients'?",
        ),
        (
            "clients:\n  - name: a\n    priority_class: low\n    defaultclass: low",
            "clients.yaml:4:5: clients[0].defaultclass: unknown key 'defaultclass'; "
            "did you mean 'default_class'?",
        ),
        (
            "clients:\n  - name: a\n    priority_class: hihg",
            "clients.yaml:3:5: clients[0].priority_class: is 'hihg', the router's classes are "
            "high, normal, low",
        ),
        (
            "clients:\n  - name: a\n    priority_class: low\n    default_class: high",
            "clients.yaml:4:5: clients[0].default_class: is 'high', which is worth more than "
            "priority_class 'low'; name a lesser class here, or this one there",
        ),
        (
            "clients:\n  - name: a\n    priority_class: normal\n"
            "    allowed_classes: [normal, low, high]",
            "clients.yaml:4:36: clients[0].allowed_classes[2]: is 'high', which is worth more than "
            "priority_class 'normal'; name a lesser class here, or this one there",
        ),
        (
            "clients:\n  - name: a\n    priority_class: normal\n    allowed_classes: [low]",
            "clients.yaml:3:5: clients[0].priority_class: is 'normal', which is not in "
            "allowed_classes",
        ),
        (
            "clients:\n  - {name: a, priority_class: low}\n  - name: a\n    priority_class: low",
            "clients.yaml:3:5: clients[1].name: there is another client 'a'",
        ),
        (
            "clients:\n  - name: a\n    priority_class: low\n    keys:\n"
            f"      - {{key_id: abcdefgh, sha256: '{HASH}'}}\n"
            f"      - {{key_id: abcdefgh, sha256: '{HASH}'}}",
            "clients.yaml:6:10: clients[0].keys[1].key_id: there is another key 'abcdefgh'",
        ),
        (
            "clients:\n  - name: a\n    priority_class: low\n    limits:\n      request_burst: 5",
            "clients.yaml:4:5: clients[0].limits: request_burst needs requests_per_s, which is not "
            "set",
        ),
        (
            "clients:\n  - name: a\n    priority_class: low\n    limits: {token_burst: 5}",
            "clients.yaml:4:5: clients[0].limits: token_burst needs tokens_per_min, which is not "
            "set",
        ),
        (
            "clients:\n  - {name: a b, priority_class: low}",
            "clients.yaml:2:6: clients[0].name: must match pattern "
            "'^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$', got 'a b'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, expected: str) -> None:
    assert mistakes(text) == [expected]


@pytest.mark.parametrize("expires_at", ["2027-01-31", "2027-01-31T10:00:00", "soon"])
def test_a_time_without_a_zone_is_refused(expires_at: str) -> None:
    (line,) = mistakes(
        "clients:\n  - name: a\n    priority_class: low\n    keys:\n"
        f"      - {{key_id: abcdefgh, sha256: '{HASH}', expires_at: {expires_at}}}"
    )

    assert line.startswith("clients.yaml:5:104: clients[0].keys[0].expires_at: must")


def test_all_mistakes_are_named_at_once() -> None:
    lines = mistakes(
        "clients:\n  - name: a\n    priority_class: x\n  - name: a\n    priority_class: low\n"
    )

    assert [line.split(":")[1] for line in lines] == ["3", "4"]


def test_a_key_written_into_the_file_is_not_repeated() -> None:
    """Whoever pastes a key where its hash belongs, or anywhere, must not find it in the log."""
    secret = make_key().token
    lines = mistakes(
        f"clients:\n  - name: a\n    priority_class: {secret}\n"
        f"    keys:\n      - {secret}\n"
        f"      - {{key_id: {secret}, sha256: {secret}}}\n"
    )

    assert len(lines) == 3
    assert secret.split("_", 2)[2] not in "".join(lines)


def test_without_the_routers_classes_any_name_passes() -> None:
    text = b"clients:\n  - {name: a, priority_class: whatever}\n"

    assert parse_clients(text, path=PATH).clients[0].priority_class == "whatever"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (LimitsConfig(), Limits()),
        (LimitsConfig(requests_per_s=2.5), Limits(requests=Rate(2.5, 3))),
        (LimitsConfig(requests_per_s=0.1), Limits(requests=Rate(0.1, 1))),
        (LimitsConfig(requests_per_s=5, request_burst=50), Limits(requests=Rate(5, 50))),
        (LimitsConfig(tokens_per_min=6000), Limits(tokens=Rate(100, 6000))),
        (LimitsConfig(tokens_per_min=60, token_burst=9), Limits(tokens=Rate(1, 9))),
        (LimitsConfig(max_concurrent_sequences=4), Limits(max_concurrent_sequences=4)),
    ],
)
def test_limits_have_bursts(limits: LimitsConfig, expected: Limits) -> None:
    assert limits.to_limits() == expected


def test_a_key_expires_at_its_time() -> None:
    end = datetime(2027, 1, 31, 12, tzinfo=UTC)
    key = KeyConfig(key_id="abcdefgh", sha256=HASH, expires_at=end)

    assert not key.has_expired(end.replace(hour=11))
    assert key.has_expired(end)
    assert not KeyConfig(key_id="abcdefgh", sha256=HASH).has_expired(end)
