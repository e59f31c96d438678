from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.core.latency_correction import BatchClass, StepErrors
from orchestrator.core.ports import CopyFigures, SchedulerLoad
from orchestrator.core.request import FinishReason
from orchestrator.metrics import NodeMetrics
from orchestrator.wire import LoadReport, StepReport
from tests.factories import make_capabilities

ROUTING_PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


def make_load(*, num_waiting: int = 0, num_free_device_blocks: int = 9) -> LoadReport:
    return LoadReport(
        seq_no=1,
        load=SchedulerLoad(
            num_waiting=num_waiting,
            num_running=1,
            num_decoding=1,
            num_queued_prompt_tokens=0,
            num_free_device_blocks=num_free_device_blocks,
            num_device_blocks=10,
        ),
        taken_at_s=0.0,
        num_added=1,
        queue=None,
    )


def test_error_quantiles_are_exported_for_each_batch_class() -> None:
    metrics = NodeMetrics()

    metrics.step_done(
        StepReport(
            step_id=1,
            step_s=0.02,
            predicted_step_s=0.01,
            schedule_s=0.001,
            exposed_s=0.0005,
            num_scheduled=1,
            num_prefill_tokens=0,
            num_decode_tokens=1,
            num_preempted=0,
            num_skipped=0,
            num_urgent=0,
            num_normal=1,
            num_prefix_tokens=0,
            num_kept_tokens=0,
            num_recomputed_tokens=0,
            copies=CopyFigures(),
            model_s=None,
            errors=(StepErrors(BatchClass.DECODE_ONLY, 256, p50=-0.01, p90=0.2, p99=1.5),),
            load=make_load(),
        )
    )

    for quantile, value in (("0.5", -0.01), ("0.9", 0.2), ("0.99", 1.5)):
        labels = {"class": "decode-only", "quantile": quantile}
        assert (
            metrics.registry.get_sample_value("proserve_node_step_overrun_ratio", labels) == value
        )


def test_a_class_is_counted_by_how_its_requests_ended() -> None:
    metrics = NodeMetrics()

    metrics.request_ended(FinishReason.STOP, priority_class="high")
    metrics.request_ended(FinishReason.STOP, priority_class="low")

    by_class = {
        name: metrics.registry.get_sample_value(
            "proserve_node_class_requests_total", {"priority_class": name, "finish_reason": "stop"}
        )
        for name in ("high", "low", "none")
    }
    assert by_class == {"high": 1, "low": 1, "none": None}
    all_of_them = {"finish_reason": "stop"}
    assert metrics.registry.get_sample_value("proserve_node_requests_total", all_of_them) == 2


def test_an_endpoint_picker_finds_what_the_page_tells_it_to_look_for() -> None:
    """7 of 10 blocks can be had at once, so 0.3 of the cache is in use."""
    (block,) = re.findall(r"```yaml\n(defaultEngine.*?)```", ROUTING_PAGE.read_text(), re.DOTALL)
    (specs,) = yaml.safe_load(block)["engineConfigs"]
    text = NodeMetrics().render(
        make_load(num_waiting=4, num_free_device_blocks=7), make_capabilities(num_device_blocks=10)
    )

    def sample(spec: str) -> tuple[float, dict[str, str]]:
        """Return the value and labels of the one sample that a picker finds."""
        name, _, wanted = specs[spec].removesuffix("}").partition("{")
        labels = dict(part.split("=") for part in wanted.split(",")) if wanted else {}
        (family,) = [f for f in text_string_to_metric_families(text.decode()) if f.name == name]
        assert family.type == "gauge"
        (found,) = [s for s in family.samples if labels.items() <= s.labels.items()]
        return found.value, found.labels

    assert sample("queuedRequestsSpec")[0] == 4
    assert sample("runningRequestsSpec")[0] == 1
    assert sample("kvUsageSpec")[0] == pytest.approx(0.3)
    assert sample("cacheInfoSpec")[1] == {"block_size": "16", "num_gpu_blocks": "10"}
    assert specs["loraSpec"] == ""
