"""`proserve chat`: a conversation in the terminal with a running service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console

from orchestrator.core.errors import ProServeError


class ServiceRefused(ProServeError):
    """The service answered with an error."""


@dataclass(slots=True)
class ChatOptions:
    """What is sent with each turn."""

    url: str
    model: str | None = None
    """None takes the first model the service lists."""

    priority: str | None = None
    max_tokens: int = 512
    temperature: float | None = None
    api_key: str | None = field(default=None, repr=False)
    """None where everybody may use the service."""


def chat(options: ChatOptions, console: Console) -> None:
    """Talk until an empty line, Ctrl-D or Ctrl-C.

    Raises:
        ServiceRefused: the service cannot be reached or refuses a request.
    """
    messages: list[dict[str, str]] = []
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = httpx.Timeout(10.0, read=None)
    with httpx.Client(base_url=options.url, headers=headers, timeout=timeout) as client:
        model = options.model or _first_model(client)
        console.print(f"[dim]{model} at {options.url}; an empty line ends the chat[/]")
        while question := _ask(console):
            messages.append({"role": "user", "content": question})
            answer = _turn(client, model, messages, options, console)
            messages.append({"role": "assistant", "content": answer})


def _ask(console: Console) -> str:
    try:
        return console.input("[bold cyan]you:[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


def _turn(
    client: httpx.Client,
    model: str,
    messages: list[dict[str, str]],
    options: ChatOptions,
    console: Console,
) -> str:
    """Print one answer as it comes, then its TTFT and speed; return its text."""
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "max_tokens": options.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.priority is not None:
        body["priority"] = options.priority
    if options.temperature is not None:
        body["temperature"] = options.temperature
    started_s = time.monotonic()
    first_s = last_s = started_s
    pieces: list[str] = []
    num_tokens = 0
    console.print("[bold green]model:[/] ", end="")
    for chunk in _stream(client, body):
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                last_s = time.monotonic()
                first_s = first_s if pieces else last_s
                pieces.append(text)
                console.out(text, end="", highlight=False)
        num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
    speed = f"{(num_tokens - 1) / (last_s - first_s):.1f} tokens/s" if last_s > first_s else ""
    console.print(
        f"\n[dim]{num_tokens} tokens, first after {(first_s - started_s) * 1000:.0f} ms, {speed}[/]"
    )
    return "".join(pieces)


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                raise ServiceRefused(_error_message(answer.read()))
            for line in answer.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ServiceRefused(chunk["error"]["message"])
                yield chunk
    except httpx.TransportError as error:
        raise ServiceRefused(f"{client.base_url} cannot be reached: {error}") from error


def _first_model(client: httpx.Client) -> str:
    try:
        answer = client.get("/v1/models")
    except httpx.TransportError as error:
        raise ServiceRefused(
            f"{client.base_url} cannot be reached: {error}; is `proserve serve` running?"
        ) from error
    if answer.status_code != httpx.codes.OK:
        raise ServiceRefused(_error_message(answer.content))
    return str(answer.json()["data"][0]["id"])


def _error_message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")
