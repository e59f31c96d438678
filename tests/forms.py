"""Grammars as routers make them, and a tokenizer to follow them with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from orchestrator.grammars import GrammarCompiler
from router.output_form import asked_grammar
from router.schema import CompletionBody
from router.tokenizer import Tokenizer
from tests.tiny_tokenizer import write_tiny_tokenizer

VOCAB_SIZE = 430
"""More than the tiny tokenizer has: a model's vocabulary may be padded."""

END_TOKEN = 2
"""<|im_end|> of the tiny tokenizer."""


def json_grammar(schema: dict[str, Any]) -> str:
    """Return the grammar of JSON that follows `schema`."""
    json_schema = {"name": "form", "schema": schema}
    return _asked(response_format={"type": "json_schema", "json_schema": json_schema})


def regex_grammar(regex: str) -> str:
    """Return the grammar of texts that `regex` matches from end to end."""
    return _asked(guided_regex=regex)


def tiny_tokenizer(folder: Path) -> tuple[Tokenizer, GrammarCompiler]:
    """Return the tiny tokenizer, written to `folder`, and what compiles grammars for it."""
    engine_dir = write_tiny_tokenizer(folder)
    return Tokenizer.from_engine_dir(engine_dir), GrammarCompiler(
        engine_dir, vocab_size=VOCAB_SIZE, end_token_ids=[END_TOKEN]
    )


def _asked(**form: Any) -> str:
    body = CompletionBody.model_validate({"model": "tiny", "prompt": "Hi", **form})
    grammar = asyncio.run(asked_grammar(body))
    assert grammar is not None
    return grammar
