"""The order of changes: new things first, one replacement at a time, and nothing stops early."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.command_line.launch.launcher import ProcessKind
from orchestrator.command_line.launch.plan import Change, Found, Step, Wanted, plan

NODE, ROUTER = ProcessKind.NODE, ProcessKind.ROUTER
START, REPLACE, STOP = Change.START, Change.REPLACE, Change.STOP


def wanted(name: str, fingerprint: str = "1") -> Wanted:
    return Wanted(name, kind_of(name), fingerprint)


def found(*names: str, fingerprint: str = "1", is_up: bool = True) -> dict[str, Found]:
    return {name: Found(kind_of(name), fingerprint, is_up) for name in names}


def kind_of(name: str) -> ProcessKind:
    return NODE if name.startswith("n") else ROUTER


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        pytest.param(
            {},
            [wanted("n0"), wanted("n1"), wanted("r0")],
            [(START, ("n0", "n1")), (START, ("r0",))],
            id="nodes start before routers",
        ),
        pytest.param(
            found("n0", "r0"), [wanted("n0"), wanted("r0")], [], id="what is right is left alone"
        ),
        pytest.param(
            found("n0", "n1", "r0", "r1"),
            [wanted("n0", "2"), wanted("n1", "2"), wanted("r0", "2"), wanted("r1", "2")],
            [(REPLACE, ("n0",)), (REPLACE, ("n1",)), (REPLACE, ("r0",)), (REPLACE, ("r1",))],
            id="one replacement at a time",
        ),
        pytest.param(
            found("n0", "r0"),
            [wanted("n0", "2"), wanted("n1"), wanted("r0"), wanted("r1")],
            [(START, ("n1",)), (START, ("r1",)), (REPLACE, ("n0",))],
            id="what is new is there before anything is replaced",
        ),
        pytest.param(
            found("n0", "n1", "n2", "r0", "r1"),
            [wanted("n0", "2"), wanted("r0")],
            [(REPLACE, ("n0",)), (STOP, ("r1",)), (STOP, ("n1", "n2"))],
            id="what goes helps until the end, routers go before nodes",
        ),
        pytest.param(
            found("n0", "r0") | found("n1", is_up=False),
            [wanted("n0", "2"), wanted("n1", "2"), wanted("r0")],
            [(START, ("n1",)), (REPLACE, ("n0",))],
            id="what is down comes first",
        ),
        pytest.param(found("n0", "r0"), [], [(STOP, ("r0",)), (STOP, ("n0",))], id="down"),
    ],
)
def test_steps(
    before: Mapping[str, Found], after: list[Wanted], steps: list[tuple[Change, tuple[str, ...]]]
) -> None:
    assert [(step.change, step.names) for step in plan(before, after)] == steps


names = st.sampled_from(["n0", "n1", "n2", "r0", "r1", "r2"])
fingerprints = st.sampled_from("12")


@given(
    before=st.dictionaries(names, st.tuples(fingerprints, st.booleans())),
    after=st.dictionaries(names, fingerprints),
)
def test_all_steps_lead_to_what_is_wanted_and_leave_others_at_work(
    before: dict[str, tuple[str, bool]], after: dict[str, str]
) -> None:
    """Of each kind at most one process is missing while it is replaced; and where one is stopped
    or replaced, all that are wanted besides are up."""
    state = {name: Found(kind_of(name), mark, is_up) for name, (mark, is_up) in before.items()}
    goal = [wanted(name, mark) for name, mark in after.items()]

    for step in plan(state, goal):
        if step.change is not START:
            for process in goal:
                assert state[process.name].is_up
        if step.change is REPLACE:
            assert len(step.names) == 1
        carry_out(step, state, goal)

    assert state == {p.name: Found(p.kind, p.fingerprint, is_up=True) for p in goal}


@given(
    before=st.dictionaries(names, st.tuples(fingerprints, st.booleans())),
    after=st.dictionaries(names, fingerprints),
)
def test_planning_anew_behind_each_step_changes_nothing(
    before: dict[str, tuple[str, bool]], after: dict[str, str]
) -> None:
    state = {name: Found(kind_of(name), mark, is_up) for name, (mark, is_up) in before.items()}
    goal = [wanted(name, mark) for name, mark in after.items()]

    for step in plan(state, goal):
        assert plan(state, goal)[0] == step
        carry_out(step, state, goal)

    assert plan(state, goal) == ()


def carry_out(step: Step, state: dict[str, Found], goal: list[Wanted]) -> None:
    for name in step.names:
        if step.change is STOP:
            del state[name]
        else:
            (process,) = [p for p in goal if p.name == name]
            state[name] = Found(process.kind, process.fingerprint, is_up=True)
