"""Steps that are begun before the tokens of those before are known, by a model that can be
foretold: the token after n is n + 1."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from engines import step_runner
from engines.kv_copies import KVCopies
from engines.kv_pool import KVLayout, KVPool
from engines.step_runner import Feed, StepLogits, StepRunner
from orchestrator.core.errors import EngineStepError
from orchestrator.core.ports import EngineCapabilities, ScheduledRequest, SchedulerOutput
from orchestrator.core.request import Request, SamplingParams
from orchestrator.device_sampling import DrawParameters, PendingTokens
from orchestrator.sampling import Draw, Sampler
from tests.engines.copies import offload
from tests.engines.step_driver import make_plan
from tests.factories import make_request

VOCAB_SIZE = 50
PATIENCE_S = 60.0
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, block_size_tokens=4, head_dim=2)
LIMITS = EngineCapabilities(
    block_size_tokens=LAYOUT.block_size_tokens,
    num_device_blocks=8,
    num_host_blocks=8,
    max_num_batched_tokens=16,
    max_num_seqs=4,
    max_model_len=16,
    num_layer_groups=1,
)


class CountingModel:
    """Answers n with n + 1; a token `bad` with nothing that is a number."""

    def __init__(self, *, bad: int = -1, refusal: Exception | None = None) -> None:
        self.computed: list[list[str]] = []
        self.computed_ahead: list[list[str]] = []
        self._bad, self._refusal = bad, refusal

    def compute(self, parts: Sequence[ScheduledRequest]) -> StepLogits:
        self.computed.append([part.request_id for part in parts])
        return self._answers(parts, [part.token_ids[-1] for part in parts])

    def compute_ahead(self, parts: Sequence[ScheduledRequest], feed: Feed) -> StepLogits | None:
        if self._refusal is not None:
            raise self._refusal
        self.computed_ahead.append([part.request_id for part in parts])
        return self._answers(
            parts,
            [
                part.token_ids[-1] if row < 0 else max(0, int(feed.token_ids[row]))
                for part, row in zip(parts, feed.rows, strict=True)
            ],
        )

    def _answers(self, parts: Sequence[ScheduledRequest], tokens: Sequence[int]) -> StepLogits:
        logits = torch.zeros(len(parts), VOCAB_SIZE)
        for row, token in enumerate(tokens):
            logits[row, (token + 1) % VOCAB_SIZE] = float("nan") if token == self._bad else 9.0
        return StepLogits(parts, logits)


@pytest.fixture
def copies() -> Iterator[KVCopies]:
    pool = KVPool(
        LAYOUT,
        LIMITS.num_device_blocks,
        num_host_blocks=LIMITS.num_host_blocks,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    opened = KVCopies(pool, num_layer_groups=1)
    yield opened
    opened.close()


MakeRunner = Callable[..., StepRunner]


@pytest.fixture
def make_runner(copies: KVCopies) -> MakeRunner:
    def make(model: CountingModel, draw: Draw | None = None) -> StepRunner:
        return StepRunner(
            LIMITS,
            copies,
            Sampler(VOCAB_SIZE, draw_on_cpu=draw),
            compute=model.compute,
            compute_ahead=model.compute_ahead,
        )

    return make


def part_of(request: Request) -> ScheduledRequest:
    """Return all that the request has still to compute."""
    start = request.num_computed_tokens
    blocks = [int(request.request_id)]
    return ScheduledRequest(request, start, request.num_tokens - start, blocks)


def requests_with(
    *prompts: Sequence[int], sampling: SamplingParams | None = None, first_id: int = 0
) -> list[Request]:
    return [
        make_request(str(first_id + index), prompt_token_ids=prompt, sampling=sampling)
        for index, prompt in enumerate(prompts)
    ]


def begin(plan: SchedulerOutput) -> None:
    """Do what `StepProgress.begin` does to requests."""
    for part in plan.scheduled:
        part.request.num_computed_tokens += part.num_new_tokens
        part.request.expect_token(0.0)


def settle(request: Request, token_id: int) -> None:
    request.expect_nothing()
    request.append_output_token(token_id, 0.0)


def begun(
    runner: StepRunner, requests: Sequence[Request], *, step_id: int = 1
) -> dict[str, tuple[int, ...]]:
    """Run a step of all requests whose tokens nobody has been told of yet; return those."""
    plan = make_plan(*map(part_of, requests), step_id=step_id)
    output = runner.run(plan)
    begin(plan)
    return dict(output.new_token_ids)


def next_plan(requests: Sequence[Request], step_id: int = 2) -> SchedulerOutput:
    return make_plan(*map(part_of, requests), step_id=step_id)


def test_a_launched_step_goes_on_from_tokens_that_the_device_knows(
    make_runner: MakeRunner,
) -> None:
    model = CountingModel()
    runner = make_runner(model)
    requests = requests_with([1, 2], [10], [20, 21, 22])
    tokens = begun(runner, requests)
    plan = next_plan(requests[::-1])

    assert runner.launch_ahead(plan)
    for request in requests:
        settle(request, *tokens[request.request_id])
    output = runner.run(plan)

    assert output.new_token_ids == {"0": (4,), "1": (12,), "2": (24,)}
    assert model.computed == [["0", "1", "2"]]
    assert model.computed_ahead == [["2", "1", "0"]]


def test_a_step_that_was_launched_late_has_taken_no_longer(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its step took corrects the latency model, which must not learn what the host dallied."""
    now_s = 1.0
    monkeypatch.setattr(step_runner, "time", SimpleNamespace(perf_counter=lambda: now_s))
    runner = make_runner(CountingModel())
    requests = requests_with([1])
    begun(runner, requests)
    plan = next_plan(requests)
    now_s = 5.0
    assert runner.launch_ahead(plan)
    settle(requests[0], 2)
    now_s = 7.0

    assert runner.run(plan).step_s == 2.0


