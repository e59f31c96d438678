"""The list of mutations and its record, against the source as it is."""

from __future__ import annotations

import json

import pytest

from tests.trtllm.mutations import MUTATIONS, RECORD, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_the_text_to_replace_occurs_once(mutation: Mutation) -> None:
    source = (ROOT / mutation.path).read_text()

    assert source.count(mutation.old) == 1
    assert mutation.new != mutation.old


def test_the_record_is_of_these_mutations_and_all_of_them_were_caught() -> None:
    """If this fails: make mutations."""
    recorded = json.loads(RECORD.read_text())

    assert [
        Mutation(entry["what"], entry["path"], entry["old"], entry["new"]) for entry in recorded
    ] == list(MUTATIONS)
    assert [entry["what"] for entry in recorded if not entry["is_caught"]] == []
    assert len(MUTATIONS) >= 40
