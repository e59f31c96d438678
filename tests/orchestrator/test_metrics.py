from __future__ import annotations

from orchestrator.core.latency_correction import BatchClass, StepErrors
from orchestrator.core.ports import CopyFigures, SchedulerLoad
from orchestrator.metrics import NodeMetrics
from orchestrator.wire import LoadReport, StepReport


def test_error_quantiles_are_exported_for_each_batch_class() -> None:
    load = LoadReport(
        seq_no=1,
        load=SchedulerLoad(
            num_waiting=0,
            num_running=1,
            num_decoding=1,
            num_queued_prompt_tokens=0,
            num_free_device_blocks=9,
            num_device_blocks=10,
        ),
        taken_at_s=0.0,
        num_added=1,
        queue=None,
    )
    metrics = NodeMetrics()

    metrics.step_done(
        StepReport(
            step_id=1,
            step_s=0.02,
            predicted_step_s=0.01,
            schedule_s=0.001,
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
            errors=(StepErrors(BatchClass.DECODE_ONLY, 256, p50=-0.01, p90=0.2, p99=1.5),),
            load=load,
        )
    )

    for quantile, value in (("0.5", -0.01), ("0.9", 0.2), ("0.99", 1.5)):
        labels = {"class": "decode-only", "quantile": quantile}
        assert (
            metrics.registry.get_sample_value("proserve_node_step_overrun_ratio", labels) == value
        )
