"""Text <-> token ids of a served model, and its chat template.

Reads the files that Hugging Face writes and gives the same tokens, without its library.

Special tokens in a client's text: /v1/completions takes a raw prompt, which may hold them, as
everywhere. The messages of a chat may not: whoever can write `<|im_end|>` as a token can end
his turn and speak as the system. There such text stays text, letter for letter, and control
tokens come from the template alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.core.errors import EngineDirectoryError, RequestRejected
from router.engine_files import read_object, read_text, stored_eos_token_ids
from router.token_bytes import bytes_of, whole_texts
from router.word_cache import WordCache, can_split

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where newer Hugging Face tokenizers keep the template; goes before the one in the config."""

# Unicode's private plane 16: no text means anything by these, and if a client sends some, others
# are taken.
_FIRST_MARKER, _LAST_MARKER = 0x100000, 0x10FFFD

_ESCAPED_MARKER = re.compile(r"\\udb[c-f][0-9a-f]\\ud[c-f][0-9a-f]{2}")

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class Tokenizer:
    """The tokenizer of one model. Any thread may use it."""

    def __init__(
        self,
        tokenizer_json: str,
        *,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        """Take the text of `tokenizer.json`.

        `special_tokens` are the names that a template may use, such as `bos_token`. Without
        `eos_token_ids` the one of `eos_token` ends an answer.

        Raises:
            ValueError: the tokenizer is not a byte-level one, or an end token is not among its
                tokens.
            jinja2.TemplateSyntaxError: the template cannot be parsed.
        """
        described = json.loads(tokenizer_json)
        decoder = described.get("decoder") if isinstance(described, dict) else None
        if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
            raise ValueError("its decoder is not ByteLevel, the only one supported")
        self._tokenizer = _load(described)
        self._words = WordCache(self._encode_directly) if can_split(described) else None
        alone = self._tokenizer.encode("a", add_special_tokens=False).ids
        self._adds_tokens = self._tokenizer.encode("a", add_special_tokens=True).ids != alone
        # Knows no special tokens, so that it reads their names as text.
        self._text_tokenizer = _load({**described, "added_tokens": []})
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        self._added_ids = frozenset(added_tokens)
        self._special_ids = frozenset(i for i, token in added_tokens.items() if token.special)
        tokens = {
            i: token for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items()
        }
        tokens.update((i, token.content) for i, token in added_tokens.items())
        self._token_bytes = {i: bytes_of(token) for i, token in tokens.items()}
        self._whole_texts = dict(whole_texts(self._token_bytes, self._special_ids))
        control_tokens = {
            token.content: i
            for i, token in added_tokens.items()
            if token.special or _is_written_by(chat_template, token.content)
        }
        self._control_ids = frozenset(control_tokens.values())
        self._control_pattern = _alternatives(control_tokens)
        self._special_tokens = dict(special_tokens)
        self._template = (
            None if chat_template is None else _template_environment().from_string(chat_template)
        )
        self.chat_template = chat_template
        """None if the model has none."""

        self.vocab_size = max(tokens) + 1
        """Every token id is below this."""

        if eos_token_ids is None:
            eos_token_id = self._tokenizer.token_to_id(special_tokens.get("eos_token", ""))
            if eos_token_id is None:
                raise ValueError(f"eos_token {special_tokens.get('eos_token')!r} is not in it")
            eos_token_ids = [eos_token_id]
        for token_id in eos_token_ids:
            if token_id not in tokens:
                raise ValueError(f"end token {token_id} is not in it")
        self.eos_token_ids = tuple(eos_token_ids)
        """Tokens with which the model ends an answer."""

    @classmethod
    def from_engine_dir(cls, engine_dir: Path) -> Tokenizer:
        """Return the tokenizer of an engine directory.

        Raises:
            EngineDirectoryError: a file is missing, damaged, or of an unsupported kind.
        """
        config = read_object(engine_dir / TOKENIZER_CONFIG_FILE)
        chat_template = config.get("chat_template")
        if (engine_dir / CHAT_TEMPLATE_FILE).exists():
            chat_template = read_text(engine_dir / CHAT_TEMPLATE_FILE)
        if not isinstance(chat_template, str | None):
            raise EngineDirectoryError(
                f"{engine_dir / TOKENIZER_CONFIG_FILE}: chat_template must be one template, "
                f"found a {type(chat_template).__name__}"
            )
        special_tokens = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in config.items()
            if name.endswith("_token") and isinstance(token, str | dict)
        }
        path = engine_dir / TOKENIZER_FILE
        tokenizer_json = read_text(path)
        try:
            return cls(
                tokenizer_json,
                chat_template=chat_template,
                special_tokens=special_tokens,
                eos_token_ids=stored_eos_token_ids(engine_dir),
            )
        except jinja2.TemplateSyntaxError as error:
            raise EngineDirectoryError(f"{engine_dir}: chat template: {error}") from error
        except ValueError as error:
            raise EngineDirectoryError(f"{path}: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the tokens of a raw prompt; names of special tokens in it become those tokens.

        `add_special_tokens` adds what the model wants around a text, such as a first token.

        Raises:
            RequestRejected: `text` is not valid Unicode (field `prompt`).
        """
        _check_unicode(text, field="prompt")
        if not (add_special_tokens and self._adds_tokens):
            return self._encode_rendered(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        return ids

    @property
    def template_knows_tools(self) -> bool:
        """Whether the chat template shows the model what tools there are."""
        if self.chat_template is None:
            return False
        parsed = _template_environment().parse(self.chat_template)
        return "tools" in jinja2.meta.find_undeclared_variables(parsed)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the tokens of a conversation.

        These are the tokens of `apply_chat_template`, except that names of special tokens in
        messages and tools are encoded as text, as Hugging Face does with `sanitize_control_tokens`.

        Raises:
            RequestRejected: as `apply_chat_template`; field `messages`.
        """
        tools_text = "".join(_strings_in(tools or ()))
        _check_unicode(tools_text, field="tools")
        text = "".join(_strings_in(messages))
        _check_unicode(text, field="messages")
        text += tools_text
        if not self._control_pattern.search(text):
            rendered = self.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt
            )
            return self._encode_rendered(rendered)
        start, end = _unused_markers(text)
        rendered = self.apply_chat_template(
            self._marked(messages, start, end),
            tools=self._marked(tools, start, end),
            add_generation_prompt=add_generation_prompt,
        )
        # A template may cut a text between its markers: one that is left alone still separates.
        pieces = re.split(f"{start}({self._control_pattern.pattern}){end}|[{start}{end}]", rendered)
        ids: list[int] = []
        for position, piece in enumerate(pieces):
            if piece:
                is_quoted = position % 2 == 1
                ids += self._encode_quoted(piece) if is_quoted else self._encode_rendered(piece)
        return ids

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the conversation as the text of a prompt, for people to read.

        Encoding this text would let messages forge turns; `encode_chat` does not.

        Raises:
            RequestRejected: the model has no template, or its template refuses the messages.
        """
        if self._template is None:
            raise RequestRejected(
                "the model has no chat template; use /v1/completions", field="messages"
            )
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        # What a template's expressions raise on values of a kind they were not written for.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, OverflowError) as error:
            raise RequestRejected(
                f"the model's chat template refuses the messages: {error}", field="messages"
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def text_of(self, token_ids: Iterable[int]) -> str:
        """Return the text with the names of special tokens; `encode` gives the tokens back,
        unless they are not those that it would have chosen."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Return whether `decode` leaves this token out."""
        return token_id in self._special_ids

    def has_added_token(self, text: str) -> bool:
        """Return whether `text` is one token that was added to the vocabulary, special or not."""
        return self._tokenizer.token_to_id(text) in self._added_ids

    def has_special_token(self, text: str) -> bool:
        """Return whether `text` is the name of a token that `decode` leaves out."""
        return self._tokenizer.token_to_id(text) in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Return what the token stands for: UTF-8, perhaps a part of a character.

        A special token stands for its name. An id that the tokenizer does not have (a model's
        vocabulary may be padded) stands for nothing.
        """
        return self._token_bytes.get(token_id, b"")

    def whole_text(self, token_id: int) -> str | None:
        """Return what the token adds to a text that ends between two characters; None if that
        depends on what follows."""
        return self._whole_texts.get(token_id)

    def token_text(self, token_id: int) -> str:
        """Return `token_bytes` as text, parts of characters as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _encode_rendered(self, text: str) -> list[int]:
        return self._encode_directly(text) if self._words is None else self._words.encode(text)

    def _encode_directly(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_quoted(self, text: str) -> list[int]:
        """Return the tokens of a special token's name, read as text."""
        ids: list[int] = self._text_tokenizer.encode(text, add_special_tokens=False).ids
        if not self._control_ids.isdisjoint(ids):
            raise RequestRejected(
                f"messages hold {text!r}, which this model cannot read as text; leave it out",
                field="messages",
            )
        return ids

    def _marked(self, value: Any, start: str, end: str) -> Any:
        """Return `value` with markers around the names of special tokens in its strings."""
        if isinstance(value, str):
            return self._control_pattern.sub(lambda found: f"{start}{found[0]}{end}", value)
        if isinstance(value, Mapping):
            return {
                self._marked(key, start, end): self._marked(item, start, end)
                for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self._marked(item, start, end) for item in value]
        return value


def _strings_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [part for item in value.items() for part in item]
    if isinstance(value, Sequence):
        return [text for item in value for text in _strings_in(item)]
    return []


def _is_written_by(chat_template: str | None, token: str) -> bool:
    """Return whether an added token, though not special, gives a conversation its structure.

    White space does not: some vocabularies add runs of it, and templates are full of it.
    """
    return chat_template is not None and token in chat_template and not token.isspace()


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of these tokens, each before those it begins with; never empty."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _unused_markers(text: str) -> tuple[str, str]:
    """Return two characters that are not in `text`."""
    used = set(text)
    unused = (
        character
        for code in range(_FIRST_MARKER, _LAST_MARKER + 1)
        if (character := chr(code)) not in used
    )
    start, end = next(unused, None), next(unused, None)
    if start is None or end is None:
        raise RequestRejected(
            "messages use every private character of Unicode's plane 16; leave one out",
            field="messages",
        )
    return start, end


def _check_unicode(text: str, *, field: str) -> None:
    """Refuse lone surrogates, which JSON can bring and UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestRejected(
            f"{field} has half of a surrogate pair, {text[error.start]!r}; send valid Unicode",
            field=field,
        ) from error


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark the model's own words for training."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _template_environment() -> ImmutableSandboxedEnvironment:
    """Return what Hugging Face renders chat templates in (transformers, chat_template_utils)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - the signature that templates know
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    # Jinja's own filter escapes HTML.
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    if ensure_ascii:  # but for markers, or what they mark would no longer be quoted
        return _ESCAPED_MARKER.sub(lambda found: json.loads(f'"{found[0]}"'), text)
    return text


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _load(described: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    except Exception as error:
        raise ValueError(str(error)) from error
    # A tokenizer may have been saved with the limits of its training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
