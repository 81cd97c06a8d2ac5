"""Where numbers of a run go: anything with `write(step, values)`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Writer(Protocol):
    """Takes the metrics of a step. A service's own logger is one method away from being a Writer."""

    def write(self, step: int, values: dict[str, float | int]) -> None: ...


class MultiWriter:
    """Hands everything to several writers, in order."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = tuple(writers)

    def write(self, step: int, values: dict[str, float | int]) -> None:
        for writer in self.writers:
            writer.write(step, values)


class JSONLWriter:
    """One JSON object a line, {"step": 10, "loss": 2.5, ...}, appended and flushed at once.

    A run that was killed has written lines beyond the checkpoint it resumes from. The first write of step s therefore
    drops the lines of step s and later (and a line that was cut in two), so that the file has each step once.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._opened = False

    def write(self, step: int, values: dict[str, float | int]) -> None:
        try:
            if not self._opened:
                self._drop_from(step)
                self._opened = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:  # a full disk is reported without the name of the file
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _drop_from(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        old = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in old if (at := _step(line)) is not None and at < step]
        if kept != old:
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self.path)


def _step(line: str) -> int | None:
    """The step of a line; None where the line is not whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None