def test_a_request_whose_tokens_are_known_joins_a_launched_step(make_runner: MakeRunner) -> None:
    runner = make_runner(CountingModel())
    running, joining = requests_with([1], [10])
    begun(runner, [running])
    plan = next_plan([running, joining])

    assert runner.launch_ahead(plan)
    settle(running, 2)

    assert runner.run(plan).new_token_ids == {"0": (3,), "1": (11,)}


def test_what_ended_meanwhile_gets_no_token(make_runner: MakeRunner) -> None:
    runner = make_runner(CountingModel())
    requests = requests_with([1], [10])
    begun(runner, requests)
    assert runner.launch_ahead(next_plan(requests))
    settle(requests[1], 11)

    output = runner.run(next_plan(requests[1:]))

    assert output.new_token_ids == {"1": (12,)}
    assert not output.failed


def test_a_launched_step_that_nobody_asks_for_is_forgotten(make_runner: MakeRunner) -> None:
    model = CountingModel()
    runner = make_runner(model)
    requests = requests_with([1], [10])
    begun(runner, requests[:1])
    assert runner.launch_ahead(next_plan(requests[:1]))

    output = runner.run(make_plan(part_of(requests[1]), step_id=3))

    assert output.new_token_ids == {"1": (11,)}
    assert model.computed[-1] == ["1"]


def test_a_forgotten_step_keeps_its_memory_until_the_device_is_past_it(
    make_runner: MakeRunner,
) -> None:
    """The device writes to it when its turn has come; by then others must not have got it."""
    drawn: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def draw(scores: torch.Tensor, _: DrawParameters) -> PendingTokens:
        ids = scores.argmax(dim=-1)
        drawn.append(weakref.ref(ids))

        def wait() -> list[int]:
            alive.append(sum(ref() is not None for ref in drawn))
            numbers: list[int] = ids.tolist()
            return numbers

        return PendingTokens(ids, wait)

    runner = make_runner(CountingModel(), draw)
    requests = requests_with([1], [10])
    begun(runner, requests[:1])
    assert runner.launch_ahead(next_plan(requests[:1]))
    alive.clear()

    runner.run(make_plan(part_of(requests[1]), step_id=3))

    assert len(drawn) == 3
    assert alive[0] >= 2, "the forgotten one and that which is waited for"
    gc.collect()
    assert sum(ref() is not None for ref in drawn) == 1


