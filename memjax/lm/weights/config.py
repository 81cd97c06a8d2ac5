"""Somebody else's config.json, whose errors name the file and the field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from memjax.catalog import CATALOG
from memjax.errors import CheckpointError, ConfigError, shorten
from memjax.memory import Memory

REQUIRED = object()
MOST = 2**31 - 1  # of any size: what is larger is no size, and its bytes could not be counted


class Config:
    """The fields of a config.json."""

    def __init__(self, file: Path):
        self.file = file
        try:
            self.values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}, needs the folder of a model") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not JSON, or truncated: {shorten(error)}") from None
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{file}: is a {type(self.values).__name__}, needs an object")

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """A field; ConfigError where it is missing and has no default."""
        if name not in self.values and default is REQUIRED:
            raise ConfigError(f"{self.file}: has no field {name!r}")
        return self.values.get(name, default)

    def whole(self, name: str, default: Any = REQUIRED, most: int = MOST) -> int:
        """A whole number of at least 1."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.error(name, f"a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A number above 0."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(name, "a number above 0")
        return float(value)

    def only(self, **read: tuple[Any, ...]) -> None:
        """ConfigError where a field has another value than those that are read; the first is that of a missing one."""
        for name, values in read.items():
            if self.get(name, values[0]) not in values:
                raise self.error(name, " or ".join(map(repr, values)))

    def error(self, name: str, needs: str) -> ConfigError:
        """That a field is not what is read."""
        return ConfigError(f"{self.file}: field {name!r} is {shorten(repr(self.values.get(name)))}, needs {needs}")

    def build(self, memory: str, **fields: Any) -> Memory:
        """A memory of the catalog; JSON writes 1.0 as 1, so a whole number becomes a float where one is declared."""
        cls = CATALOG[memory].cls
        floats = {f.name for f in dataclasses.fields(cls) if f.type in ("float", "float | None")}
        fields = {n: float(v) if n in floats and type(v) is int else v for n, v in fields.items()}
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.file}: {shorten(error)}") from error
