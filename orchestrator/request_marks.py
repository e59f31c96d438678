"""What happens to single requests in the steps of an executor, for those that are traced."""

from __future__ import annotations

from orchestrator.core.ports import SchedulerOutput
from orchestrator.wire import RequestMark


class RequestMarks:
    """Finds the traced requests in the plans of steps. Costs nothing while there are none."""

    def __init__(self) -> None:
        self._is_preempted: dict[str, bool] = {}
        """Of each traced request that has not ended."""

    def __bool__(self) -> bool:
        return bool(self._is_preempted)

    def follow(self, request_id: str) -> None:
        """A traced request begins."""
        self._is_preempted[request_id] = False

    def forget(self, request_id: str) -> None:
        """A request, traced or not, has ended."""
        self._is_preempted.pop(request_id, None)

    def of_step(self, plan: SchedulerOutput, began_s: float) -> tuple[RequestMark, ...]:
        """Return what a step that began at that moment did to traced requests that go on.

        Steps that only make a request's next token are left out: there are as many as tokens.
        """
        if not self._is_preempted:
            return ()
        marks = []
        for request_id in plan.preempted_ids:
            if request_id in self._is_preempted:
                self._is_preempted[request_id] = True
                marks.append(RequestMark(request_id, "preempted", began_s))
        for transfer in plan.transfers:
            if transfer.request_id in self._is_preempted:
                num_blocks = len(transfer.device_block_ids)
                name = transfer.direction.value
                marks.append(RequestMark(transfer.request_id, name, began_s, num_blocks=num_blocks))
        for part in plan.scheduled:
            request_id = part.request_id
            if request_id not in self._is_preempted:
                continue
            if self._is_preempted[request_id]:
                self._is_preempted[request_id] = False
                marks.append(RequestMark(request_id, "resumed", began_s))
            num_tokens = part.num_new_tokens
            if num_tokens > 1 or part.num_computed_tokens < part.request.num_prompt_tokens:
                marks.append(RequestMark(request_id, "prefill", began_s, num_tokens=num_tokens))
        return tuple(marks)
