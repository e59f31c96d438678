"""Stand-ins for `trtllm-build`, the conversion scripts and, where a test says so, our own
measurement: they parse their options as strictly as upstream does, and write files of the same
names and form.

    python -m tests.build_scripts.trtllm.fake_programs PROGRAM OPTIONS...

What else they do is in the folder FAKE_PROGRAMS: `calls` gets a line for each start, and
`behaviour.json` says for a program

    {"fail": "text"}            print it and end with status 3
    {"hang": true}              write the process id into the file `hanging`, and wait for ever
    {"rewrite": {"key": ...}}   of trtllm-build: build with other options than asked for
    {"llama": true}             of trtllm-build: make an engine that the stand-ins can run
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.trtllm.cli_surface import parse
from tests.trtllm.engine_config_json import engine_config_json

CALLS = "calls"
BEHAVIOUR = "behaviour.json"
HANGING = "hanging"
PROFILE = "profile"

_ALGORITHMS = {"fp8": "FP8", "int4_awq": "W4A16_AWQ", "int8": "W8A16", "int4": "W4A16", None: None}


def main() -> None:
    """Run the program that the first argument names."""
    program, *arguments = sys.argv[1:]
    folder = Path(os.environ["FAKE_PROGRAMS"])
    with (folder / CALLS).open("a") as calls:
        calls.write(f"{program}\n")
    sys.stdout.write(f"{program} starts\n")
    behaviour = json.loads((folder / BEHAVIOUR).read_text()).get(program, {})
    if program == PROFILE:
        _write_profile(Path(arguments[1]))
    elif program == "trtllm-build":
        _write_engine(parse(program, arguments), behaviour)
    else:
        _write_checkpoint(parse(program, arguments))
    # After half of the work, as such things happen.
    if behaviour.get("hang"):
        (folder / HANGING).write_text(str(os.getpid()))
        signal.pause()
    if "fail" in behaviour:
        sys.stdout.write(f"{behaviour['fail']}\n")
        sys.exit(3)


def _write_profile(profile_dir: Path) -> None:
    # Imported here, as they take longer than all else that is done.
    from build_scripts.trtllm.profile_file import EngineProfile
    from engines.manifest import ProfileConditions
    from tests.factories import make_copy_profile, make_profile

    conditions = ProfileConditions(
        device="cpu",
        dtype="bfloat16",
        num_threads=1,
        hardware="none",
        torch_version="none",
        num_samples=0,
        mean_absolute_percentage_error=0.0,
        held_out_percentage_error=0.0,
    )
    EngineProfile(make_profile(), make_copy_profile(), conditions).write(profile_dir)


def _write_checkpoint(options: dict[str, Any]) -> None:
    output_dir, model_dir = Path(options["output_dir"]), Path(options["model_dir"])
    output_dir.mkdir()
    model = json.loads((model_dir / "config.json").read_text())
    weights = b"".join(path.read_bytes() for path in sorted(model_dir.glob("*.safetensors")))
    tp_size = options["tp_size"]
    quantization = options.get("qformat", options.get("weight_only_precision"))
    kv_cache = options.get("kv_cache_dtype")
    config = {
        "dtype": options["dtype"],
        "vocab_size": model["vocab_size"],
        "hidden_size": model["hidden_size"],
        "num_hidden_layers": model["num_hidden_layers"],
        "num_attention_heads": model["num_attention_heads"],
        "num_key_value_heads": model["num_key_value_heads"],
        "head_size": model["hidden_size"] // model["num_attention_heads"],
        "max_position_embeddings": model["max_position_embeddings"],
        "hugging_face_config": model,
        "mapping": {"tp_size": tp_size, "world_size": tp_size},
        "quantization": {
            "quant_algo": _ALGORITHMS[quantization],
            "kv_cache_quant_algo": kv_cache and kv_cache.upper(),
        },
    }
    (output_dir / "config.json").write_text(json.dumps(config))
    for rank in range(tp_size):
        (output_dir / f"rank{rank}.safetensors").write_bytes(weights)


def _write_engine(options: dict[str, Any], behaviour: dict[str, Any]) -> None:
    output_dir, checkpoint_dir = Path(options["output_dir"]), Path(options["checkpoint_dir"])
    output_dir.mkdir()
    model = json.loads((checkpoint_dir / "config.json").read_text())
    config = engine_config_json(
        model=model, build=_build_section(options | behaviour.get("rewrite", {}))
    )
    (output_dir / "config.json").write_text(json.dumps(config, indent=4))
    for rank in range(model["mapping"]["tp_size"]):
        weights = checkpoint_dir / f"rank{rank}.safetensors"
        content = weights.read_bytes()[:100]
        if behaviour.get("llama"):
            content = _llama_engine(config, weights)
        (output_dir / f"rank{rank}.engine").write_bytes(content)


def _llama_engine(config: dict[str, Any], weights: Path) -> bytes:
    """Return an engine that the stand-in packages can run; needs torch, which takes seconds."""
    from safetensors.torch import load_file

    from engines.torch_engine.config import LlamaConfig
    from tests.trtllm.engine_spec import engine_bytes
    from tests.trtllm.reference_engine import llama_spec

    model, build = config["pretrained_config"], config["build_config"]
    spec = llama_spec(
        LlamaConfig.from_dict(model["hugging_face_config"]),
        tokens_per_block=build["plugin_config"]["tokens_per_block"],
        max_batch_size=build["max_batch_size"],
        max_num_tokens=build["max_num_tokens"],
        max_seq_len=build["max_seq_len"],
    )
    dtypes = {"dtype": model["dtype"], "kv_cache_dtype": model["dtype"]}
    return engine_bytes(replace(spec, **dtypes), load_file(weights))


def _build_section(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as `config.json` writes them."""
    words = {"enable": True, "disable": False}
    limits = {"max_batch_size", "max_num_tokens", "opt_num_tokens", "max_seq_len", "max_beam_width"}
    others = {"checkpoint_dir", "output_dir", "workers", "kv_cache_type"}
    plugins = options.keys() - limits - others
    return {
        **{name: options[name] for name in sorted(limits & options.keys())},
        "kv_cache_type": options["kv_cache_type"].upper(),
        "plugin_config": {
            name: words.get(options[name], options[name]) for name in sorted(plugins)
        },
    }


if __name__ == "__main__":
    main()
