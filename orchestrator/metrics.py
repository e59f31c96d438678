"""A node's Prometheus metrics, all declared here."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from orchestrator.core.ports import EngineCapabilities, SchedulerLoad
from orchestrator.core.request import FinishReason
from orchestrator.wire import LoadReport, StepReport

_STEP_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SCHEDULE_BUCKETS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_ERROR_BUCKETS = (-0.5, -0.2, -0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class NodeMetrics:
    """Counts what the executor process reports."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        requests = Counter(
            "proserve_node_requests_total",
            "Requests that ended, by finish reason.",
            ["finish_reason"],
            registry=registry,
        )
        self._requests = {reason: requests.labels(reason.value) for reason in FinishReason}
        self._class_requests = Counter(
            "proserve_node_class_requests_total",
            "Requests of each priority class that ended, by finish reason.",
            ["priority_class", "finish_reason"],
            registry=registry,
        )
        running = Gauge(
            "proserve_node_open_requests",
            "Requests on the node, by state: running ones hold KV blocks.",
            ["state"],
            registry=registry,
        )
        self._running, self._waiting = running.labels("running"), running.labels("waiting")
        self._kv = KVMetrics(registry)
        tokens = Counter(
            "proserve_node_tokens_total",
            "Tokens computed, by kind of work.",
            ["work"],
            registry=registry,
        )
        self._prefill_tokens = tokens.labels("prefill")
        self._decode_tokens = tokens.labels("decode")
        self._preemptions = Counter(
            "proserve_node_preemptions_total",
            "Requests that lost their KV blocks to another.",
            registry=registry,
        )
        self._skips = Counter(
            "proserve_node_skips_total",
            "Requests passed over in a step because they did not fit.",
            registry=registry,
        )
        self._declare_step_metrics()
        side = Gauge(
            "proserve_node_boundary_requests",
            "Requests on either side of the sliding boundary in the last step.",
            ["side"],
            registry=registry,
        )
        self._urgent, self._normal = side.labels("urgent"), side.labels("normal")
        self.registered = Gauge(
            "proserve_node_registered",
            "1 while the node is registered at a router, or in etcd.",
            ["router"],
            registry=registry,
        ).labels

    def _declare_step_metrics(self) -> None:
        registry = self.registry
        self._step_s = Histogram(
            "proserve_node_step_seconds",
            "Measured duration of a step.",
            registry=registry,
            buckets=_STEP_BUCKETS_S,
        )
        self._predicted_s = Counter(
            "proserve_node_step_predicted_seconds_total",
            "Predicted duration of the steps that were measured.",
            registry=registry,
        )
        self._step_error = Histogram(
            "proserve_node_step_prediction_error_ratio",
            "Signed relative error of the predicted step duration: (predicted - measured) / "
            "measured.",
            registry=registry,
            buckets=_ERROR_BUCKETS,
        )
        self._overrun = Gauge(
            "proserve_node_step_overrun_ratio",
            "Quantiles of (measured - predicted) / predicted step duration over the last steps "
            "of a batch class: positive where steps took longer than predicted.",
            ["class", "quantile"],
            registry=registry,
        )
        self._schedule_s = Histogram(
            "proserve_node_schedule_seconds",
            "Time a step spends on planning and accounting.",
            registry=registry,
            buckets=_SCHEDULE_BUCKETS_S,
        )
        self._exposed_s = Histogram(
            "proserve_node_exposed_seconds",
            "Time before a step in which the engine had nothing to run although there was work.",
            registry=registry,
            buckets=_SCHEDULE_BUCKETS_S,
        )

    def request_ended(self, reason: FinishReason, *, priority_class: str) -> None:
        """Count a request's end."""
        self._requests[reason].inc()
        self._class_requests.labels(priority_class, reason.value).inc()

    def step_done(self, report: StepReport) -> None:
        """Count a step."""
        self._prefill_tokens.inc(report.num_prefill_tokens)
        self._decode_tokens.inc(report.num_decode_tokens)
        self._preemptions.inc(report.num_preempted)
        self._skips.inc(report.num_skipped)
        self._kv.step_done(report)
        if report.schedule_s is not None:
            self._schedule_s.observe(report.schedule_s)
        if report.exposed_s is not None:
            self._exposed_s.observe(report.exposed_s)
        self._urgent.set(report.num_urgent)
        self._normal.set(report.num_normal)
        for errors in report.errors:
            for name, value in (("0.5", errors.p50), ("0.9", errors.p90), ("0.99", errors.p99)):
                self._overrun.labels(errors.batch_class.value, name).set(value)
        if report.step_s > 0:  # 0: the step failed and was not measured
            self._step_s.observe(report.step_s)
            if report.predicted_step_s is not None:
                self._predicted_s.inc(report.predicted_step_s)
                self._step_error.observe((report.predicted_step_s - report.step_s) / report.step_s)

    def render(
        self, load: LoadReport | None, capabilities: EngineCapabilities | None = None
    ) -> bytes:
        """Return the Prometheus text, with the gauges of `load` and the size of the cache; either
        is None while the engine has not told it."""
        if capabilities is not None:
            self._kv.describe(capabilities)
        if load is not None:
            now = load.load
            self._running.set(now.num_running)
            self._waiting.set(now.num_waiting)
            self._kv.show(now)
        return generate_latest(self.registry)


