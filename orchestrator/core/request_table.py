"""The live requests of a scheduler as columns, so that a step's ranking is a few array operations
however long the queue is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.errors import KVIntegrityError
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.request import Request
from orchestrator.core.slo import DeadlineAnchor, deadline_origin_s

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_COLUMNS = (
    "arrival_s",
    "weight",
    "ttft_s",
    "tpot_s",
    "origin_s",
    "num_output_tokens",
    "num_uncomputed_tokens",
    "num_computed_tokens",
    "num_prompt_tokens",
    "num_blocks",
    "num_restorable_tokens",
    "num_offloaded_blocks",
)


class RequestTable:
    """One row per live request. Rows are dense; removing one moves the last into its place.

    Row numbers hold until the next `add` or `remove`. Columns are float64, (num_rows,).
    """

    def __init__(self, anchor: DeadlineAnchor) -> None:
        """Deadlines of later tokens are counted from `anchor`."""
        self._anchor = anchor
        self._data: Floats = np.zeros((len(_COLUMNS), 64))
        self._row_of: dict[str, int] = {}
        self.requests: list[Request] = []
        """By row."""

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._row_of

    def row_of(self, request_id: str) -> int:
        """Return the row of a live request."""
        return self._row_of[request_id]

    def get(self, request_id: str) -> Request | None:
        """Return a live request; None if there is none of that id."""
        row = self._row_of.get(request_id)
        return None if row is None else self.requests[row]

    def add(self, request: Request) -> None:
        """Append a row."""
        row = len(self.requests)
        if row == self._data.shape[1]:
            self._data = np.concatenate([self._data, np.zeros_like(self._data)], axis=1)
        self._row_of[request.request_id] = row
        self.requests.append(request)
        self.refresh(request)
        self._data[9:, row] = 0

    def remove(self, request: Request) -> None:
        """Drop a row."""
        row = self._row_of.pop(request.request_id)
        last = self.requests.pop()
        if last is not request:
            self.requests[row] = last
            self._row_of[last.request_id] = row
            self._data[:, row] = self._data[:, len(self.requests)]

    def refresh(self, request: Request) -> None:
        """Read a request's progress anew."""
        spec = request.spec
        self._data[:9, self._row_of[request.request_id]] = (
            request.arrival_s,
            spec.weight,
            spec.slo.ttft_s,
            spec.slo.tpot_s,
            deadline_origin_s(
                spec.slo,
                arrival_s=request.arrival_s,
                first_token_s=request.first_token_s,
                anchor=self._anchor,
            ),
            request.num_output_tokens,
            request.num_uncomputed_tokens,
            request.num_computed_tokens,
            request.num_prompt_tokens,
        )

    def advance_decodes(self, request_ids: Sequence[str]) -> None:
        """Account for one computed and one produced token of each of these requests."""
        rows = [self._row_of[request_id] for request_id in request_ids]
        self.num_output_tokens[rows] += 1
        self.num_computed_tokens[rows] += 1

    def check_row(self, row: int, *, num_blocks: int) -> None:
        """Prove that a row says what its request says, which owns that many KV blocks.

        Raises:
            KVIntegrityError: something contradicts.
        """
        request = self.requests[row]
        for what, said, true in (
            ("row", self._row_of.get(request.request_id), row),
            ("blocks", self.num_blocks[row], num_blocks),
            ("output tokens", self.num_output_tokens[row], request.num_output_tokens),
            ("computed tokens", self.num_computed_tokens[row], request.num_computed_tokens),
            ("uncomputed tokens", self.num_uncomputed_tokens[row], request.num_uncomputed_tokens),
        ):
            if said != true:
                raise KVIntegrityError(f"request {request.request_id}: {what} {said}, truly {true}")

    @property
    def arrival_s(self) -> Floats:
        """On the node's clock."""
        return self._column(0)

    @property
    def weight(self) -> Floats:
        """Gain of one output token in time."""
        return self._column(1)

    @property
    def ttft_s(self) -> Floats:
        """Objective for the first token."""
        return self._column(2)

    @property
    def tpot_s(self) -> Floats:
        """Objective for each later token."""
        return self._column(3)

    @property
    def num_output_tokens(self) -> Floats:
        """Tokens produced; a request with any is decoding."""
        return self._column(5)

    @property
    def num_uncomputed_tokens(self) -> Floats:
        """Tokens to compute before the next one can be produced."""
        return self._column(6)

    @property
    def num_computed_tokens(self) -> Floats:
        """Tokens whose KV is on the device."""
        return self._column(7)

    @property
    def num_prompt_tokens(self) -> Floats:
        """Length of the prompt."""
        return self._column(8)

    @property
    def num_blocks(self) -> Floats:
        """KV blocks that the request owns; kept by the scheduler."""
        return self._column(9)

    @property
    def num_restorable_tokens(self) -> Floats:
        """Tokens after the computed ones whose KV is kept somewhere; kept by the KV planner."""
        return self._column(10)

    @property
    def num_offloaded_blocks(self) -> Floats:
        """Leading blocks that are on the host or on their way; kept by the KV planner."""
        return self._column(11)

    @property
    def is_decode_step(self) -> Flags:
        """True where the next piece of work is one token after the last output."""
        has_output: Flags = self.num_output_tokens > 0
        is_one_short: Flags = self.num_uncomputed_tokens == 1
        return has_output & is_one_short

    def work_s(self, model: BatchLatencyModel) -> Floats:
        """Return the predicted cost of everything before each request's next token, if what can
        be restored is (equation 17)."""
        num_uncomputed = self.num_uncomputed_tokens - self.num_restorable_tokens
        is_one_short: Flags = num_uncomputed == 1
        return model.marginal_work_s(
            num_uncomputed,
            self.num_computed_tokens + self.num_restorable_tokens,
            is_decode=is_one_short & (self.num_output_tokens > 0),
        )

    def deadline_s(self) -> Floats:
        """Return when each request's next token is due (equation 16)."""
        num_later = self.num_output_tokens
        later_s = np.zeros(len(self))
        np.multiply(num_later, self.tpot_s, out=later_s, where=num_later > 0)  # no 0 * inf
        return self._column(4) + later_s

    def _column(self, index: int) -> Floats:
        return self._data[index, : len(self.requests)]
