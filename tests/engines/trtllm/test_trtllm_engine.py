"""`TrtLlmEngine` on one rank: what it refuses to load, and tokens that show that every step reads
and writes the right K and V. What any engine promises is in the contract suite."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.manifest import read_manifest, write_manifest
from engines.trtllm.engine import TrtLlmEngine
from orchestrator.core.errors import (
    ConfigError,
    EngineDirectoryError,
    EngineError,
    EngineStepError,
)
from tests.engines.copies import slow_copies
from tests.engines.step_driver import StepDriver, random_requests
from tests.engines.trtllm.fake_engines import fake_engine, make_options, sign, write_engine
from tests.factories import make_request
from tests.trtllm.engine_spec import EngineSpec, engine_bytes
from tests.trtllm.fake_model import FakeModel
from tests.trtllm.reference_engine import fake_spec

pytestmark = pytest.mark.usefixtures("stand_ins")

NUM_TOKENS = 9


def expected_tokens(spec: EngineSpec, driver: StepDriver) -> dict[str, list[int]]:
    """Return what the fake model makes of each request, without any pool."""
    model = FakeModel(spec)
    return {
        name: model.tokens(request.spec.prompt_token_ids, request.spec.sampling.max_tokens)
        for name, request in driver.requests.items()
    }


def live(driver: StepDriver, draw: random.Random, seen: Counter[str]) -> None:
    """Run all requests to their end, in random chunks; now and then, move one to the host while
    the others go on, and back, or make it start again."""
    block_size_tokens = driver.engine.capabilities.block_size_tokens
    while names := driver.unfinished():
        name, dice = draw.choice(names), draw.random()
        request = driver.requests[name]
        others = {other: draw.randint(1, 5) for other in names if other != name}
        if dice < 0.1 and request.num_computed_tokens >= block_size_tokens:
            transfer = driver.offload(name)
            output = driver.step(others, transfers=[transfer])
            while transfer.transfer_id not in output.completed_transfers:
                output = driver.step({})
            driver.preempt(name)
            driver.step({other: 1 for other in others if other in driver.unfinished()})
            transfer = driver.onboard(name)
            seen["moved"] += 1
            seen["decoded at once"] += request.num_uncomputed_tokens == 1
            driver.step({name: draw.randint(1, 9)}, transfers=[transfer])
        elif dice < 0.2:
            driver.preempt(name)
            seen["computed again"] += 1
        else:
            chosen = draw.sample(names, draw.randint(1, len(names)))
            driver.step({each: draw.choice([1, 1, 2, 5, 20]) for each in chosen})


def test_tokens_come_from_the_whole_context_whatever_happens(tmp_path: Path) -> None:
    """Over engines of random geometry; the fake model's tokens hash all K and V of a sequence."""
    seen: Counter[str] = Counter()

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def run(seed: int) -> None:
        draw = random.Random(seed)
        spec = fake_spec(
            num_layers=draw.randint(1, 4),
            num_kv_heads_per_rank=draw.randint(1, 3),
            head_size=draw.choice([4, 8]),
            vocab_size=draw.choice([97, 130]),
            tokens_per_block=draw.choice([1, 2, 4, 16]),
            max_seq_len=draw.choice([64, 77]),
            dtype=draw.choice(["float32", "bfloat16", "float16"]),
        )
        engine = fake_engine(
            Path(tempfile.mkdtemp(dir=tmp_path)),
            spec,
            copy_blocks=slow_copies,
            num_device_blocks=512,
            num_host_blocks=2000,
            max_model_len=60,
        )
        lengths = draw.sample(range(1, 40), draw.randint(1, 6))
        driver = StepDriver(engine, *random_requests(*lengths, max_tokens=NUM_TOKENS))
        live(driver, draw, seen)
        engine.close()

        assert driver.outputs() == expected_tokens(spec, driver)

    run()

    # All of it must have happened for the test to mean anything.
    assert all(seen[what] for what in ("moved", "decoded at once", "computed again"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_are_read_in_the_type_that_the_engine_writes(tmp_path: Path, dtype: str) -> None:
    spec = replace(fake_spec(), logits_dtype=dtype)
    engine = fake_engine(tmp_path, spec)
    driver = StepDriver(engine, *random_requests(5, 18, max_tokens=NUM_TOKENS))

    assert driver.run(chunk_tokens=7) == expected_tokens(spec, driver)
    engine.close()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantised_kv_cache_has_one_byte_per_number(tmp_path: Path, kv_cache_dtype: str) -> None:
    spec = replace(fake_spec(), kv_cache_dtype=kv_cache_dtype)
    engine_dir = write_engine(tmp_path, spec)
    config = (engine_dir / "config.json").read_text()
    (engine_dir / "config.json").write_text(
        config.replace('"quant_algo": null', '"quant_algo": "FP8"').replace(
            '"use_fp8_context_fmha": false', '"use_fp8_context_fmha": true'
        )
    )
    sign(engine_dir)
    engine = TrtLlmEngine(engine_dir, make_options())
    driver = StepDriver(engine, *random_requests(5, 18, max_tokens=NUM_TOKENS))

    assert driver.run(chunk_tokens=7) == expected_tokens(spec, driver)
    engine.close()


def test_a_step_of_the_largest_size_is_computed(tmp_path: Path) -> None:
    """16 requests of 16 tokens, and one request of 256 tokens, are all that the engine takes."""
    spec = fake_spec()
    engine = fake_engine(tmp_path, spec)
    for num_requests, length in ((16, 16), (1, 256)):
        prompts = [
            [(index + place) % 97 for place in range(length)] for index in range(num_requests)
        ]
        requests = [
            make_request(f"{length}-{index}", prompt_token_ids=prompt, max_tokens=1)
            for index, prompt in enumerate(prompts)
        ]
        driver = StepDriver(engine, *requests)

        output = driver.step(dict.fromkeys(driver.requests, length))

        assert dict(output.new_token_ids) == {
            name: tuple(tokens) for name, tokens in expected_tokens(spec, driver).items()
        }
    engine.close()


def test_shapes_are_set_only_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 4 and 4 tokens, then three equal decodes of both, then one of one request."""
    from tensorrt_llm.runtime import Session

    set_shapes = []
    infer_shapes = Session.infer_shapes

    def noted(self: Session, inputs: Any) -> Any:
        set_shapes.append({tensor.name: tensor.shape for tensor in inputs}["input_ids"])
        return infer_shapes(self, inputs)

    monkeypatch.setattr(Session, "infer_shapes", noted)
    engine = fake_engine(tmp_path)
    driver = StepDriver(engine, *random_requests(3, 4))

    for counts in ({"3": 4, "4": 4}, *[{"3": 1, "4": 1}] * 3, {"4": 1}):
        driver.step(counts)

    assert set_shapes == [(7,), (2,), (1,)]
    engine.close()


# --- steps that fail ------------------------------------------------------------------------


def test_a_step_that_tensorrt_does_not_start_fails_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorrt_llm.runtime import Session

    spec = fake_spec()
    engine = fake_engine(tmp_path, spec)
    driver = StepDriver(engine, *random_requests(5, 9, max_tokens=NUM_TOKENS))
    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", lambda *_: False)
        with pytest.raises(EngineStepError, match="TensorRT did not start the step") as caught:
            driver.step({"5": 5, "9": 9})

    assert caught.value.request_ids == ("5", "9")
    assert driver.run(chunk_tokens=4) == expected_tokens(spec, driver)
    engine.close()


def test_a_step_beyond_the_optimization_profile_fails_and_the_next_one_runs(
    tmp_path: Path,
) -> None:
    """`config.json` says 256 tokens a step, the engine was built for 8."""
    engine_dir = write_engine(tmp_path)
    spec = replace(fake_spec(), max_num_tokens=8)
    (engine_dir / "rank0.engine").write_bytes(engine_bytes(spec))
    sign(engine_dir)
    engine = TrtLlmEngine(engine_dir, make_options())
    driver = StepDriver(engine, *random_requests(9, max_tokens=NUM_TOKENS))

    with pytest.raises(EngineStepError, match=r"input_ids cannot have shape \(9,\)"):
        driver.step({"9": 9})

    assert driver.run(chunk_tokens=8) == expected_tokens(spec, driver)
    engine.close()


# --- engines and options that are refused ---------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_num_batched_tokens": 257}, "max_num_batched_tokens is 257, .* max_num_tokens 256"),
        ({"max_num_seqs": 17}, "max_num_seqs is 17, .* max_batch_size 16"),
        ({"max_model_len": 257}, "max_model_len is 257, .* max_seq_len 256"),
    ],
)
def test_options_beyond_the_engine_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        fake_engine(tmp_path, **options)


def test_more_blocks_than_offsets_can_tell_apart_are_refused_before_any_memory_is_taken(
    tmp_path: Path,
) -> None:
    """3 layers take 6 offsets a block: 2**31 // 6 = 357,913,941."""
    message = "357,913,942 KV blocks are more than the 357,913,941"
    with pytest.raises(EngineError, match=message):
        fake_engine(tmp_path, num_device_blocks=357_913_942)


def test_more_blocks_than_there_is_memory_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"KV blocks of 1,536 bytes .* lower device_kv_bytes or"):
        fake_engine(tmp_path, num_device_blocks=357_913_941)


def test_an_engine_of_several_ranks_is_not_run_by_one_process(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"built for 2 ranks .* this process is one of 1"):
        fake_engine(tmp_path, fake_spec(tp_size=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="sees 0 CUDA devices"):
        fake_engine(tmp_path, device="cuda")


def test_an_altered_engine_is_refused(tmp_path: Path) -> None:
    engine_dir = write_engine(tmp_path)
    content = bytearray((engine_dir / "rank0.engine").read_bytes())
    content[-1] ^= 1
    (engine_dir / "rank0.engine").write_bytes(content)

    with pytest.raises(EngineDirectoryError, match=r"rank0\.engine: was altered"):
        TrtLlmEngine(engine_dir, make_options())


def test_what_tensorrt_cannot_read_is_refused_with_the_likely_reasons(tmp_path: Path) -> None:
    engine_dir = write_engine(tmp_path)
    (engine_dir / "rank0.engine").write_bytes(b"an engine for another GPU")
    sign(engine_dir)

    with pytest.raises(EngineDirectoryError, match=r"rank0\.engine: TensorRT cannot load .*GPU"):
        TrtLlmEngine(engine_dir, make_options())


def test_an_engine_with_other_inputs_than_its_configuration_says_is_refused(
    tmp_path: Path,
) -> None:
    engine_dir = write_engine(tmp_path)
    (engine_dir / "rank0.engine").write_bytes(engine_bytes(fake_spec(num_layers=4)))
    sign(engine_dir)

    with pytest.raises(EngineDirectoryError, match=r"host_kv_cache_pool_mapping' has shape \(4, 2"):
        TrtLlmEngine(engine_dir, make_options())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size_tokens": 8}, "manifest says block_size_tokens 8, .* with 4"),
        ({"vocab_size": 511}, "manifest says vocab_size 511, .* with 512"),
    ],
)
def test_a_manifest_of_another_engine_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    engine_dir = write_engine(tmp_path)
    write_manifest(engine_dir, replace(read_manifest(engine_dir), **change))

    with pytest.raises(EngineDirectoryError, match=words):
        TrtLlmEngine(engine_dir, make_options())


def test_an_engine_that_is_being_built_runs_without_a_manifest(tmp_path: Path) -> None:
    engine_dir = write_engine(tmp_path)
    (engine_dir / "manifest.json").unlink()

    TrtLlmEngine(engine_dir, make_options(), has_manifest=False).close()
    with pytest.raises(EngineDirectoryError, match=r"manifest\.json: is missing"):
        TrtLlmEngine(engine_dir, make_options())


@pytest.mark.parametrize(
    ("where", "name", "value", "words"),
    [
        ("tensorrt.ICudaEngine", "num_optimization_profiles", 2, "has 2 optimization profiles"),
        ("tensorrt_llm.runtime.Session", "context", None, "streams its weights"),
    ],
)
def test_an_engine_that_cannot_be_stepped_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    name: str,
    value: object,
    words: str,
) -> None:
    import tensorrt_llm.runtime  # noqa: F401 - so that it can be patched by its name

    monkeypatch.setattr(f"{where}.{name}", property(lambda _: value))

    with pytest.raises(EngineDirectoryError, match=words):
        fake_engine(tmp_path)
