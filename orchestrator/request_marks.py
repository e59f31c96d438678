"""What happens to single requests in the steps of an executor."""

from __future__ import annotations

from orchestrator.core.ports import SchedulerOutput
from orchestrator.wire import RequestMark


class RequestMarks:
    """Finds what is worth telling of requests in the plans of steps."""

    def __init__(self) -> None:
        self._followed: set[str] = set()
        """Requests that have not ended."""

        self._preempted: set[str] = set()
        """Those that have lost their blocks and not been scheduled since."""

    def follow(self, request_id: str) -> None:
        """A request begins."""
        self._followed.add(request_id)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._followed.discard(request_id)
        self._preempted.discard(request_id)

    def of_step(self, plan: SchedulerOutput, began_s: float) -> tuple[RequestMark, ...]:
        """Return what a step that began at that moment did to requests that go on.

        Steps that only make a request's next token are left out: there are as many as tokens.
        """
        marks = []
        for request_id in plan.preempted_ids:
            if request_id in self._followed:
                self._preempted.add(request_id)
                marks.append(RequestMark(request_id, "preempted", began_s))
        for transfer in plan.transfers:
            if transfer.request_id in self._followed:
                num_blocks = len(transfer.device_block_ids)
                name = transfer.direction.value
                marks.append(RequestMark(transfer.request_id, name, began_s, num_blocks=num_blocks))
        for part in plan.scheduled:
            num_tokens = part.num_new_tokens
            is_prefill = num_tokens > 1 or part.num_computed_tokens < part.request.num_prompt_tokens
            if not is_prefill and not self._preempted:
                continue
            request_id = part.request_id
            if request_id not in self._followed:
                continue
            if request_id in self._preempted:
                self._preempted.discard(request_id)
                marks.append(RequestMark(request_id, "resumed", began_s))
            if is_prefill:
                marks.append(RequestMark(request_id, "prefill", began_s, num_tokens=num_tokens))
        return tuple(marks)
