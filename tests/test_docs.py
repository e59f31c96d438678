"""The documentation: it builds without a warning, and its generated parts are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.command_line.reference import cli_reference, metrics_reference

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REMAKE = "python -m orchestrator.command_line.reference"


def build(site: Path, *, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    result = build(tmp_path / "site")

    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site" / "quickstart" / "index.html").exists()


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[there](nowhere.md) and [here](#no-such-place)\n")
    settings = (ROOT / "mkdocs.yml").read_text().partition("nav:\n  - Start")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)

    result = build(tmp_path / "site", root=tmp_path)

    assert result.returncode != 0
    assert "nowhere.md" in result.stderr
    assert "no-such-place" in result.stderr


@pytest.mark.parametrize(
    ("name", "expected"), [("cli.md", cli_reference()), ("metrics.md", metrics_reference())]
)
def test_a_generated_page_is_what_the_code_says(name: str, expected: str) -> None:
    assert (DOCS / "reference" / name).read_text() == expected, f"make it anew: {REMAKE}"


def test_links_from_the_readme_into_the_documentation_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()

    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)h][^)]*)\)", readme)]

    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []
