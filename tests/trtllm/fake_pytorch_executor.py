"""TensorRT-LLM's PyTorch executor without TensorRT-LLM: its requests, KV manager and loop.

What it models, by py_executor.py and kvCacheManager.cpp:

- the KV manager takes the blocks of a whole prompt with its first chunk and one more whenever a
  token begins a block; asked for what it has not, it fails, as the real one does; requests that
  find a part of their prompt share its blocks, which are free when the last of them is gone;
- a paused request loses its blocks and becomes a prompt of all its tokens;
- in the overlapped loop, the tokens of a step are known after the next one was planned, a request
  whose last token is on its way waits in GENERATION_TO_COMPLETE, and a paused one loses it.

Every answer of the scheduler is checked against what the executor relies on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.trtllm.stub_modules import Stubs

LLM_REQUEST = "tensorrt_llm.bindings.internal.batch_manager.LlmRequest"
KV_MANAGER = "tensorrt_llm.bindings.internal.batch_manager.KVCacheManager"
KV_STATS = "tensorrt_llm.bindings.internal.batch_manager.KvCacheStats"
SCHEDULER_MODULE = "tensorrt_llm._torch.pyexecutor.scheduler.scheduler"


@dataclass(eq=False)
class FakeLlmRequest:
    """Implements LlmRequest."""

    states: Any
    request_id: int
    prompt_len: int
    max_new_tokens: int
    priority_value: float = 0.5
    num_reused_tokens: int = 0
    """Of the prompt, found by the manager when the first chunk is prepared."""

    num_draft_tokens: int = 0

    def __post_init__(self) -> None:
        self.state = self.states.CONTEXT_INIT
        self.orig_prompt_len = self.prompt_len
        self.num_tokens = self.prompt_len
        self.context_current_position = 0
        self.context_chunk_size = 0
        self.num_started_tokens = 0
        """Output tokens known or on their way."""

    @property
    def context_remaining_length(self) -> int:
        return self.prompt_len - self.context_current_position

    @property
    def is_first_context_chunk(self) -> bool:
        return self.context_current_position == 0

    @property
    def is_last_context_chunk(self) -> bool:
        return self.context_chunk_size == self.context_remaining_length

    @property
    def is_context_init_state(self) -> bool:
        return self.state is self.states.CONTEXT_INIT

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.orig_prompt_len

    def get_num_tokens(self, beam: int) -> int:
        assert beam == 0
        return self.num_tokens

    def priority(self) -> float:
        return self.priority_value

    def pause(self) -> None:
        self.state = self.states.CONTEXT_INIT
        self.prompt_len = self.num_tokens
        self.num_started_tokens = self.num_output_tokens
        self.context_current_position = self.context_chunk_size = self.num_reused_tokens = 0


class FakeKvManager:
    """Implements the C++ KVCacheManager, as far as a scheduler asks it."""

    def __init__(self, stubs: Stubs, *, num_blocks: int, block_size_tokens: int) -> None:
        self._stubs = stubs
        self.num_blocks = num_blocks
        self.block_size_tokens = block_size_tokens
        self._owned: dict[int, set[tuple[int | str, int]]] = {}
        """Request -> its blocks; those of the common beginning have the same name everywhere."""

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(set().union(*self._owned.values()))

    def get_kv_cache_stats(self) -> Any:
        return self._stubs.make(
            KV_STATS,
            max_num_blocks=self.num_blocks,
            free_num_blocks=self.num_free,
            tokens_per_block=self.block_size_tokens,
        )

    def hold(self, request_id: int, num_tokens: int, *, num_common_tokens: int = 0) -> None:
        """Own blocks for so many tokens, the first of them common to all that find them."""
        num_common = num_common_tokens // self.block_size_tokens
        self._owned.setdefault(request_id, set()).update(
            ("common" if index < num_common else request_id, index)
            for index in range(-(-num_tokens // self.block_size_tokens))
        )
        assert self.num_free >= 0, "the executor ran out of KV blocks"

    def drop(self, request_id: int) -> None:
        self._owned.pop(request_id, None)


class FakePyTorchExecutor:
    """Runs requests under a scheduler. `step` is one iteration of the loop."""

    def __init__(
        self,
        stubs: Stubs,
        *,
        num_blocks: int = 100,
        block_size_tokens: int = 4,
        max_batch_size: int = 8,
        max_num_tokens: int = 64,
        chunk_unit_tokens: int = 8,
        is_overlapped: bool = False,
    ) -> None:
        self._stubs = stubs
        self._states = stubs.find("tensorrt_llm.bindings.LlmRequestState")
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.chunk_unit_tokens = chunk_unit_tokens
        self._is_overlapped = is_overlapped
        self._manager = FakeKvManager(
            stubs, num_blocks=num_blocks, block_size_tokens=block_size_tokens
        )
        self.kv_cache = stubs.make(KV_MANAGER, self._manager)
        self.active: list[Any] = []
        self.num_output_tokens: dict[int, int] = {}
        """Of every request that has ended."""

        self.num_pauses = 0
        self._on_their_way: list[FakeLlmRequest] = []
        """Requests whose tokens the last step has computed but nobody has looked at."""

    def add(self, request_id: int, prompt_len: int, max_new_tokens: int, **options: Any) -> Any:
        fake = FakeLlmRequest(self._states, request_id, prompt_len, max_new_tokens, **options)
        request = self._stubs.make(LLM_REQUEST, fake)
        self.active.append(request)
        return request

    def step(self, scheduler: Any) -> Any:
        output = scheduler.schedule_request(self.active, set())
        self._check(output)
        for request in output.paused_requests:
            fake: FakeLlmRequest = request.stub_implementation
            self._manager.drop(fake.request_id)
            fake.pause()
            self.num_pauses += 1
            self._on_their_way = [r for r in self._on_their_way if r is not fake]
        computed = [
            request.stub_implementation
            for request in (*output.context_requests, *output.generation_requests)
        ]
        for fake in computed:
            self._compute(fake)
        producing = [fake for fake in computed if not fake.is_context_init_state]
        for fake in producing:
            fake.num_started_tokens += 1
        if self._is_overlapped:
            producing, self._on_their_way = self._on_their_way, producing
            self._mark_last_tokens()
        for fake in producing:
            self._receive_token(fake)
        return output

    def _compute(self, fake: FakeLlmRequest) -> None:
        if not fake.is_context_init_state:
            # The token that is fed is the last of those known or on their way.
            num_started = fake.orig_prompt_len + fake.num_started_tokens
            self._hold(fake, num_started)
            return
        if fake.is_first_context_chunk:
            self._hold(fake, fake.prompt_len)
            fake.context_current_position = fake.num_reused_tokens
        fake.context_current_position = min(
            fake.prompt_len, fake.context_current_position + fake.context_chunk_size
        )
        if fake.context_remaining_length == 0:
            fake.state = self._states.GENERATION_IN_PROGRESS

    def _hold(self, fake: FakeLlmRequest, num_tokens: int) -> None:
        self._manager.hold(fake.request_id, num_tokens, num_common_tokens=fake.num_reused_tokens)

    def _mark_last_tokens(self) -> None:
        for fake in self._on_their_way:
            if fake.num_started_tokens == fake.max_new_tokens:
                fake.state = self._states.GENERATION_TO_COMPLETE

    def _receive_token(self, fake: FakeLlmRequest) -> None:
        fake.num_tokens += 1
        if fake.num_output_tokens == fake.max_new_tokens:
            fake.state = self._states.GENERATION_COMPLETE
            self._manager.drop(fake.request_id)
            self.num_output_tokens[fake.request_id] = fake.num_output_tokens
            self.active = [r for r in self.active if r.stub_implementation is not fake]

    def _check(self, output: Any) -> None:
        context, generation = output.context_requests, output.generation_requests
        chunks = [request.context_chunk_size for request in context]
        ids = [r.request_id for r in (*context, *generation, *output.paused_requests)]
        assert len(set(ids)) == len(ids), "a request is in one list, once"
        assert len(context) + len(generation) <= self.max_batch_size
        assert sum(chunks) + len(generation) <= self.max_num_tokens
        assert output.num_fitting_requests == len(context) + len(generation)
        for request in context:
            assert request.stub_implementation.state is self._states.CONTEXT_INIT
            chunk = request.context_chunk_size
            assert 0 < chunk <= request.context_remaining_length
            is_whole = chunk % self.chunk_unit_tokens == 0
            assert is_whole or request.is_last_context_chunk
        for request in generation:
            assert request.stub_implementation.state is self._states.GENERATION_IN_PROGRESS
        is_last = [request.is_last_context_chunk for request in context]
        assert is_last == sorted(is_last), "chunks that produce nothing come first"
        for request in output.paused_requests:
            fake = request.stub_implementation
            assert not (fake.is_context_init_state and fake.is_first_context_chunk)
            assert fake.state is not self._states.GENERATION_TO_COMPLETE
        is_ending = any(
            r.stub_implementation.state is self._states.GENERATION_TO_COMPLETE for r in self.active
        )
        is_empty = not context and not generation
        assert not is_empty or output.paused_requests or is_ending, "nothing gets on"
