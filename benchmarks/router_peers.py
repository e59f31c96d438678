"""What a request costs in our router, in a bare passthrough and in other projects' routers.

    python -m benchmarks.router_peers                       (all targets; 25 minutes)
    python -m benchmarks.router_peers --targets ours,smg --rounds 3
    python -m benchmarks.router_peers --quick               (ours and the passthrough)

All routers stand before the same two mock workers and have one core to themselves; workers and
load generator have another. The cells of all targets are interleaved. CPU per request is that of
all processes of a target; ratios are to the passthrough in the same round. Answers have the same
64 tokens (32 in timed64), prompts 1.5 kB of English. Ours does more than pass on: it tokenizes the
prompt, chooses a node by predicted gain, and turns every token into text. ours-2-workers shows
what it costs to count limits together, on the same one core.

    stream64    64 connections, server-sent events, tokens without pauses
    plain64     64 connections, whole answers, all tokens at once
    plain1      the same on one connection
    timed64     64 streams, first token after 50 ms, then one every 20 ms
"""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from benchmarks.peers import processes
from benchmarks.peers.load import CELLS, Cell, make_requests, run_cell
from benchmarks.peers.mock_worker import MODEL, Pace, Token
from benchmarks.peers.targets import (
    ENGINE_DIR,
    KEY,
    TARGETS,
    Place,
    Target,
)
from benchmarks.shared.peer_environments import NotInstallable
from benchmarks.shared.reporting import argument_parser, report
from router.tokenizer import Tokenizer
from tests.integration.deployments import free_port

TARGET_CORE, LOAD_CORE = 0, 1
START_TIMEOUT_S = 120.0
WARM_UP_S = 0.4
ANSWER = (
    "The sky looks blue because the air scatters short waves of sunlight much more than long ones. "
    "Light from the sun holds all colours; on its way through the air the blue part is sent in all "
    "directions, so that it reaches us from everywhere, while red goes mostly straight on, as one "
    "can see at sunset."
)
"""The text that the mocks answer with, as far as the tokens go."""


@dataclass(frozen=True)
class Measurement:
    """One cell of one target in one round."""

    cpu_us: float
    """Per request; of direct ones 0."""

    requests_per_s: float
    ttft_ms: tuple[float, float]
    """Median and 99th percentile, also of the next."""

    total_ms: tuple[float, float]
    problems: tuple[str, ...]


def answer_tokens() -> tuple[Token, ...]:
    """Return the first tokens of the answer's text."""
    tokenizer = Tokenizer.from_engine_dir(ENGINE_DIR)
    token_ids = tokenizer.encode(ANSWER, add_special_tokens=False)[:64]
    assert len(token_ids) == 64, "the text is long enough"
    return tuple(Token(token_id, tokenizer.token_text(token_id)) for token_id in token_ids)


def wait_until_healthy(url: str, log: Path) -> None:
    """Return once a health check succeeds."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
    sys.exit(
        f"{url} is not healthy after {START_TIMEOUT_S:.0f} s; its log ends with:\n"
        + log.read_text(errors="replace")[-2000:]
    )


def set_pace(worker_url: str, pace: Pace) -> None:
    """Tell a mock worker how to answer from now on."""
    request = urllib.request.Request(f"{worker_url}/pace", msgspec.json.encode(pace))
    with urllib.request.urlopen(request, timeout=5) as answer:
        answer.read()


class Bench:
    """Running workers and targets."""

    def __init__(self, stack: contextlib.ExitStack, directory: Path) -> None:
        self._stack = stack
        self._directory = directory
        self._tokens = answer_tokens()
        tokens_file = directory / "tokens.json"
        tokens_file.write_bytes(msgspec.json.encode(self._tokens))
        ports = [free_port() for _ in range(2)]
        self.worker_urls = [f"http://127.0.0.1:{port}" for port in ports]
        for index, port in enumerate(ports):
            module = [sys.executable, "-m", "benchmarks.peers.mock_worker"]
            command = [*module, f"mock-{index}", str(port), str(tokens_file)]
            log = directory / f"mock-{index}.log"
            stack.enter_context(processes.running(command, core=LOAD_CORE, log=log))
            wait_until_healthy(f"{self.worker_urls[index]}/health", log)
        self._targets: dict[str, tuple[str, int]] = {}

    def start(self, target: Target) -> None:
        """Start a target beside the others."""
        directory = self._directory / target.name
        directory.mkdir()
        place = Place(free_port(), free_port(), self.worker_urls, directory)
        log = directory / "log"
        pid = self._stack.enter_context(
            processes.running(
                target.command(place), core=TARGET_CORE, log=log, environment=target.environment
            )
        )
        url = f"http://127.0.0.1:{place.port}"
        path = "/v1/models" if target.name == "haproxy" else target.health_path
        wait_until_healthy(f"{url}{path}", log)
        self._targets[target.name] = url, pid

    def measure(self, name: str, cell: Cell, seconds: float) -> Measurement:
        """Return one cell of a target, or of `direct`: the workers without any."""
        url, pid = self._targets.get(name, (self.worker_urls[0], None))
        pace = Pace(cell.num_tokens, cell.ttft_s, cell.tpot_s, in_one_write=not cell.is_stream)
        for worker_url in self.worker_urls:
            set_pace(worker_url, pace)
        requests = make_requests(cell, model=MODEL, api_key=KEY.token)
        expected = "".join(token.text for token in self._tokens[: cell.num_tokens])

        async def run(seconds: float) -> Any:
            return await run_cell(url, cell, requests, seconds=seconds, expected_text=expected)

        uvloop.run(run(WARM_UP_S))
        cpu_before_s = 0.0 if pid is None else processes.cpu_s(pid)
        outcome = uvloop.run(run(seconds))
        cpu_s = 0.0 if pid is None else processes.cpu_s(pid) - cpu_before_s
        num_requests = max(1, len(outcome.totals_s))
        return Measurement(
            cpu_us=1e6 * cpu_s / num_requests,
            requests_per_s=num_requests / outcome.seconds,
            ttft_ms=_percentiles_ms(outcome.ttfts_s),
            total_ms=_percentiles_ms(outcome.totals_s),
            problems=tuple(outcome.problems),
        )


def _percentiles_ms(times_s: Sequence[float]) -> tuple[float, float]:
    if not times_s:
        return 0.0, 0.0
    ordered = sorted(times_s)
    return 1e3 * statistics.median(ordered), 1e3 * ordered[int(0.99 * len(ordered))]


def measured_rounds(
    bench: Bench, names: Sequence[str], *, num_rounds: int, seconds: float
) -> dict[tuple[str, str], list[Measurement]]:
    """Return the measurements of each (target, cell), one a round."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for number in range(num_rounds):
        # Another one begins each time, so that none is always behind the same one.
        first = number % len(names)
        for cell in CELLS:
            for name in [*names[first:], *names[:first]]:
                measurement = bench.measure(name, cell, seconds)
                found.setdefault((name, cell.name), []).append(measurement)
                for problem in measurement.problems[:3]:
                    print(f"{name} {cell.name}: {problem}", file=sys.stderr)
    return found


