from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orchestrator.config import NodeConfig, TrtLlmEngineSection, TrtLlmExecutorConfig
from orchestrator.core.errors import ConfigError
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.scheduler_factory import SCHEDULER_NAMES, make_scheduler
from orchestrator.core.slide_batching import SlideBatchingOptions
from orchestrator.core.slo import DeadlineAnchor
from orchestrator.yaml_config import load_yaml_model
from tests.factories import make_capabilities, make_profile

NODE = """\
endpoint_id: node-0
port: 8101
engine: {directory: built_engines/some, device_kv_bytes: 64MiB}
"""


def load(directory: Path, text: str) -> NodeConfig:
    path = directory / "node.yaml"
    path.write_text(text)
    return load_yaml_model(path, NodeConfig)


def test_a_short_file_gets_the_recommended_scheduler(tmp_path: Path) -> None:
    config = load(tmp_path, NODE)

    assert config.scheduler == "slide-batching"
    assert config.scheduler_options() is None
    assert config.engine.device_kv_bytes == 64 * 1024**2
    assert config.engine.host_kv_bytes == 0


def test_a_cuda_device_needs_no_size(tmp_path: Path) -> None:
    text = NODE.replace("device_kv_bytes: 64MiB", "device: cuda, device_memory_fraction: 0.8")

    config = load(tmp_path, text)

    assert config.engine.device_kv_bytes is None
    assert config.engine.device_memory_fraction == 0.8


@pytest.mark.parametrize(
    ("device", "line", "expected"),
    [
        ("cpu", "", False),
        ("cuda", "", True),
        ("cpu", "plan_ahead: true\n", True),
        ("cuda", "plan_ahead: false\n", False),
    ],
)
def test_steps_are_planned_ahead_on_a_gpu_or_where_it_is_said(
    tmp_path: Path, device: str, line: str, *, expected: bool
) -> None:
    config = load(tmp_path, NODE.replace("64MiB", f"64MiB, device: {device}") + line)

    assert config.plans_ahead() is expected


@pytest.mark.parametrize("memory", ["device_kv_bytes: 64MiB", "device: cuda"])
def test_a_node_that_is_written_out_with_its_defaults_is_the_same(
    tmp_path: Path, memory: str
) -> None:
    """`proserve serve` hands nodes to their processes that way."""
    config = load(tmp_path, NODE.replace("device_kv_bytes: 64MiB", memory))

    assert load(tmp_path, yaml.safe_dump(config.model_dump(mode="json"))) == config


def test_scheduler_parameters_are_read(tmp_path: Path) -> None:
    config = load(tmp_path, NODE + "slide_batching: {alpha: 0.8, anchor: fixed}\n")

    options = config.scheduler_options()
    assert isinstance(options, SlideBatchingOptions)
    assert options.alpha == 0.8
    assert options.anchor is DeadlineAnchor.FIXED


SECTIONS = {"slide-batching": "slide_batching", "fcfs": None, "vllm-fcfs": None}
SECTIONS |= dict.fromkeys(
    ["sarathi-fcfs", "sarathi-priority", "weighted-vtc", "strict-priority"], "sarathi"
)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_every_scheduler_can_be_named_with_its_section(tmp_path: Path, name: str) -> None:
    section = SECTIONS.get(name, "deadline")
    text = (
        NODE + f"scheduler: {name}\n" + (f"{section}: {{token_budget: 300}}\n" if section else "")
    )

    config = load(tmp_path, text)

    make_scheduler(
        config.scheduler,
        config.scheduler_options(),
        make_capabilities(),
        BatchLatencyModel(make_profile()),
    )
    assert config.scheduler == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NODE.replace("port:", "prot:"), "did you mean 'port'"),
        (NODE + "slide_batching: {alfa: 1}\n", "did you mean 'alpha'"),
        (NODE + "slide_batching: {alpha: -1}\n", "alpha is -1"),
        (NODE + "latency_correction: {momentum: 1}\n", "momentum is 1"),
        (NODE + "scheduler: fastest\n", "slide-batching"),
        (NODE + "scheduler: edf\nslide_batching: {}\n", "edf does not read it"),
        (NODE + "scheduler: slide-batching\ndeadline: {}\n", "does not read it"),
        (NODE.replace("64MiB", "0"), "device_kv_bytes"),
        (NODE.replace(", device_kv_bytes: 64MiB", ""), "write one, such as 1GiB"),
        (NODE.replace("64MiB", "64MiB, host_kv_bytes: -1"), "host_kv_bytes"),
        (NODE.replace("64MiB", "64MiB, device_memory_fraction: 1.1"), "less than or equal to 1"),
        (NODE.replace("node-0", "Node 0"), "endpoint_id"),
        (NODE.replace("8101", "99999"), "65535"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"node\.yaml") as caught:
        load(tmp_path, text)

    assert words in str(caught.value)


