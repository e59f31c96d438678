"""JSON Schemas of the configuration files, for editors: configs/schemas holds them.

for kind in deployment node router clients engine simulation; do
    proserve config schema $kind > configs/schemas/$kind.json
done
"""

from __future__ import annotations

import json
from functools import reduce
from operator import or_
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from orchestrator.command_line.config_kinds import KINDS, known_kind


class _SchemaOfFiles(GenerateJsonSchema):
    """Leaves out titles that only repeat keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_of(kind: str) -> str:
    """Return the JSON Schema of a kind of file, as text.

    Raises:
        ConfigError: there is no such kind.
    """
    models: Any = reduce(or_, KINDS[known_kind(kind)])
    schema = TypeAdapter(models).json_schema(schema_generator=_SchemaOfFiles)
    head = {"$schema": _SchemaOfFiles.schema_dialect, "title": f"ProServe {kind} file"}
    return json.dumps(schema | head, indent=2) + "\n"
