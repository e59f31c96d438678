"""Which tokens keep an output within its grammar.

Grammars are llguidance's, which masks a vocabulary of 49,152 in 5 to 120 us (AMD EPYC). It is
imported when a compiler of grammars is made, so that other engines do without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from orchestrator.core.request import Request

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

TOKENIZER_FILE = "tokenizer.json"

MAX_COMPILED_GRAMMARS = 64
"""Kept for requests with the same one, such as the answers to one prompt."""

MAX_LEXER_STATES = 50_000
"""Of one request; each takes 1 to 2 kB (llguidance's LLParserLimits, where 250,000 is usual)."""

BoolArray = npt.NDArray[np.bool_]


class GrammarFailed(ValueError):
    """A grammar cannot be followed, or not any further."""


class GrammarCompiler:
    """Makes matchers for the tokens of one model. One thread may use it at a time."""

    def __init__(self, engine_dir: Path, *, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        """Read the tokenizer of an engine directory.

        That takes 0.3 s for 49,152 tokens (AMD EPYC) and holds up all threads meanwhile, so it
        belongs before the first step. `vocab_size` is the model's, which may have more ids than its
        tokenizer has tokens.
        """
        self.vocab_size = vocab_size
        self.end_token_ids = tuple(end_token_ids)
        """Tokens that the model ends an answer with."""

        self.obstacle: str | None = None
        """Why no request with a grammar can be served; None if they can."""

        self._tokenizer: LLTokenizer | None = None
        self._compiled = lru_cache(MAX_COMPILED_GRAMMARS)(self._compile)
        try:
            self._tokenizer = self._read_tokenizer(engine_dir / TOKENIZER_FILE)
        except GrammarFailed as error:
            self.obstacle = str(error)

    def new_matcher(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of an output.

        Raises:
            GrammarFailed: the grammar is not valid or too complex, or there is an obstacle.
        """
        return self._compiled(grammar).deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        if self._tokenizer is None:
            raise GrammarFailed(self.obstacle)
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarFailed(f"the grammar cannot be compiled: {_problem_of(matcher)}")
        return matcher

    def _read_tokenizer(self, path: Path) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ModuleNotFoundError as error:
            raise GrammarFailed(
                "the package llguidance is not installed; install it with pip"
            ) from error
        try:
            return LLTokenizer(
                path.read_text(encoding="utf-8"),
                n_vocab=self.vocab_size,
                # One stands for all: which of them stop a request is its own to say.
                eos_token=next(iter(self.end_token_ids), None),
            )
        except FileNotFoundError as error:
            raise GrammarFailed(
                f"{path} is missing; rebuild the directory with `proserve build`"
            ) from error
        except (OSError, ValueError) as error:
            raise GrammarFailed(f"{path} cannot be used: {error}") from error


class GrammarMasks:
    """The tokens that requests with a grammar may get next.

    They are found in a thread beside the model. What is kept of a request follows from its output
    tokens: it may leave and come back, here or on another node.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._outputs: dict[str, _GuidedOutput] = {}
        self._begun: dict[str, Future[BoolArray]] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")

    def begin(self, requests: Iterable[Request]) -> None:
        """Let the masks of these requests be found, for `take`; all of them have a grammar."""
        self._begun = {
            request.request_id: self._worker.submit(self._output_of(request).next_allowed)
            for request in requests
        }

    def take(self, request: Request) -> BoolArray:
        """Return which tokens a request may get next, (vocab_size,), waiting for them.

        Raises:
            GrammarFailed: there are none, because of the grammar or the tokens before.
        """
        begun = self._begun.pop(request.request_id, None)
        if begun is None:
            begun = self._worker.submit(self._output_of(request).next_allowed)
        return begun.result()

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop what is kept of these requests; unknown ids are fine."""
        for request_id in request_ids:
            self._outputs.pop(request_id, None)
            self._begun.pop(request_id, None)

    def _output_of(self, request: Request) -> _GuidedOutput:
        output = self._outputs.get(request.request_id)
        # An id may come back with another Request object: resumed here after a failure.
        if output is None or output.request is not request:
            output = self._outputs[request.request_id] = _GuidedOutput(request, self._compiler)
        return output


class _GuidedOutput:
    """How far one request's output has come in its grammar."""

    def __init__(self, request: Request, compiler: GrammarCompiler) -> None:
        self.request = request
        self._compiler = compiler
        self._matcher: LLMatcher | None = None
        self._num_matched = 0

    def next_allowed(self) -> BoolArray:
        """Return which tokens may follow the output, (vocab_size,).

        Stop tokens may where the grammar accepts what is there, and nowhere else, whatever they
        stand for as text.
        """
        sampling, vocab_size = self.request.spec.sampling, self._compiler.vocab_size
        assert sampling.grammar is not None
        if self._matcher is None:
            self._matcher = self._compiler.new_matcher(sampling.grammar)
        matcher = self._matcher
        new_token_ids = self.request.output_token_ids[self._num_matched :]
        if new_token_ids:
            matcher.consume_tokens(new_token_ids)
        self._num_matched += len(new_token_ids)

        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)
        # Also if tokens did not fit, or if the grammar has just turned out to be too complex.
        if matcher.is_error():
            raise GrammarFailed(f"the grammar cannot be followed: {_problem_of(matcher)}")
        allowed[list(self._compiler.end_token_ids)] = False
        allowed[[i for i in sampling.stop_token_ids if i < vocab_size]] = matcher.is_accepting()
        return allowed


def _problem_of(matcher: LLMatcher) -> str:
    # The lines behind the first are the parser's whole state.
    return matcher.get_error().partition("\n")[0]