def test_mistakes_between_keys_are_reported_together_each_at_its_key(tmp_path: Path) -> None:
    text = NODE + "scheduler: fcfs\nslide_batching: {}\nsarathi: {token_budget: 300}\n"

    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)

    problems = [line.partition("node.yaml:")[2] for line in str(caught.value).splitlines()]
    assert problems == [
        "5:1: slide_batching: slide_batching is set, but scheduler fcfs does not read it",
        "6:1: sarathi: sarathi is set, but scheduler fcfs does not read it",
    ]


TRTLLM_NODE = NODE.replace("{directory", "{kind: trtllm, directory")


def test_a_prebuilt_tensorrt_llm_engine_can_be_chosen(tmp_path: Path) -> None:
    config = load(tmp_path, TRTLLM_NODE)

    assert isinstance(config.engine, TrtLlmEngineSection)
    assert config.engine.device == "cuda"
    assert config.engine.device_kv_bytes == 64 * 1024**2
    assert load(tmp_path, yaml.safe_dump(config.model_dump(mode="json"))) == config


def test_a_share_of_the_device_is_the_default_of_cuda_alone(tmp_path: Path) -> None:
    text = TRTLLM_NODE.replace(", device_kv_bytes: 64MiB", "")

    assert load(tmp_path, text).engine.device_memory_fraction == 0.9
    with pytest.raises(ConfigError, match="device_kv_bytes is not set; with device cpu it is req"):
        load(tmp_path, text.replace("}", ", device: cpu}"))


EXECUTOR_NODE = NODE.replace("{directory", "{kind: trtllm-executor, directory")


def test_the_engine_of_tensorrt_llm_s_own_scheduler_can_be_chosen(tmp_path: Path) -> None:
    config = load(tmp_path, EXECUTOR_NODE)

    assert isinstance(config.engine, TrtLlmExecutorConfig)
    assert config.engine.device == "cuda"
    assert config.engine.capacity_policy == "max-utilization"
    assert load(tmp_path, yaml.safe_dump(config.model_dump(mode="json"))) == config


def test_an_unknown_kind_of_engine_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3:1: engine: kind must be torch, trtllm or trtllm-"):
        load(tmp_path, NODE.replace("{directory", "{kind: tensorrt, directory"))


@pytest.mark.parametrize("node", [EXECUTOR_NODE, TRTLLM_NODE])
def test_a_key_of_another_kind_of_engine_is_refused(tmp_path: Path, node: str) -> None:
    with pytest.raises(ConfigError, match=r"3:\d+: engine\.num_threads: unknown key 'num_threads'"):
        load(tmp_path, node.replace("}", ", num_threads: 2}"))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("scheduler: fcfs", "scheduler"),
        ("slide_batching: {alpha: 0.8}", "slide_batching"),
        ("kv_cache: {prefix_caching: false}", "kv_cache"),
        ("latency_correction: {momentum: 0.8}", "latency_correction"),
        ("plan_ahead: true", "plan_ahead"),
    ],
)
def test_an_engine_that_schedules_by_itself_takes_no_part_of_a_scheduler(
    tmp_path: Path, line: str, name: str
) -> None:
    message = f"{name} is set, but engine kind trtllm-executor schedules by itself; leave it out"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, EXECUTOR_NODE + f"{line}\n")


def test_host_blocks_that_nobody_could_use_again_are_refused(tmp_path: Path) -> None:
    text = EXECUTOR_NODE.replace("}", ", host_kv_bytes: 1GiB, block_reuse: false}")

    with pytest.raises(ConfigError, match=r"block_reuse is false.*set block_reuse, or leave"):
        load(tmp_path, text)


REGISTRATION = "registration: {router_urls: [http://router:8000], secret_file: secret"


@pytest.mark.parametrize(
    ("host", "more", "url"),
    [
        ("10.0.0.7", "}", "http://10.0.0.7:8101"),
        ("'fd00::7'", "}", "http://[fd00::7]:8101"),
        ("0.0.0.0", ", advertise_url: http://gpu-7:8101/}", "http://gpu-7:8101"),
    ],
)
def test_a_node_is_advertised_where_it_listens_or_where_it_says(
    tmp_path: Path, host: str, more: str, url: str
) -> None:
    config = load(tmp_path, f"{NODE}host: {host}\n{REGISTRATION}{more}\n")

    assert config.advertised_url() == url


@pytest.mark.parametrize("host", ["0.0.0.0", "'::'"])
def test_a_node_that_listens_everywhere_has_to_say_where_it_is(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"no address to come to; set registration.advertise_url"):
        load(tmp_path, f"{NODE}host: {host}\n{REGISTRATION}}}\n")
