"""From what a client asked to what nodes are told: classes, objectives, tokens, limits, seeds."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TypeVar

from starlette.datastructures import Headers

from orchestrator.core.request import SamplingParams
from orchestrator.core.slo import PriorityClass, Slo
from router.client_directory import Client
from router.config import RouterConfig
from router.endpoints import EndpointPool
from router.errors import Refused, cut
from router.output_form import asked_grammar, form_field
from router.policy import RoutingRequest
from router.schema import (
    MAX_SEED,
    ChatCompletionBody,
    CompletionBody,
    GenerationBody,
    StreamOptions,
)
from router.terms import agreed, max_wait_s
from router.tokenizer import Tokenizer
from router.tool_calling import OfferedTools, ToolCalling

DEFAULT_COMPLETION_TOKENS = 16
"""What /v1/completions makes when not told; OpenAI's number."""

# Tokenising is linear, some 100 ns a character; from here on it would hold up other streams.
MAX_INLINE_CHARACTERS = 16_384

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in tokens."""

    token_ids: tuple[int, ...]
    echo: str = ""
    """Text that the answer begins with."""


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One sequence to generate."""

    prompt: Prompt
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Sender:
    """Where a request comes from."""

    client: Client
    headers: Headers
    arrival_s: float
    seed_source: bytes | None
    """What the seeds are made of if the request names none; None leaves them to chance."""


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """A client's request, checked and complete."""

    model: str
    priority_class: PriorityClass
    slo: Slo
    client_id: str
    """Whom fair schedulers count it for."""

    cache_salt: str
    """Only requests with the same one share KV."""

    sequences: tuple[SequencePlan, ...]
    """The answers to the first prompt, then those to the second, and so on."""

    num_prompt_tokens: int
    """Each prompt counted once."""

    max_wait_s: float | None
    """How long it may be without a node; None if nobody says."""

    stop: tuple[str, ...]
    tools: OfferedTools | None
    """What the answers may call; None if they are text."""

    is_stream: bool
    stream_options: StreamOptions
    has_serving_summary: bool
    arrival_s: float
    demoted_to: PriorityClass | None = None
    """What nodes are told in place of `priority_class`, for a request that is served without
    hope. What was promised, and so what counts as gain, stays."""

    @property
    def node_class(self) -> PriorityClass:
        """The class that nodes are told."""
        return self.demoted_to or self.priority_class

    @property
    def node_slo(self) -> Slo:
        """The objectives that nodes are told."""
        if self.demoted_to is None:
            return self.slo
        return Slo(
            ttft_s=max(self.slo.ttft_s, self.demoted_to.slo.ttft_s),
            tpot_s=max(self.slo.tpot_s, self.demoted_to.slo.tpot_s),
        )

    def routing_request(self, index: int, *, request_id: str) -> RoutingRequest:
        """Return what a routing policy is told of one sequence."""
        sequence = self.sequences[index]
        return RoutingRequest(
            request_id=request_id,
            prompt_token_ids=sequence.prompt.token_ids,
            max_tokens=sequence.sampling.max_tokens,
            priority_class=self.node_class.name,
            weight=self.node_class.weight,
            slo=self.node_slo,
            arrival_s=self.arrival_s,
            cache_salt=self.cache_salt,
            needs_grammar=sequence.sampling.grammar is not None,
        )


@dataclass(frozen=True, slots=True)
class _WantedOutput:
    """What the two routes say differently about all answers to a request."""

    max_tokens: int | None
    """None: as many as the context has room for."""

    num_logprobs: int | None
    """As in `SamplingParams`."""

    grammar: str | None
    """As in `SamplingParams`."""

    tools: OfferedTools | None = None


