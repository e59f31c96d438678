from __future__ import annotations

import pytest

from orchestrator.core.admission import check_request, check_resume_point
from orchestrator.core.errors import RequestRejected
from orchestrator.core.request import ResumePoint
from tests.factories import make_capabilities, make_request


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "field", "words"),
    [
        (0, 1, "prompt", "empty"),
        (10, 0, "max_tokens", "max_tokens is 0"),
        (9000, 8, "prompt", "9,000 tokens and max_tokens is 8, the engine takes 8,192"),
        (8000, 193, "max_tokens", "lower max_tokens"),
    ],
)
def test_a_request_over_a_limit_is_refused_with_value_and_limit(
    num_prompt_tokens: int, max_tokens: int, field: str, words: str
) -> None:
    spec = make_request(num_prompt_tokens=num_prompt_tokens, max_tokens=max_tokens).spec

    with pytest.raises(RequestRejected, match=words) as caught:
        check_request(spec, make_capabilities(max_model_len=8192))

    assert caught.value.field == field


@pytest.mark.parametrize("max_tokens", [17, 18])
def test_the_last_token_needs_no_kv(max_tokens: int) -> None:
    """Two blocks of 16 hold the 16 prompt tokens and 16 of 17 output tokens; not 17 of 18."""
    capabilities = make_capabilities(num_device_blocks=2)
    spec = make_request(num_prompt_tokens=16, max_tokens=max_tokens).spec

    if max_tokens == 17:
        check_request(spec, capabilities)
    else:
        with pytest.raises(RequestRejected, match="3 KV blocks, the node has 2"):
            check_request(spec, capabilities)


@pytest.mark.parametrize(
    ("point", "words"),
    [
        (ResumePoint((), 0.1), "has 0 output tokens, it must have at least 1"),
        (ResumePoint((7,) * 8, 0.1), "has 8 output tokens.*fewer than max_tokens, 8"),
        (ResumePoint((7,), -0.1), "ttft_s is -0.1"),
        (ResumePoint((7,), float("nan")), "ttft_s is nan"),
    ],
)
def test_a_point_that_nothing_can_follow_is_refused(point: ResumePoint, words: str) -> None:
    with pytest.raises(RequestRejected, match=words) as caught:
        check_resume_point(make_request(max_tokens=8).spec, point)

    assert caught.value.field == "resume_from"


def test_a_request_may_go_on_from_its_first_to_its_last_token_but_one() -> None:
    for num_delivered in range(1, 8):
        check_resume_point(
            make_request(max_tokens=8).spec, ResumePoint((7,) * num_delivered, ttft_s=0.0)
        )
