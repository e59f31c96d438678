"""What the bodies that clients send are made of."""

from __future__ import annotations

from typing import NoReturn

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class RefusedUnless:
    """Annotates what is refused with every value but null and the `harmless` ones.

    Those change nothing about the answer, and clients send them without being asked.
    """

    def __init__(self, *harmless: object) -> None:
        self._harmless = harmless

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": [None, *self._harmless], "description": "Other values are refused."}

    def _check(self, value: object) -> object:
        if value is None or any(value == h and type(value) is type(h) for h in self._harmless):
            return value
        raise PydanticCustomError("unsupported_parameter", "is not supported")


class RefusedKind:
    """Annotates the branch of a union that takes what none of the others does, and refuses it."""

    def __init__(self, expected: str) -> None:
        self._expected = expected

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._refuse)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"not": {}}

    def _refuse(self, _: object) -> NoReturn:
        raise PydanticCustomError("wrong_kind", "{expected}", {"expected": self._expected})


def kind_of_text(value: object) -> str:
    """Return the tag of the union branch for a value that may be a string or a list."""
    match value:
        case str():
            return "<text>"
        case list():
            return "<list>"
        case _:
            return "<other>"


class Body(BaseModel):
    """Base of everything a client sends."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
