"""Types of settings with their ranges. The command line reads them, so nothing here imports pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

# pydantic checks these ranges as it does its own.
from annotated_types import Ge, Le

PatchSize = list[Annotated[int, Ge(1)]]
Share = Annotated[float, Ge(0.0), Le(1.0)]
Positive = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Amount = Annotated[float, Ge(0.0)]

NAMES_FILE = "names a file or folder"
"""Annotation of a type: the text names a file or folder and is never evaluated as an expression."""


class FalseMeansOff:
    """Annotation of a type: false means "off", since YAML 1.1 reads a bare `off` as false."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of the type, preceded by the conversion."""
        from pydantic_core.core_schema import no_info_before_validator_function

        return no_info_before_validator_function(
            lambda value: "off" if value is False else value, handler(source)
        )


AmpMode = Annotated[Literal["auto", "off", "float16", "bfloat16"], FalseMeansOff()]
