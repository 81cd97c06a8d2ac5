"""`memjax export`: a model's decoding step as a program that runs without memjax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from memjax.cli.console import Command, size
from memjax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write one decoding step of a trained model, with its parameters, as a file that runs without memjax."""

    model: Positional[Path]
    """Folder of a run of `memjax train`, finished or not, of a saved model, or of published weights."""
    out: Path
    """The file to write. How to run it: `python -c "help('memjax.lm.export')"`."""
    batch: int = 1
    """Rows that are decoded at once."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = ("cpu", "cuda", "tpu")
    """Where it is to run; none of them has to be here."""

    def run(self) -> None:
        out = self.start()
        for flag, value, wrong in (
            ("--batch", self.batch, self.batch < 1),
            ("--platforms", "empty", not self.platforms),
        ):
            if wrong:
                raise ConfigError(f"{flag} is {value}, needs at least 1")
        from memjax.cli.generate import load
        from memjax.lm.export import save_export

        loaded = load(self.model)
        program = save_export(self.out, loaded.model, loaded.params, self.batch, platforms=self.platforms)
        platforms = ", ".join(self.platforms)
        out.print(
            f"wrote {self.out}, {size(self.out.stat().st_size)}: parameters, and a program of {size(program)}"
            f" for {platforms}",
            soft_wrap=True,
        )
        state = size(loaded.model.state_bytes(self.batch))
        out.print(f"{self.batch} rows, state {state}; token ids as {self.model} has them", style="dim", soft_wrap=True)
