"""What was measured of an engine, between the step that measures and the manifest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from engines.manifest import ProfileConditions
from orchestrator.core.kv_transfer import CopyProfile
from orchestrator.core.latency import LatencyProfile

_FILE = "profile.json"


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """How long steps and copies take, and where that was measured."""

    latency: LatencyProfile
    copies: CopyProfile
    conditions: ProfileConditions

    def write(self, folder: Path) -> None:
        """Write it into a folder, which is made."""
        folder.mkdir()
        values = {
            "latency": self.latency.to_dict(),
            "copies": self.copies.to_dict(),
            "conditions": asdict(self.conditions),
        }
        (folder / _FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what `write` has written."""
        values = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return cls(
            latency=LatencyProfile.from_dict(values["latency"]),
            copies=CopyProfile.from_dict(values["copies"]),
            conditions=ProfileConditions(**values["conditions"]),
        )
