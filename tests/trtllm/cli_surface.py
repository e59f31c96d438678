"""The recorded command lines of TensorRT-LLM, as strict as argparse makes them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_CLI = json.loads((Path(__file__).parent / "api_surface.json").read_text(encoding="utf-8"))["cli"]

PROGRAMS = tuple(name for name in _CLI if name != "notes")
"""`trtllm-build`, and scripts by their path in the TensorRT-LLM repository."""


class UnknownCommandLine(Exception):
    """What upstream's argparse would refuse."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UnknownCommandLine(f"{self.prog}: {message}")


def parse(program: str, arguments: Sequence[str]) -> dict[str, object]:
    """Return the options of a command line; those not given are left out.

    Raises:
        UnknownCommandLine: an option is not recorded, or has a value that it does not take.
    """
    parser = _Parser(program, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for option, kind in _CLI[program]["options"].items():
        match kind:
            case "switch":
                parser.add_argument(option, action="store_true")
            case "int" | "str":
                parser.add_argument(option, type=int if kind == "int" else str)
            case _:
                parser.add_argument(option, choices=kind.split("|"))
    return vars(parser.parse_args(arguments))