def test_one_launched_step_follows_another(make_runner: MakeRunner) -> None:
    runner = make_runner(CountingModel())
    requests = requests_with([1], [10])
    begun(runner, requests)
    plan = next_plan(requests)
    for step_id in range(2, 5):
        assert runner.launch_ahead(plan)
        settle(requests[0], step_id)
        settle(requests[1], step_id + 9)
        output = runner.run(plan)
        begin(plan)
        assert output.new_token_ids == {"0": (step_id + 1,), "1": (step_id + 10,)}
        plan = next_plan(requests, step_id + 1)


def test_a_step_is_launched_while_tokens_are_waited_for(make_runner: MakeRunner) -> None:
    is_launched = threading.Event()

    def draw(scores: torch.Tensor, _: DrawParameters) -> PendingTokens:
        ids = scores.argmax(dim=-1)

        def wait() -> list[int]:
            assert is_launched.wait(PATIENCE_S)
            numbers: list[int] = ids.tolist()
            return numbers

        return PendingTokens(ids, wait)

    runner = make_runner(CountingModel(), draw)
    requests = requests_with([1], [10])
    first = make_plan(*map(part_of, requests), step_id=1)
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(runner.run, first)
        # Until the thread has launched it, there is nothing to launch another one behind.
        begin(first)
        plan = next_plan(requests)
        while not runner.launch_ahead(plan):
            assert not future.done()
        is_launched.set()
        output = future.result(PATIENCE_S)

    assert output.new_token_ids == {"0": (2,), "1": (11,)}
    settle(requests[0], 2)
    settle(requests[1], 11)
    assert runner.run(plan).new_token_ids == {"0": (3,), "1": (12,)}


def test_logits_that_are_no_numbers_end_their_request_alone(make_runner: MakeRunner) -> None:
    runner = make_runner(CountingModel(bad=1))
    requests = requests_with([1], [10])
    plan = make_plan(*map(part_of, requests), step_id=1)
    output = runner.run(plan)
    begin(plan)

    assert output.new_token_ids == {"1": (11,)}
    assert "infinite for request 0" in output.failed["0"]
    assert runner.launch_ahead(next_plan(requests))
    settle(requests[1], 11)
    following = runner.run(next_plan(requests[1:]))
    assert following.new_token_ids == {"1": (12,)}
    assert not following.failed


def test_what_was_launched_behind_a_step_that_failed_is_forgotten(
    make_runner: MakeRunner,
) -> None:
    running, joining = requests_with([1], [10])
    first = make_plan(part_of(running), step_id=1)
    num_waits_in_vain = 0
    is_broken = True

    def draw(scores: torch.Tensor, _: DrawParameters) -> PendingTokens:
        ids = scores.argmax(dim=-1)

        def wait() -> list[int]:
            nonlocal num_waits_in_vain
            if is_broken:
                num_waits_in_vain += 1
                if num_waits_in_vain == 1:
                    begin(first)
                    assert runner.launch_ahead(next_plan([running]))
                raise RuntimeError("device-side assert")
            numbers: list[int] = ids.tolist()
            return numbers

        return PendingTokens(ids, wait)

    runner = make_runner(CountingModel(), draw)

    with pytest.raises(EngineStepError, match="device-side assert"):
        runner.run(first)

    assert num_waits_in_vain == 2, "for the step that failed, and for the one behind it"
    is_broken = False
    assert not runner.launch_ahead(next_plan([running, joining], 3))
    assert runner.run(make_plan(part_of(joining), step_id=2)).new_token_ids == {"1": (11,)}


