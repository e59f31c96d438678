"""Stands in for `kubectl`: writes down how it was called, and answers what the test has prepared.

Strict in what it knows: anything but the calls of a deployment's life is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

DIRECTORY = Path(sys.argv[0]).parent
KNOWN = {
    ("apply", "-f"),
    ("delete", "--ignore-not-found"),
    ("delete", "pod/proserve-chat-0"),
    ("get", "pods"),
    ("logs", "-l"),
    ("logs", "pod/proserve-chat-0"),
    ("rollout", "restart"),
    ("rollout", "status"),
}


def main() -> int:
    arguments = sys.argv[1:]
    call = {"arguments": arguments, "content": ""}
    verb = arguments[2:] if arguments[0] == "--namespace" else arguments
    if verb[:3] == ["apply", "-f", "-"]:
        call["content"] = sys.stdin.read()
    with (DIRECTORY / "calls").open("a") as calls:
        calls.write(json.dumps(call) + "\n")
    if tuple(verb[:2]) not in KNOWN:
        sys.stderr.write(f"unknown: {' '.join(verb)}")
        return 1
    answer = DIRECTORY / f"{verb[0]}.json"
    if answer.exists():
        sys.stdout.write(answer.read_text())
    refusal = DIRECTORY / f"{verb[0]}.refused"
    if refusal.exists():
        sys.stderr.write(refusal.read_text())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
