"""docs/reliability.md: its command works, what it names exists, its numbers are the defaults."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.command_line.deployment import RestartConfig
from router.config import HealthConfig, IdempotencyConfig, RouterSettings
from router.metrics import RouterMetrics
from tests.router.conftest import RunningRouter
from tests.router.fake_node import FakeNode

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_command_works_and_can_be_repeated(router: RunningRouter, node: FakeNode) -> None:
    (command,) = re.findall(r"```console\n\$ curl (.*?)\n```", PAGE, flags=re.S)
    here = command.replace("http://127.0.0.1:8000", router.url).replace("smollm2-135m", "tiny")

    answers = [
        subprocess.run(
            f"curl -sS --fail {here}", shell=True, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]

    assert answers[0] == answers[1]
    assert len(node.requests) == 1


def test_every_metric_that_is_named_exists() -> None:
    known = RouterMetrics().render({}, num_waiting=0).decode()
    names = re.findall(r"`(proserve_router_\w+)", PAGE)

    assert len(names) == 6
    assert [name for name in names if f"# TYPE {name} " not in known] == []


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (r"in a stream \| `stall_timeout_s` \((\d+) s\)", RouterSettings().stall_timeout_s),
        (r"`max_attempts` \| (\d+)", RouterSettings().max_attempts),
        (r"`max_wait_ms` of the request \| (\d+) s", RouterSettings().max_wait_s),
        (r"`retry_delay_s` \((\d+) ms\)", RouterSettings().retry_delay_s * 1000),
        (r"`max_retry_delay_s` \((\d+) s\)", RouterSettings().max_retry_delay_s),
        (r"`health.breaker_failures` \((\d+)\)", HealthConfig().breaker_failures),
        (r"`breaker_open_s` \((\d+) s\)", HealthConfig().breaker_open_s),
        (r"`breaker_max_open_s` \((\d+) s\)", HealthConfig().breaker_max_open_s),
        (r"`health.slow_start_s` \((\d+) s\)", HealthConfig().slow_start_s),
        (r"`idempotency.abandon_after_s` \((\d+) s\)", IdempotencyConfig().abandon_after_s),
        (r"`keep_s` \((\d+) minutes\)", IdempotencyConfig().keep_s / 60),
        (r"`restarts.max_unhealthy_s` \((\d+) s\)", RestartConfig().max_unhealthy_s),
        (r"`max_restarts` \((\d+)\)", RestartConfig().max_restarts),
        (r"`window_s` \((\d+) minutes\)", RestartConfig().window_s / 60),
    ],
)
def test_a_number_is_the_default(words: str, value: float) -> None:
    (number,) = re.findall(words, PAGE)

    assert float(number) == value