class Translator:
    """Makes plans of request bodies."""

    def __init__(
        self,
        config: RouterConfig,
        tokenizer: Tokenizer,
        tool_calling: ToolCalling,
        pool: EndpointPool,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._tool_calling = tool_calling
        self._pool = pool

    async def plan_chat(self, body: ChatCompletionBody, sender: Sender) -> GenerationPlan:
        """Return the plan for a conversation.

        Raises:
            RequestRejected: something in the request cannot be served.
            NodeUnavailable: no node has said yet what it can serve.
        """
        self._check_model(body)
        max_tokens = agreed(
            ("max_tokens", body.max_tokens), ("max_completion_tokens", body.max_completion_tokens)
        )
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused("top_logprobs needs logprobs to be true", field="top_logprobs")
        tools = await self._tool_calling.offered(body)
        wanted = _WantedOutput(
            max_tokens=max_tokens,
            num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=await asked_grammar(body) if tools is None else tools.grammar,
            tools=tools,
        )
        prompt = self._tool_calling.prompt(body.messages, None if tools is None else body.tools)
        token_ids = await off_loop_if_long(
            prompt.num_characters,
            lambda: self._tokenizer.encode_chat(prompt.messages, tools=prompt.tools),
        )
        return self._plan(body, [Prompt(tuple(token_ids))], sender, wanted)

    async def plan_completion(self, body: CompletionBody, sender: Sender) -> GenerationPlan:
        """Return the plan for one or several prompts.

        Raises:
            RequestRejected: something in the request cannot be served.
            NodeUnavailable: no node has said yet what it can serve.
        """
        self._check_model(body)
        if body.echo and body.logprobs is not None:
            raise Refused(
                "echo cannot be combined with logprobs: those of the prompt are not computed",
                field="echo",
            )
        wanted = _WantedOutput(
            max_tokens=DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens,
            num_logprobs=body.logprobs,
            grammar=await asked_grammar(body),
        )
        prompts = await off_loop_if_long(
            sum(len(prompt) for prompt in body.prompts), lambda: self._prompts(body)
        )
        return self._plan(body, prompts, sender, wanted)

    def _plan(
        self,
        body: GenerationBody,
        prompts: Sequence[Prompt],
        sender: Sender,
        wanted: _WantedOutput,
    ) -> GenerationPlan:
        stream_options = _stream_options(body)
        priority_class, slo = sender.client.terms.of(body, sender.headers)
        wait_s = max_wait_s(body, sender.headers)
        num_choices = body.n or 1
        limit = self._config.max_sequences_per_request
        if len(prompts) * num_choices > limit:
            raise Refused(
                f"n is {cut(f'{num_choices:,}')} and there are {len(prompts):,} prompts; one "
                f"request may ask for {limit:,} answers together",
                field="n",
            )
        self._check_token_ids(body, prompts)
        self._check_grammar(
            wanted.grammar, field=form_field(body) if wanted.tools is None else "tools"
        )
        make_sampling = self._shared_sampling(body, wanted)
        make_seed = partial(sequence_seed, body.seed, sender.seed_source)
        return GenerationPlan(
            model=body.model,
            priority_class=priority_class,
            slo=slo,
            client_id=sender.client.id_on_nodes(body.user),
            cache_salt=sender.client.cache_salt(body.user),
            sequences=tuple(
                SequencePlan(
                    prompt,
                    make_sampling(
                        max_tokens=self._max_tokens(prompt, wanted.max_tokens, body),
                        seed=make_seed(index, choice),
                    ),
                )
                for index, (prompt, choice) in enumerate(product(prompts, range(num_choices)))
            ),
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            max_wait_s=self._config.default_max_wait_s if wait_s is None else wait_s,
            stop=body.stop_strings,
            tools=wanted.tools,
            is_stream=bool(body.stream),
            stream_options=stream_options,
            has_serving_summary=bool(body.serving_summary),
            arrival_s=sender.arrival_s,
        )

    def _check_model(self, body: GenerationBody) -> None:
        if body.model != self._config.model:
            raise model_not_found(body.model, served=self._config.model)

    def _prompts(self, body: CompletionBody) -> list[Prompt]:
        found = []
        for item in body.prompts:
            if isinstance(item, str):
                token_ids = self._tokenizer.encode(item, add_special_tokens=True)
                text = item
            else:
                token_ids = item
                text = self._tokenizer.decode(item) if body.echo else ""
            found.append(Prompt(tuple(token_ids), text if body.echo else ""))
        return found

    def _check_token_ids(self, body: GenerationBody, prompts: Sequence[Prompt]) -> None:
        field = _prompt_field(body)
        limit = self._tokenizer.vocab_size
        for prompt in prompts:
            if not prompt.token_ids:
                raise Refused(f"{field} has no tokens, it must have at least one", field=field)
        for name, ids in (
            *((field, prompt.token_ids) for prompt in prompts),
            ("stop_token_ids", body.stop_token_ids or ()),
        ):
            if max(ids, default=0) >= limit:
                raise Refused(
                    f"{name} has token id {max(ids):,}, the model's ids are below {limit:,}",
                    field=name,
                )

    def _check_grammar(self, grammar: str | None, *, field: str) -> None:
        obstacle = None if grammar is None else self._pool.grammar_obstacle()
        if obstacle is not None:
            raise Refused(
                f"{field} asks for answers of a given form, which no node here can give "
                f"({obstacle}); leave it out",
                field=field,
                code="unsupported_parameter",
            )

    def _logit_bias(self, body: GenerationBody) -> tuple[tuple[int, float], ...]:
        limit = self._tokenizer.vocab_size
        biases = {}
        for key, bias in (body.logit_bias or {}).items():
            # In one spelling only, so that no token has two biases.
            if not _TOKEN_ID.fullmatch(key) or int(key) >= limit:
                raise Refused(
                    f"logit_bias has the key {cut(repr(key))}, keys must be token ids below "
                    f"{limit:,}",
                    field="logit_bias",
                    code="invalid_value",
                )
            biases[int(key)] = bias
        return tuple(biases.items())

    def _max_tokens(self, prompt: Prompt, asked: int | None, body: GenerationBody) -> int:
        num_prompt_tokens, limit = len(prompt.token_ids), self._pool.max_sequence_tokens()
        if num_prompt_tokens >= limit:
            field = _prompt_field(body)
            raise Refused(
                f"{field} has {num_prompt_tokens:,} tokens, the model takes {limit:,} together "
                "with its answer; shorten it",
                field=field,
                code="context_length_exceeded",
            )
        if asked is None:
            return limit - num_prompt_tokens
        if num_prompt_tokens + asked > limit:
            is_new_name = isinstance(body, ChatCompletionBody) and body.max_tokens is None
            field = "max_completion_tokens" if is_new_name else "max_tokens"
            raise Refused(
                f"{field} is {cut(f'{asked:,}')} and the prompt has {num_prompt_tokens:,} tokens, "
                f"the model takes {limit:,} together; ask for at most "
                f"{limit - num_prompt_tokens:,}",
                field=field,
                code="context_length_exceeded",
            )
        return asked

    def _shared_sampling(
        self, body: GenerationBody, wanted: _WantedOutput
    ) -> Callable[..., SamplingParams]:
        """Return what makes the parameters of one answer of its `max_tokens` and `seed`."""
        end_token_ids = () if body.ignore_eos else tuple(self._tokenizer.eos_token_ids)
        return partial(
            SamplingParams,
            temperature=_given(body.temperature, 1.0),
            top_p=_given(body.top_p, 1.0),
            top_k=_given(body.top_k, 0),
            min_p=_given(body.min_p, 0.0),
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            stop_token_ids=tuple(dict.fromkeys((*end_token_ids, *(body.stop_token_ids or ())))),
            logit_bias=self._logit_bias(body),
            grammar=wanted.grammar,
            num_logprobs=wanted.num_logprobs,
        )


def _stream_options(body: GenerationBody) -> StreamOptions:
    if body.stream_options is not None and not body.stream:
        raise Refused("stream_options needs stream to be true", field="stream_options")
    options = body.stream_options or StreamOptions()
    if options.continuous_usage_stats and not options.include_usage:
        raise Refused(
            "stream_options.continuous_usage_stats needs include_usage to be true",
            field="stream_options.continuous_usage_stats",
        )
    if body.serving_summary and body.stream and not options.include_usage:
        raise Refused(
            "serving_summary is part of usage, which a stream has only with "
            "stream_options.include_usage",
            field="serving_summary",
        )
    return options


def sequence_seed(seed: int | None, source: bytes | None, index: int, choice: int) -> int:
    """Return the seed of one of a request's answers.

    The first answer to a prompt takes the client's seed itself, so that it does not depend on
    `n`; the others take a hash of seed and number. Without a seed each takes a hash of `source`
    and of its index among all answers, or without a source a random one.
    """
    if seed is not None and choice == 0:
        return seed
    if seed is not None:
        material = b"%d/%d" % (seed, choice)
    elif source is not None:
        material = b"%b/%d" % (source, index)
    else:
        return secrets.randbelow(MAX_SEED + 1)
    return int.from_bytes(hashlib.blake2b(material, digest_size=8).digest()) & MAX_SEED


def model_not_found(asked: str, *, served: str) -> Refused:
    """Return the refusal of a model that is not served here."""
    return Refused(
        f"the model {cut(repr(asked))} does not exist here, {served!r} does",
        field="model",
        status=404,
        code="model_not_found",
    )


def _prompt_field(body: GenerationBody) -> str:
    return "messages" if isinstance(body, ChatCompletionBody) else "prompt"


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


async def off_loop_if_long(num_characters: int, tokenize: Callable[[], T]) -> T:
    """Return what `tokenize` makes of so many characters; other streams go on meanwhile."""
    if num_characters <= MAX_INLINE_CHARACTERS:
        return tokenize()
    return await asyncio.to_thread(tokenize)
