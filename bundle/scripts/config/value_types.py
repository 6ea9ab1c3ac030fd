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


class LengthsToo:
    """Annotation of the type of a patch: voxels per axis, or lengths with a unit, one per axis or one for all."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return a schema that checks lengths here and leaves voxels to pydantic."""
        from pydantic_core import PydanticCustomError
        from pydantic_core.core_schema import no_info_wrap_validator_function

        from volumen.data.space.units import parse_length

        def check(value: Any, check_voxels: Any) -> Any:
            entries = list(value) if isinstance(value, list | tuple) else [value]
            texts = [entry for entry in entries if isinstance(entry, str)]
            for text in texts:
                if parse_length(text) is None:
                    raise PydanticCustomError("length", "a length with its unit, such as 20um or 0.5mm")
            if not texts:
                return check_voxels(value)
            check_voxels([entry for entry in entries if not isinstance(entry, str)])
            return value if isinstance(value, str) else entries

        return no_info_wrap_validator_function(check, handler.generate_schema(PatchSize))


PatchSetting = Annotated[list[Positive | str] | str, LengthsToo()]
AmpMode = Annotated[Literal["auto", "off", "float16", "bfloat16"], FalseMeansOff()]
