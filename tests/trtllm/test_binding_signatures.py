from __future__ import annotations

from typing import Any

import pytest

from tests.trtllm.binding_signatures import parse_signatures


def required(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "required": True} | more


def optional(name: str, default: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "required": False, "default": default} | more


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("f() -> None", [[]]),
        ("f(self) -> int", [[]]),
        ("f(self, request: pkg.Request) -> int", [[required("request")]]),
        ("f(self, a: int, /, b: int)", [[required("a", positional_only=True), required("b")]]),
        (
            "f(self, arg0: int, arg1: str, /) -> None",
            [[required("arg0", positional_only=True), required("arg1", positional_only=True)]],
        ),
        (
            "f(self, a: int = 1, *, b: float | None = None) -> None",
            [[optional("a", "1"), optional("b", "None", kw_only=True)]],
        ),
        (
            "f(a: dict[int, tuple[int, int]] = {}, b: str = 'x, (y)') -> None",
            [[optional("a", "{}"), optional("b", "'x, (y)'")]],
        ),
        (
            "f(a: Callable[[int], None], b: pkg.Policy = <Policy.NO_EVICT: 1>, c: int = 2)",
            [[required("a"), optional("b", "<Policy.NO_EVICT: 1>"), optional("c", "2")]],
        ),
        (
            "f(a: object = <pkg.Config object at 0x7f, size 3>, *args, **kwargs) -> None",
            [
                [
                    optional("a", "<pkg.Config object at 0x7f, size 3>"),
                    {"name": "args", "required": False, "var_positional": True},
                    {"name": "kwargs", "required": False, "var_keyword": True},
                ]
            ],
        ),
        (
            "f(self, timeout: timedelta | None = None) -> list\nf(self, id: int) -> list",
            [[optional("timeout", "None")], [required("id")]],
        ),
        (
            "Overloaded function.\n\n1. ``f(self, a: int) -> None``\n\nOf ints.\n\n"
            "2. ``f(self, b: str) -> None``\n\nOf texts: f(x) in running text is none.",
            [[required("a")], [required("b")]],
        ),
        ("Does something; call it as f(a).", []),
        ("f(self, a: int", []),
        ("", []),
    ],
)
def test_signatures_are_read(docstring: str, expected: list[list[dict[str, Any]]]) -> None:
    assert parse_signatures(docstring, "f") == expected


def test_another_functions_signature_is_none_of_this_one() -> None:
    assert parse_signatures("ff(a: int) -> None", "f") == []