def summary(found: dict[tuple[str, str], list[Measurement]]) -> dict[str, dict[str, Any]]:
    """Return figures for each target and cell: medians over rounds, and ranges of CPU."""
    figures: dict[str, dict[str, Any]] = {}
    for (name, cell), rounds in found.items():
        cpu_us = [m.cpu_us for m in rounds]
        ratios = [
            mine.cpu_us / floor.cpu_us
            for mine, floor in zip(rounds, found["passthrough", cell], strict=True)
        ]
        figures.setdefault(name, {})[cell] = {
            "cpu_us": round(statistics.median(cpu_us)),
            "cpu_us_range": [round(min(cpu_us)), round(max(cpu_us))],
            "cpu_ratio": round(statistics.median(ratios), 2),
            "cpu_ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            "requests_per_s_best": round(max(m.requests_per_s for m in rounds), 1),
            **_added(cell, rounds, found["direct", cell]),
            "num_problems": sum(len(m.problems) for m in rounds),
        }
    return figures


def _added(
    cell: str, rounds: Sequence[Measurement], direct: Sequence[Measurement]
) -> dict[str, float]:
    """Return the latency of a cell and what it adds to that without a router in the same round."""
    is_stream = cell in {"stream64", "timed64"}
    what = "ttft" if is_stream else "total"
    figures = {}
    for index, percentile in enumerate(("p50", "p99")):
        mine = [(m.ttft_ms if is_stream else m.total_ms)[index] for m in rounds]
        base = [(m.ttft_ms if is_stream else m.total_ms)[index] for m in direct]
        added = [a - b for a, b in zip(mine, base, strict=True)]
        figures[f"{what}_{percentile}_ms"] = round(statistics.median(mine), 2)
        figures[f"added_{what}_{percentile}_ms"] = round(statistics.median(added), 2)
    return figures


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    """Print what counts as a table in Markdown."""
    print(
        "| target | stream64, us of CPU | ratio | plain64, us | ratio | timed64, us | ratio "
        "| timed64, added TTFT p50 / p99 ms | plain1, added p50 / p99 ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, cells in figures.items():
        columns = [name]
        for cell in ("stream64", "plain64", "timed64"):
            found = cells[cell]
            low, high = found["cpu_us_range"]
            columns += [f"{found['cpu_us']} ({low}-{high})", str(found["cpu_ratio"])]
        for cell, what in (("timed64", "ttft"), ("plain1", "total")):
            found = cells[cell]
            columns.append(f"{found[f'added_{what}_p50_ms']} / {found[f'added_{what}_p99_ms']}")
        print("| " + " | ".join(columns) + " |")


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--targets", help="names with commas between them; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each cell")
    arguments = parser.parse_args()
    names = ["ours", "passthrough"] if arguments.quick else [t.name for t in TARGETS]
    if arguments.targets:
        names = arguments.targets.split(",")
    if unknown := set(names) - {t.name for t in TARGETS}:
        parser.error(f"no such targets: {', '.join(sorted(unknown))}")
    names += [name for name in ("passthrough",) if name not in names]
    num_rounds, seconds = (2, 1.0) if arguments.quick else (arguments.rounds, arguments.seconds)
    os.sched_setaffinity(0, {LOAD_CORE})
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="proserve-peers-"))
        bench = Bench(stack, Path(directory))
        measured = ["direct"]
        for target in TARGETS:
            if target.name not in names:
                continue
            try:
                target.install()
            except NotInstallable as error:
                skipped[target.name] = str(error)
                print(f"{target.name} is skipped: {error}", file=sys.stderr)
                continue
            bench.start(target)
            measured.append(target.name)
        found = measured_rounds(bench, measured, num_rounds=num_rounds, seconds=seconds)
    figures = summary(found)
    print_table(figures)
    report(
        {"rounds": num_rounds, "seconds": seconds, "targets": figures, "skipped": skipped},
        file_name=arguments.json,
    )


if __name__ == "__main__":
    main()
