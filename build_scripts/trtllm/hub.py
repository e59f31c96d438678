"""Models on the Hugging Face Hub.

    python -m build_scripts.trtllm.hub Qwen/Qwen2.5-7B-Instruct COMMIT

downloads what a build of that commit reads, into Hugging Face's cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from build_scripts.trtllm.recipe import HubSource
from orchestrator.core.errors import ConfigError, ProServeError
from orchestrator.yaml_config import validate_model

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
"""What a build reads; repositories often hold the weights in other formats too."""


def snapshot_dir(source: HubSource) -> Path:
    """Return where Hugging Face's cache keeps one commit of a repository, there or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = f"models--{source.hub.replace('/', '--')}"
    return Path(HF_HUB_CACHE) / folder / "snapshots" / source.revision


def download(source: HubSource) -> None:
    """Download a model into `snapshot_dir`, or what of it is not there yet.

    The token is that of the environment, `HF_TOKEN`, or of `hf auth login`.

    Raises:
        ConfigError: the Hub cannot be reached or will not give it, with the way out.
    """
    # It takes half a second to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = source.description
    try:
        snapshot_download(source.hub, revision=source.revision, allow_patterns=_PATTERNS)
    except GatedRepoError as error:
        raise ConfigError(
            f"{where}: its owner gives it to those alone who have accepted a licence; do so on "
            f"the page of {source.hub} on the Hub, and set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{where}: the Hub has no such repository, or only for some; correct `source.hub`, "
            "or set HF_TOKEN to a token of an account that may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{where}: the repository has no such commit; correct `source.revision`"
        ) from error
    except LocalEntryNotFoundError as error:
        elsewhere = f"hf download {source.hub} --revision {source.revision} --local-dir DIR"
        raise ConfigError(
            f"{where}: is not, or not whole, in {snapshot_dir(source).parents[2]}, and the Hub "
            f"cannot be reached from here; run `{elsewhere}` on a machine that reaches it, bring "
            "DIR here, and write `source: {path: DIR}` into the recipe"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{where}: the download failed: {error}; run the build again, it goes on where it "
            "stopped"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Download a model from the Hugging Face Hub.")
    parser.add_argument("repository", help="such as Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("revision", help="commit, 40 digits")
    options = parser.parse_args(arguments)
    values = {"hub": options.repository, "revision": options.revision}
    try:
        download(validate_model(values, HubSource, source="command line"))
    except ProServeError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