class KVMetrics:
    """What becomes of the KV cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        blocks = Gauge(
            "proserve_node_kv_blocks",
            "KV cache blocks, by place and state.",
            ["place", "state"],
            registry=registry,
        )
        # The same names as the fields of KVBlockCounts.
        self._blocks = {
            f"{place}_{state}": blocks.labels(place, state)
            for place, state in (
                ("device", "free"), ("device", "cached"), ("device", "used"),
                ("host", "free"), ("host", "cached"),
                ("copying", "out"), ("copying", "in"),
            )
        }  # fmt: skip
        self._usage = Gauge(
            "proserve_node_kv_usage_fraction",
            "KV cache blocks of the device that a new request could not have, of all; 0 to 1.",
            registry=registry,
        )
        self._pool = Info(
            "proserve_node_kv_cache",
            "Size of the device's KV cache; block_size is in tokens.",
            registry=registry,
        )
        copied = Counter(
            "proserve_node_kv_copied_bytes_total",
            "KV cache copied, by direction: offload is to the host, onboard is back.",
            ["direction"],
            registry=registry,
        )
        self._offloaded, self._onboarded = copied.labels("offload"), copied.labels("onboard")
        copy_s = Counter(
            "proserve_node_kv_copy_seconds_total",
            "Time that KV copies took: exposed is what steps waited for them, hidden the rest.",
            ["exposure"],
            registry=registry,
        )
        self._hidden_s, self._exposed_s = copy_s.labels("hidden"), copy_s.labels("exposed")
        found = Counter(
            "proserve_node_kv_tokens_total",
            "Tokens whose KV was known, by what became of it: shared with requests that begin "
            "alike, kept for a preempted request, or lost and computed again.",
            ["outcome"],
            registry=registry,
        )
        self._shared_tokens, self._kept_tokens = found.labels("shared"), found.labels("kept")
        self._lost_tokens = found.labels("lost")

    def step_done(self, report: StepReport) -> None:
        """Count a step."""
        self._shared_tokens.inc(report.num_prefix_tokens)
        self._kept_tokens.inc(report.num_kept_tokens)
        self._lost_tokens.inc(report.num_recomputed_tokens)
        copies = report.copies
        self._offloaded.inc(copies.offloaded_bytes)
        self._onboarded.inc(copies.onboarded_bytes)
        self._exposed_s.inc(copies.exposed_s)
        self._hidden_s.inc(max(0.0, copies.copy_s - copies.exposed_s))

    def describe(self, capabilities: EngineCapabilities) -> None:
        """Tell the size of the cache, under the labels that endpoint pickers look for."""
        self._pool.info(
            {
                "block_size": str(capabilities.block_size_tokens),
                "num_gpu_blocks": str(capabilities.num_device_blocks),
            }
        )

    def show(self, load: SchedulerLoad) -> None:
        """Set the gauges."""
        for name, gauge in self._blocks.items():
            gauge.set(getattr(load.kv_blocks, name))
        if load.num_device_blocks > 0:
            self._usage.set(1 - load.num_free_device_blocks / load.num_device_blocks)
