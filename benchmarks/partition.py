"""How long a stream pauses when its node is cut off from the network, without a word.

    python -m benchmarks.partition --num-cuts 20        (as root: it makes network namespaces)

A router and two nodes with the small model, each on a host of its own behind a switch that loses
every frame of a host that is cut off (`tests/integration/netlab.py`). Each round one node is cut
off in the middle of a greedy stream, or just before a request is sent to it, and healed once the
stream has ended. What counts: the time from the cut, or from the request, to the next token, and
whether each text is that of a calm run. Detection is set to two seconds: TCP's user timeout on
connections that are there, the router's `connect_timeout_s` of 1 s on new ones.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.shared.reporting import argument_parser, report
from router.upstream_socket import USER_TIMEOUT_MS
from tests.integration.distant import DistantDeployment, distant_deployment
from tests.integration.netlab import obstacle

ENGINE_DIR = Path(__file__).parents[1] / "built_engines/smollm2-135m"
PROMPT = "The travellers had reached the"
NUM_TOKENS = 60
CUT_AT = 10
"""Tokens of a stream before its node is cut off."""


class Rounds:
    """Cuts, one after the other."""

    def __init__(self, distant: DistantDeployment, http: httpx.AsyncClient, calm: str) -> None:
        self._distant = distant
        self._http = http
        self._calm = calm
        self.num_whole = 0
        self.num_equal = 0

    async def in_mid_stream(self) -> float:
        """Return the seconds from a cut to the next token."""
        cut_s: list[float] = []

        def on_token(num_tokens: int) -> None:
            if num_tokens == CUT_AT:
                self._distant.node(self._distant.busy_node()).link.is_cut = True
                cut_s.append(time.monotonic())

        streamed = await self._distant.stream(
            self._http, PROMPT, num_tokens=NUM_TOKENS, on_token=on_token
        )
        self._count(streamed.text, is_whole=streamed.is_whole)
        # Those that were under way already come at once.
        late = [token.at_s for token in streamed.tokens[CUT_AT:]]
        gaps = [after - before for before, after in zip([cut_s[0], *late], late, strict=False)]
        return late[gaps.index(max(gaps))] - cut_s[0]

    async def before_the_first_token(self) -> float:
        """Return the seconds from a request, just behind a cut, to its first token."""
        self._distant.nodes[0].link.is_cut = True
        begun_s = time.monotonic()
        both = await asyncio.gather(
            *(self._distant.stream(self._http, PROMPT, num_tokens=NUM_TOKENS) for _ in range(2))
        )
        for streamed in both:
            self._count(streamed.text, is_whole=streamed.is_whole)
        return max(streamed.tokens[0].at_s for streamed in both) - begun_s

    def _count(self, text: str, *, is_whole: bool) -> None:
        self.num_whole += is_whole
        self.num_equal += text == self._calm


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return what to say of some durations, in seconds."""
    return {
        "median_s": round(statistics.median(values), 3),
        "min_s": round(min(values), 3),
        "max_s": round(max(values), 3),
    }


async def measure(distant: DistantDeployment, num_cuts: int) -> dict[str, Any]:
    """Cut nodes off and return the figures."""
    async with httpx.AsyncClient(base_url=distant.url, timeout=60.0) as http:
        calm = await distant.stream(http, PROMPT, num_tokens=NUM_TOKENS)
        gaps = [b.at_s - a.at_s for a, b in zip(calm.tokens, calm.tokens[1:], strict=False)]
        rounds = Rounds(distant, http, calm.text)
        found: dict[str, list[float]] = {"in_mid_stream": [], "before_the_first_token": []}
        for number in range(num_cuts):
            for name, values in found.items():
                values.append(await getattr(rounds, name)())
                print(f"{number + 1}/{num_cuts} {name}: {values[-1]:.2f} s", flush=True)
                distant.heal()
    return {
        "num_cuts": num_cuts,
        "detection_s": USER_TIMEOUT_MS / 1000,
        "token_gap_s": round(statistics.median(gaps), 4),
        "first_token_s": "of the slower of two requests, one of them to the node that is cut off",
        **{name: summary(values) for name, values in found.items()},
        "streams": 3 * num_cuts,
        "whole": rounds.num_whole,
        "texts_equal": rounds.num_equal,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-cuts", type=int, default=20, help="of each kind")
    arguments = parser.parse_args()
    if (reason := obstacle()) is not None:
        sys.exit(f"cannot be measured here: {reason}")
    with (
        tempfile.TemporaryDirectory(prefix="proserve-partition-") as directory,
        distant_deployment(Path(directory), ENGINE_DIR) as distant,
    ):
        figures = asyncio.run(measure(distant, 2 if arguments.quick else arguments.num_cuts))
    report(figures, file_name=arguments.json)


if __name__ == "__main__":
    main()
