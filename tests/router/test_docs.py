"""docs/api.md says what the schema says, and its commands work."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pydantic import ValidationError

from router.schema import IGNORED_PARAMETERS, ChatCompletionBody, CompletionBody
from tests.router.conftest import RouterFactory, RunningRouter
from tests.router.fake_node import FakeNode
from tests.router.servers import DEADLINE_S

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def parameters(heading: str) -> set[str]:
    """Return the names in the first column of the first table under `heading`."""
    section = re.split(r"^#+ ", PAGE.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, flags=re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def fields() -> set[str]:
    return {*ChatCompletionBody.model_fields, *CompletionBody.model_fields}


def test_every_field_is_in_one_table_and_no_table_has_another() -> None:
    tables = [parameters(h) for h in ("Request fields", "Accepted and ignored", "Refused")]

    assert set.union(*tables) == fields()
    assert sum(map(len, tables)) == len(fields())


def test_the_ignored_parameters_are_those_of_the_schema() -> None:
    assert parameters("Accepted and ignored") == IGNORED_PARAMETERS


def test_the_refused_parameters_are_those_that_the_schema_refuses() -> None:
    refused = set()
    for body in (ChatCompletionBody, CompletionBody):
        try:
            body.model_validate(dict.fromkeys(body.model_fields, object()))
        except ValidationError as error:
            refused |= {d["loc"][0] for d in error.errors() if d["type"] == "unsupported_parameter"}

    assert parameters("Refused") == refused


def test_ignored_parameters_change_nothing_that_a_node_is_told(
    router: RunningRouter, node: FakeNode
) -> None:
    router.chat(seed=1)
    router.chat(
        seed=1,
        metadata={"a": "b"},
        safety_identifier="me",
        prompt_cache_key="k",
    )

    first, second = node.requests
    assert first.sampling == second.sampling
    assert first.prompt_token_ids == second.prompt_token_ids


def test_a_node_is_told_whose_request_it_is(router: RunningRouter, node: FakeNode) -> None:
    router.chat(user="me")
    router.chat()

    assert [request.client_id for request in node.requests] == ["me", ""]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_commands_work(start_router: RouterFactory, node: FakeNode) -> None:
    blocks = re.findall(r"```console\n(.*?)```", PAGE, flags=re.S)
    commands = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]

    node.max_model_len = 4096
    with start_router([(node.endpoint_id, node.url)]) as router:
        for command in commands:
            here = command.replace("http://127.0.0.1:8000", router.url)
            done = subprocess.run(
                here.replace("smollm2-135m", "tiny").replace("curl", "curl -sS --fail", 1),
                shell=True,
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)

    assert len(commands) == 6
    assert node.requests[1].priority_class == "high"
    assert {r.priority_class for r in node.requests[2:6]} == {"low"}
    assert all(request.sampling.grammar is not None for request in node.requests[6:])
    assert len(node.requests) == 2 + 4 + 2
