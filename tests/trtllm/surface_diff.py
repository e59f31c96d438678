"""Compares the recorded surface of TensorRT-LLM with the one that is installed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tests.trtllm.binding_signatures import Param
from tests.trtllm.live_surface import LiveEntry
from tests.trtllm.stub_modules import Entry, Surface


class Severity(StrEnum):
    """What a difference means for code that was written against the recorded surface."""

    BREAKS = "breaks"
    """It may fail, or do something else."""

    UNKNOWN = "unknown"
    """It cannot be read off the installation; somebody has to look."""

    NEW = "new"
    """It goes on as before."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as recorded."""

    severity: Severity
    name: str
    """`module.Class.member`"""

    message: str
    routes: tuple[str, ...]
    """Whose code depends on it; empty if nobody's."""


def compare(surface: Surface, live: Mapping[str, Mapping[str, LiveEntry]]) -> list[Difference]:
    """Return how the installation differs from what is recorded, in the surface's order."""
    return [
        Difference(severity, name, message, tuple(entry.get("routes", ())))
        for module, entries in surface.items()
        for short, entry in entries.items()
        for severity, name, message in _entry(f"{module}.{short}", entry, live[module][short])
    ]


_Found = tuple[Severity, str, str]


def _entry(name: str, recorded: Entry, live: LiveEntry) -> Iterator[_Found]:
    if "missing" in live:
        yield Severity.BREAKS, name, live["missing"]
        return
    kind = "class" if recorded["kind"] == "namedtuple" else recorded["kind"]
    if live["kind"] != kind:
        yield Severity.BREAKS, name, f"is of kind {live['kind']} now, was {kind}"
    elif kind == "enum":
        yield from _values(name, recorded["values"], live["values"])
    elif kind == "function":
        yield from _calls(name, [recorded["params"]], live["overloads"])
    else:
        yield from _class(name, recorded, live)


def _values(name: str, recorded: Sequence[str], live: Sequence[str]) -> Iterator[_Found]:
    for value in recorded:
        if value not in live:
            yield Severity.BREAKS, f"{name}.{value}", f"is gone{_nearest(value, live, recorded)}"
    for value in live:
        if value not in recorded:
            yield Severity.NEW, f"{name}.{value}", "is a new value"


def _class(name: str, recorded: Entry, live: LiveEntry) -> Iterator[_Found]:
    if "params" in recorded:
        overloads = [recorded["params"], *recorded.get("overloads", [])]
        yield from _calls(name, overloads, live["overloads"])
    for method, entry in recorded["methods"].items():
        where = f"{name}.{method}"
        if method not in live["methods"]:
            other = _nearest(method, live["methods"], recorded["methods"])
            yield Severity.BREAKS, where, f"is gone{other}"
            continue
        overloads = recorded.get(f"{method}_overloads", [entry["params"]])
        is_positional = bool(recorded.get("positional_only_methods"))
        yield from _calls(
            where, overloads, live["methods"][method]["overloads"], is_positional=is_positional
        )
    yield from _attributes(name, recorded, live)


def _attributes(name: str, recorded: Entry, live: LiveEntry) -> Iterator[_Found]:
    for attribute in [*recorded["attributes"], *recorded.get("class_attributes", [])]:
        where = f"{name}.{attribute}"
        if attribute not in live["attributes"]:
            if live["attributes_may_be_hidden"]:
                yield Severity.UNKNOWN, where, "is set by the constructor, if at all"
            else:
                other = _nearest(attribute, live["attributes"], recorded["attributes"])
                yield Severity.BREAKS, where, f"is gone{other}"
        elif attribute in recorded.get("writable", ()) and attribute in live["readonly"]:
            yield Severity.BREAKS, where, "cannot be written any more"


def _calls(
    name: str,
    recorded: Sequence[Sequence[Param]],
    live: Sequence[Sequence[Param]] | None,
    *,
    is_positional: bool = False,
) -> Iterator[_Found]:
    """Yield why calls as recorded would not do any more, each against the overload that is
    nearest to it."""
    if live is None:
        yield Severity.UNKNOWN, name, "its signature cannot be read"
        return
    told: set[_Found] = set()
    for overload in recorded:
        params = [param for param in overload if not param.get("var_keyword")]
        # An overload of as many parameters is a likelier successor than another.
        by_length = sorted(live, key=lambda candidate: abs(len(candidate) - len(params)))
        by_overload = [
            list(_params(name, params, candidate, is_positional=is_positional))
            for candidate in by_length
        ]
        for found in min(by_overload, key=_num_breaking):
            if found not in told:
                told.add(found)
                yield found