def test_closing_waits_for_a_step_that_was_launched(make_runner: MakeRunner) -> None:
    num_waits = 0

    def draw(scores: torch.Tensor, _: DrawParameters) -> PendingTokens:
        ids = scores.argmax(dim=-1)

        def wait() -> list[int]:
            nonlocal num_waits
            num_waits += 1
            numbers: list[int] = ids.tolist()
            return numbers

        return PendingTokens(ids, wait)

    runner = make_runner(CountingModel(), draw)
    requests = requests_with([1])
    begun(runner, requests)
    assert runner.launch_ahead(next_plan(requests))
    num_waits = 0

    runner.close()

    assert num_waits == 1


def with_transfer(requests: Sequence[Request]) -> SchedulerOutput:
    return make_plan(*map(part_of, requests), step_id=2, transfers=[offload(1, [0], [0])])


def with_a_stranger(requests: Sequence[Request]) -> SchedulerOutput:
    """It waits for a token, but not for one of the step before."""
    (stranger,) = requests_with([5], first_id=2)
    stranger.num_computed_tokens = 1
    stranger.expect_token(0.0)
    return next_plan([*requests, stranger])


def with_a_prompt(requests: Sequence[Request]) -> SchedulerOutput:
    (prompt,) = requests_with([5, 6], first_id=2)
    return next_plan([*requests, prompt])


def with_a_foreign_token(requests: Sequence[Request]) -> SchedulerOutput:
    (foreign,) = requests_with([VOCAB_SIZE], first_id=2)
    return next_plan([*requests, foreign])


def without_blocks(requests: Sequence[Request]) -> SchedulerOutput:
    part = part_of(requests[0])
    return make_plan(ScheduledRequest(part.request, part.num_computed_tokens, 1, []), step_id=2)


def of_known_tokens(_: Sequence[Request]) -> SchedulerOutput:
    return next_plan(requests_with([5], first_id=2))


@pytest.mark.parametrize(
    "make",
    [
        lambda requests: next_plan(requests, step_id=3),
        lambda _: make_plan(step_id=2),
        with_transfer,
        with_a_stranger,
        with_a_prompt,
        with_a_foreign_token,
        without_blocks,
        of_known_tokens,
    ],
)
def test_a_step_that_needs_the_host_is_not_launched(
    make_runner: MakeRunner,
    make: Callable[[Sequence[Request]], SchedulerOutput],
) -> None:
    model = CountingModel()
    runner = make_runner(model)
    requests = requests_with([1], [10])
    begun(runner, requests)

    assert not runner.launch_ahead(make(requests))
    assert not model.computed_ahead


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=9, seed=0, temperature=0.0, logit_bias=((3, 1.0),)),
        SamplingParams(max_tokens=9, seed=0, temperature=0.0, presence_penalty=1.0),
        SamplingParams(max_tokens=9, seed=0, temperature=0.0, num_logprobs=1),
    ],
    ids=["bias", "penalty", "logprobs"],
)
def test_nor_is_one_behind_logits_that_are_still_needed_or_before_changed_ones(
    make_runner: MakeRunner,
    params: SamplingParams,
) -> None:
    model = CountingModel()
    runner = make_runner(model)
    requests = requests_with([1], [10], sampling=params)
    begun(runner, requests)

    assert not runner.launch_ahead(next_plan(requests))
    assert not model.computed_ahead


def test_a_step_that_cannot_be_launched_is_run_in_its_turn(
    make_runner: MakeRunner,
) -> None:
    model = CountingModel(refusal=RuntimeError("out of memory"))
    runner = make_runner(model)
    requests = requests_with([1], [10])
    begun(runner, requests)
    plan = next_plan(requests)

    assert not runner.launch_ahead(plan)
    settle(requests[0], 2)
    settle(requests[1], 11)

    assert runner.run(plan).new_token_ids == {"0": (3,), "1": (12,)}


def test_an_engine_that_knows_no_way_refuses_at_once(copies: KVCopies) -> None:
    model = CountingModel()
    runner = StepRunner(LIMITS, copies, Sampler(VOCAB_SIZE), compute=model.compute)
    requests = requests_with([1])
    begun(runner, requests)

    assert not runner.launch_ahead(next_plan(requests))
