"""The node's HTTP service over a real executor process with the scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator

import msgspec
import pytest

from orchestrator.core.request import FinishReason, ResumePoint
from orchestrator.wire import ErrorBody, NodeDescription, NodeSnapshot
from tests.running_node import Node, body, running_node, until
from tests.scripted_engine import EXIT, RAISE, REFUSE
from tests.tracers import NOT_SAMPLED, SAMPLED, SPAN_ID, TRACE_ID, Tracer, attributes, ids

SCRIPTED_ENGINE = (sys.executable, "-m", "tests.scripted_engine")


@pytest.fixture(params=["plain loop", "overlapped loop"])
async def node(request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    words = ("plan-ahead",) if request.param == "overlapped loop" else ()
    async with running_node(*SCRIPTED_ENGINE, *words) as value:
        yield value


async def test_tokens_stream_as_lines_and_end_with_a_reason(node: Node) -> None:
    events = await node.generate(body())

    assert [e.new_token_ids for e in events] == [(5,), (6,), (7,)]
    assert events[-1].finish_reason is FinishReason.LENGTH


async def test_the_node_describes_what_it_serves(node: Node) -> None:
    answer = await node.client.get("/v1/node")

    description = msgspec.json.decode(answer.content, type=NodeDescription)
    assert description.endpoint_id == "node-t"
    assert description.model == "scripted"
    assert description.capabilities.num_device_blocks == 100
    assert description.latency_profile.prefill_token_s == 0.001


async def test_snapshots_count_upwards(node: Node) -> None:
    before = await node.snapshot()
    await node.generate(body())

    async def is_newer() -> bool:
        return (await node.snapshot()).seq_no > before.seq_no

    await until(is_newer, "there is a newer snapshot")


class LostRegistrar:
    """Of a node whose registration has run out."""

    has_lost_lease = True

    def start(self) -> None:
        pass

    async def leave(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def test_a_node_that_is_cut_off_takes_nothing_until_a_router_listens(node: Node) -> None:
    node.service.registrar = LostRegistrar()
    message = msgspec.json.encode(body())

    refused = await node.client.post("/v1/generate", content=message)
    async with node.client.stream("GET", "/v1/snapshots") as answer:
        await anext(answer.aiter_lines())
        taken = await node.client.post("/v1/generate", content=message)

    assert refused.status_code == 503
    assert "cut off" in refused.text
    assert taken.status_code == 200


async def test_a_node_that_is_to_end_waits_for_no_listener_but_for_its_requests(node: Node) -> None:
    async with node.client.stream("GET", "/v1/snapshots") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        working = asyncio.create_task(node.generate(body(max_tokens=200)))
        await until(lambda: node.runs(1), "the request runs")

        await node.service.begin_shutdown()

        last = [msgspec.json.decode(line, type=NodeSnapshot) async for line in lines][-1]
    assert last.is_draining
    assert len(await working) == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "unreadable request"),
        (b"{}", "missing required field `request_id`"),
        (msgspec.json.encode(body("r", *range(1, 9000))), "the engine takes 8,192"),
        (msgspec.json.encode(body(max_tokens=0)), "max_tokens is 0"),
        (msgspec.json.encode(body(max_tokens=1700)), "KV blocks, the node has 100"),
        (msgspec.json.encode(body(ttft_s=-1.0)), "ttft_s is -1.0"),
        (msgspec.json.encode(body(grammar="start: /a/")), "does not choose tokens by a grammar"),
        (msgspec.json.encode(body()).replace(b'"seed":0', b'"sead":0'), "seed"),
        (msgspec.json.encode(body(heartbeat_s=0.0)), "`float` > 0.0"),
        (msgspec.json.encode(body(resume_from=ResumePoint((), 0.1))), "has 0 output tokens"),
        (msgspec.json.encode(body(resume_from=ResumePoint((5, 6, 7), 0.1))), "fewer than max_tok"),
        (msgspec.json.encode(body(resume_from=ResumePoint((5,), -0.1))), "ttft_s is -0.1"),
    ],
)
async def test_a_bad_request_is_answered_with_400_and_the_reason(
    node: Node, content: bytes, words: str
) -> None:
    answer = await node.client.post("/v1/generate", content=content)

    assert answer.status_code == 400
    assert words in msgspec.json.decode(answer.content, type=ErrorBody).message


async def test_a_client_that_leaves_frees_its_blocks(node: Node) -> None:
    request = msgspec.json.encode(body(max_tokens=1500))
    async with node.client.stream("POST", "/v1/generate", content=request) as answer:
        lines = answer.aiter_lines()  # kept: without it, the answer would be closed here
        await anext(lines)
        await until(lambda: node.runs(1), "the request is reported as running")

    async def blocks_are_free() -> bool:
        return await node.metric('proserve_node_kv_blocks{place="device",state="used"}') == 0

    await until(blocks_are_free, "the blocks are free")
    assert await node.metric('proserve_node_requests_total{finish_reason="abort"}') == 1


async def test_a_client_that_leaves_before_the_first_token_frees_its_place(node: Node) -> None:
    """Many steps of prefill come first: 1,500 prompt tokens in steps of 0.5 s by the profile."""
    blocker = asyncio.create_task(node.generate(body("blocker", max_tokens=200)))
    waiting = asyncio.create_task(node.generate(body("leaver", *range(5, 905), max_tokens=600)))

    async def both_are_known() -> bool:
        return node.service.executor.num_streams == 2

    await until(both_are_known, "both requests are open")
    waiting.cancel()
    await asyncio.wait({waiting})

    async def one_is_left() -> bool:
        return node.service.executor.num_streams == 1

    await until(one_is_left, "the leaver is gone")
    assert len(await blocker) == 200


async def test_a_failing_step_ends_its_requests_and_not_the_node(node: Node) -> None:
    (failed,) = await node.generate(body("bad", 5, RAISE))

    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == "the engine failed: as the prompt asked"
    assert len(await node.generate(body("good"))) == 3
    assert (await node.client.get("/health")).status_code == 200


async def test_a_dead_engine_ends_every_stream_and_turns_the_node_unhealthy(node: Node) -> None:
    others = [asyncio.create_task(node.generate(body(f"r{i}", max_tokens=1500))) for i in range(3)]
    await until(lambda: node.runs(3), "three requests run")

    last_words = (await node.generate(body("killer", 5, EXIT)))[-1]

    for stream in [await other for other in others]:
        assert stream[-1].finish_reason is FinishReason.LOST
        assert stream[-1].error == last_words.error
        assert sum(e.finish_reason is not None for e in stream) == 1
    assert last_words.error == "the engine process ended with status -9"
    health = await node.client.get("/health")
    assert health.status_code == 503
    assert "status -9" in health.text
    assert (
        await node.client.post("/v1/generate", content=msgspec.json.encode(body("late")))
    ).status_code == 503


async def test_a_request_for_an_engine_whose_death_is_not_known_yet_ends_as_lost(
    node: Node,
) -> None:
    """Nobody takes the command at the other end of the socket, and the node must not wait."""
    pid = node.service.executor.pid
    os.kill(pid, signal.SIGKILL)
    # Blocks on purpose: the node shall not get to see it. A thread of asyncio's waits as well, and
    # may be the first to take the status; the loop has not heard of it either way.
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222

    (event,) = await node.generate(body("late"))

    assert event.finish_reason is FinishReason.LOST
    assert event.error == "the engine process ended with status -9"


async def test_an_engine_that_cannot_load_says_why_on_every_route() -> None:
    script = "import sys; from orchestrator.executor_process import run_executor\n"
    script += "from orchestrator.core.errors import EngineDirectoryError\n"
    script += "def load(): raise EngineDirectoryError('model.safetensors is missing')\n"
    script += "sys.exit(run_executor(sys.argv[1], load))"
    async with running_node(sys.executable, "-c", script) as node:
        answers = [
            await node.client.get("/health"),
            await node.client.get("/v1/node"),
            await node.client.post("/v1/generate", content=msgspec.json.encode(body())),
        ]

    assert {a.status_code for a in answers} == {503}
    assert all("model.safetensors is missing" in a.text for a in answers)


async def test_a_stopped_engine_counts_as_unhealthy_until_it_goes_on(node: Node) -> None:
    pid = node.service.executor.pid
    os.kill(pid, signal.SIGSTOP)
    try:

        async def is_unhealthy() -> bool:
            return (await node.client.get("/health")).status_code == 503

        await until(is_unhealthy, "the silence is noticed")
        assert "has said nothing for" in (await node.client.get("/health")).text
    finally:
        os.kill(pid, signal.SIGCONT)

    async def is_healthy() -> bool:
        return (await node.client.get("/health")).status_code == 200

    await until(is_healthy, "the engine is heard again")


async def test_a_stopped_engine_loses_its_requests_once_and_forgets_them(node: Node) -> None:
    """Nobody has to wait whether it goes on; when it does, the requests are not there any more."""
    pid = node.service.executor.pid
    lost = asyncio.create_task(node.generate(body("lost", max_tokens=1500)))
    await until(lambda: node.runs(1), "it runs")
    os.kill(pid, signal.SIGSTOP)
    try:
        events = await lost
    finally:
        os.kill(pid, signal.SIGCONT)

    assert events[-1].finish_reason is FinishReason.LOST
    assert "has said nothing for" in str(events[-1].error)
    assert sum(e.finish_reason is not None for e in events) == 1
    await until(lambda: node.runs(0), "the engine has given it up too")


async def test_a_request_without_news_is_kept_alive_by_empty_lines(node: Node) -> None:
    """A stopped engine says nothing; the node has not given it up yet and says so."""
    request = body("quiet", max_tokens=1500, heartbeat_s=0.01)
    os.kill(node.service.executor.pid, signal.SIGSTOP)
    try:
        async with node.client.stream(
            "POST", "/v1/generate", content=msgspec.json.encode(request)
        ) as answer:
            lines = answer.aiter_lines()

            assert [await anext(lines) for _ in range(3)] == ["", "", ""]
    finally:
        os.kill(node.service.executor.pid, signal.SIGCONT)


@pytest.mark.parametrize("num_delivered", [1, 2])
async def test_a_resumed_request_goes_on_behind_what_was_delivered(
    node: Node, num_delivered: int
) -> None:
    """Of tokens 5, 6 and 7 the first ones came from another node; `max_tokens` counts all."""
    delivered = (5, 6, 7)[:num_delivered]

    events = await node.generate(body(resume_from=ResumePoint(delivered, ttft_s=0.2)))

    assert [e.new_token_ids for e in events] == [(t,) for t in (5, 6, 7)[num_delivered:]]
    assert events[-1].finish_reason is FinishReason.LENGTH


async def test_a_draining_node_finishes_what_runs_and_refuses_what_comes(node: Node) -> None:
    running_one = asyncio.create_task(node.generate(body("old", max_tokens=300)))
    await until(lambda: node.runs(1), "it runs")

    drained = await node.client.post("/v1/drain")

    assert drained.json() == {"open_requests": 1}
    refused = await node.client.post("/v1/generate", content=msgspec.json.encode(body("new")))
    assert refused.status_code == 503
    assert "draining" in refused.text
    assert (await node.snapshot()).is_draining
    assert len(await running_one) == 300


async def test_an_id_in_use_is_refused(node: Node) -> None:
    first = asyncio.create_task(node.generate(body("same", max_tokens=300)))
    await until(lambda: node.runs(1), "it runs")

    second = await node.client.post("/v1/generate", content=msgspec.json.encode(body("same")))

    assert second.status_code == 400
    assert "'same' is already in use" in second.text
    assert len(await first) == 300


async def test_a_shut_down_node_leaves_no_process(node: Node) -> None:
    pid = node.service.executor.pid
    await node.service.executor.__aexit__(None, None, None)

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_traced_request_has_a_span_with_what_became_of_it() -> None:
    """Three requests of a trace that is sampled, one of one that is not. The engine says a token
    each step; the middle one fails."""
    tracer = Tracer(sample_fraction=0.0)
    async with running_node(*SCRIPTED_ENGINE, tracing=tracer.tracing) as node:
        for name, last, header in (
            ("a", 1, SAMPLED), ("b", REFUSE, SAMPLED), ("c", 1, NOT_SAMPLED),
        ):  # fmt: skip
            await node.client.post(
                "/v1/generate",
                content=msgspec.json.encode(body(name, 5, last)),
                headers={"traceparent": header},
            )

    served, failed = tracer.spans()
    assert [ids(span)[::2] for span in (served, failed)] == [(TRACE_ID, SPAN_ID)] * 2
    names = ["queued", "prefill", "first_token", "finished"]
    assert sorted(e.name for e in served.events) == sorted(names)
    (prefill,) = [e for e in served.events if e.name == "prefill"]
    assert (prefill.attributes or {})["proserve.num_tokens"] == 2
    found = attributes(served)
    assert found["proserve.priority_class"] == "normal"
    assert found["gen_ai.usage.input_tokens"] == 2
    assert found["gen_ai.usage.output_tokens"] == 3
    assert found["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes(failed)["error.type"] == "error"