def _num_breaking(found: Sequence[_Found]) -> int:
    return sum(severity is Severity.BREAKS for severity, _, _ in found)


def _params(
    name: str, recorded: Sequence[Param], live: Sequence[Param], *, is_positional: bool
) -> Iterator[_Found]:
    takes_any = any(param.get("var_keyword") for param in live)
    if is_positional:
        yield from _positions(name, recorded, live)
        return
    by_name = {param["name"]: param for param in live if not _is_variadic(param)}
    for param in recorded:
        where = f"{name}({param['name']})"
        found = by_name.get(param["name"])
        if found is None:
            if not takes_any:
                yield Severity.BREAKS, where, _gone(param["name"], recorded, live)
        elif found.get("positional_only"):
            yield Severity.BREAKS, where, "can only be given by position now"
        else:
            yield from _param(where, param, found)
    yield from _moved(name, recorded, live)
    for found in by_name.values():
        if found["name"] not in {param["name"] for param in recorded}:
            where = f"{name}({found['name']})"
            if found["required"]:
                yield Severity.BREAKS, where, "is a new parameter that must be given"
            else:
                yield Severity.NEW, where, f"is a new parameter, {found['default']} by default"


def _positions(name: str, recorded: Sequence[Param], live: Sequence[Param]) -> Iterator[_Found]:
    """Compare calls without names: how many arguments must and may be given."""
    num_required = sum(param["required"] for param in live)
    num_given = sum(param["required"] for param in recorded)
    if not num_required <= num_given <= len(live):
        counts = f"{num_required} to {len(live)}" if num_required < len(live) else str(len(live))
        yield Severity.BREAKS, name, f"takes {counts} arguments, {num_given} are given"


def _param(where: str, recorded: Param, live: Param) -> Iterator[_Found]:
    if live["required"] and not recorded["required"]:
        yield Severity.BREAKS, where, "must be given now"
    if live.get("kw_only") and not recorded.get("kw_only"):
        yield Severity.BREAKS, where, "can only be given by name now"
    if not live["required"] and not recorded["required"]:
        before, now = _literal(recorded.get("default", "None")), _literal(live["default"])
        if before != now:
            yield Severity.NEW, where, f"is {now} by default, was {before}"


def _literal(text: str) -> str:
    """Return a default in a form that does not depend on who wrote it: `Policy.X` is the same as
    `<Policy.X: 1>`, `Config()` as `<pkg.Config object at 0x7f>`, a text as one in quotes."""
    text = re.sub(r"^<([\w.]+)(:| object).*>$", r"\1", text.strip("'\"")).removesuffix("()")
    is_name = re.fullmatch(r"[A-Za-z_][\w.]*", text) is not None
    return text.rpartition(".")[2] if is_name else text


def _moved(name: str, recorded: Sequence[Param], live: Sequence[Param]) -> Iterator[_Found]:
    """Yield parameters that arguments by position would no longer reach."""
    positional = [p["name"] for p in live if not p.get("kw_only") and not _is_variadic(p)]
    for index, param in enumerate(p for p in recorded if not p.get("kw_only")):
        if param["name"] in positional and positional.index(param["name"]) != index:
            place = positional.index(param["name"]) + 1
            yield (
                Severity.BREAKS,
                f"{name}({param['name']})",
                f"is argument {place} now, was {index + 1}",
            )


def _gone(name: str, recorded: Sequence[Param], live: Sequence[Param]) -> str:
    """Say that a parameter is gone, and what it may be called now."""
    known, names = [p["name"] for p in recorded], [p["name"] for p in live]
    if len(names) == len(known) and (heir := names[known.index(name)]) not in known:
        return f"is gone; it may be called {heir!r} now"
    return f"is gone{_nearest(name, names, known)}"


def _nearest(name: str, names: Iterable[str], known: Iterable[str]) -> str:
    """Say which of the names that were not known before looks like this one."""
    nearest = difflib.get_close_matches(name, sorted({*names} - {*known}), n=1)
    return f"; it may be called {nearest[0]!r} now" if nearest else ""


def _is_variadic(param: Param) -> bool:
    return bool(param.get("var_keyword") or param.get("var_positional"))
