"""Bodies that clients send. Every field says what it is; whatever is not here is refused.

Null counts as absent everywhere, as OpenAI's own clients use it. Limits that depend on the
model or the configuration (lengths, names of classes) are checked in `translation`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from router.body_types import Body, RefusedKind, RefusedUnless, kind_of_text
from router.conversation import Message, ToolChoice, ToolList

MAX_SEED = 2**63 - 1
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIAS = 100
MAX_BIASED_TOKENS = 1024
"""Each of them is copied to the device in every step of its request."""

MIN_OBJECTIVE_MS = 0.001
"""No clock here sees less; far smaller values would be 0 in seconds."""

MAX_OBJECTIVE_MS = 3_600_000
MAX_WAIT_MS = 3_600_000
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100
"""Logits are multiplied or divided by it, and have to stay finite."""


def _kind_of_prompt(value: object) -> str:
    match value:
        case [str(), *_]:
            return "<texts>"
        case [list(), *_]:
            return "<token lists>"
        case [int(), *_]:
            return "<tokens>"
        case []:
            return "<texts>"
        case str():
            return "<text>"
        case _:
            return "<other>"


ObjectiveMs = Annotated[float, Field(ge=MIN_OBJECTIVE_MS, le=MAX_OBJECTIVE_MS)]


Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]


WaitMs = Annotated[float, Field(ge=0, le=MAX_WAIT_MS)]


class SloBody(Body):
    """Latency objectives of one request; what is absent comes from its class."""

    ttft_ms: ObjectiveMs | None = None
    """From arrival to the first token."""

    tpot_ms: ObjectiveMs | None = None
    """Between consecutive tokens."""


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    """Ends the stream with a chunk that has `usage` and no choices."""

    continuous_usage_stats: bool | None = None
    """Puts the counts so far on every chunk; needs `include_usage`."""

    include_obfuscation: Annotated[Any, RefusedUnless(False)] = None


TokenId = Annotated[int, Field(ge=0, lt=2**31)]

StopField = Annotated[
    Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), Tag("<text>")]
    | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        Field(max_length=MAX_STOP_STRINGS),
        Tag("<list>"),
    ]
    | Annotated[Any, RefusedKind("a string or an array of strings"), Tag("<other>")],
    Discriminator(kind_of_text),
]

PromptField = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[list[TokenId], Field(min_length=1, fail_fast=True), Tag("<tokens>")]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]],
        Field(min_length=1, fail_fast=True),
        Tag("<token lists>"),
    ]
    | Annotated[
        Any,
        RefusedKind("a string, an array of strings, token ids, or an array of token id arrays"),
        Tag("<other>"),
    ],
    Discriminator(_kind_of_prompt),
]


class JsonSchemaFormat(Body):
    """Which JSON an answer must be."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    """What clients call it; changes nothing."""

    description: str | None = None
    """Accepted and ignored: the model is not told."""

    schema_object: Annotated[dict[str, Any], Field(alias="schema")]
    """The JSON schema."""

    strict: bool | None = None
    """Changes nothing: every schema is kept to, or refused."""


class ResponseFormat(Body):
    """Which form an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    """Only with the type of this name, which needs it."""


class GenerationBody(Body):
    """What both routes take."""

    model: str
    """Name of the served model."""

    stream: bool | None = None
    """Send the answer as server-sent events while it is made."""

    stream_options: StreamOptions | None = None
    """Only together with `stream`."""

    n: Annotated[int, Field(ge=1)] | None = None
    """Answers to each prompt."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Output tokens at most."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep the most likely tokens that reach this probability together."""

    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Keep this many tokens; 0 keeps all."""

    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Keep tokens at least this likely, relative to the likeliest."""

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: (
        Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] | None
    ) = None
    """1 changes nothing."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Makes the answer repeatable."""

    stop: StopField | None = None
    """Texts that end the answer; they are not part of it."""

    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    """Tokens that end the answer, beside the model's own end tokens."""

    ignore_eos: bool | None = None
    """Do not end at the model's own end tokens."""

    priority: str | None = None
    """Name of a service class."""

    slo: SloBody | None = None
    """Latency objectives, in place of the class's."""

    max_wait_ms: WaitMs | None = None
    """How long the request may be without a node, at its start or because one failed, even if no
    token of it can be in time any more."""

    response_format: ResponseFormat | None = None
    """Which form the answer must have; any text by default."""

    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    """Regular expression that the whole answer must match."""

    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASED_TOKENS)] | None = None
    """What is added to the logits of tokens, by token id."""

    serving_summary: bool | None = None
    """Tell in `usage` how each answer was served; a stream has to ask for `usage` too."""

    user: str | None = None
    """Whose request it is: only requests of the same user share the KV of equal beginnings."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatCompletionBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    """The conversation so far."""

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`."""

    logprobs: bool | None = None
    """Report the log-probability of each token."""

    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Alternatives to report for each token; needs `logprobs`."""

    tools: ToolList | None = None
    """Functions that the model may call."""

    tool_choice: ToolChoice | None = None
    """Whether the model may call functions, must call one, or must call this one; needs `tools`."""

    parallel_tool_calls: bool | None = None
    """False: one call at most in each answer; needs `tools`."""

    metadata: dict[str, str] | None = None
    """Accepted and ignored."""

    safety_identifier: str | None = None
    """Accepted and ignored."""

    prompt_cache_key: str | None = None
    """Accepted and ignored."""

    audio: Annotated[Any, RefusedUnless()] = None
    function_call: Annotated[Any, RefusedUnless("none")] = None
    functions: Annotated[Any, RefusedUnless([])] = None
    modalities: Annotated[Any, RefusedUnless(["text"])] = None
    moderation: Annotated[Any, RefusedUnless()] = None
    prediction: Annotated[Any, RefusedUnless()] = None
    prompt_cache_options: Annotated[Any, RefusedUnless()] = None
    prompt_cache_retention: Annotated[Any, RefusedUnless()] = None
    reasoning_effort: Annotated[Any, RefusedUnless()] = None
    service_tier: Annotated[Any, RefusedUnless("auto", "default")] = None
    store: Annotated[Any, RefusedUnless(False)] = None
    verbosity: Annotated[Any, RefusedUnless()] = None
    web_search_options: Annotated[Any, RefusedUnless()] = None


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: PromptField
    """Text or token ids, one or several."""

    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Alternatives to report for each token; 0 reports the chosen token alone."""

    echo: bool | None = None
    """Put the prompt before the answer; not together with `logprobs`."""

    best_of: Annotated[Any, RefusedUnless(1)] = None
    suffix: Annotated[Any, RefusedUnless("")] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """`prompt` as a list of prompts."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else list(prompt)


class TokenizeBody(Body):
    """Body of POST /tokenize: a raw prompt or a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
                for name in ("prompt", "messages")
            ]
        }
    )

    model: str | None = None
    """Name of the served model."""

    prompt: str | None = None
    """Text as /v1/completions takes it."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    """A conversation as /v1/chat/completions takes it."""

    tools: ToolList | None = None
    """Functions that the model may call; only with `messages`."""

    add_special_tokens: bool | None = None
    """Whether a raw prompt gets what the model wants around a text; it does unless told not to."""

    add_generation_prompt: bool | None = None
    """Whether a conversation ends with the beginning of the answer; it does unless told not to."""

    return_token_strs: bool | None = None
    """Tell the text of each token too."""


class DetokenizeBody(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    """Name of the served model."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    """Token ids, in order."""


IGNORED_PARAMETERS = frozenset({"metadata", "safety_identifier", "prompt_cache_key"})
"""Accepted and without effect; the table of docs/api.md lists the same."""
