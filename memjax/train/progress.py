"""A progress bar for anything long: training, building a bank, a benchmark.

    with Progress(total, "train", unit="step") as bar:
        for batch in batches:
            ...
            bar.update(1, loss=loss, tokens_per_second=rate)

On a terminal it is a bar (rich). Elsewhere (a pipe, a log file, CI) it is plain lines, few enough to keep.
The rate and the time that is left are counted from the first update, whose unit usually waits for a compiler.
"""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Counts `total` units of work; `update(n, **values)` after n more are done.

    Args:
      total: units of work altogether.
      description: what is going on, one or two words.
      unit: name of one unit, for the rate ("step" gives "3.4 step/s").
      done: units that an earlier session did.
      enabled: False shows nothing.
      console: where to write; None: standard output.
      seconds, share: off a terminal, a line at the first update, at the last, and where this time has passed or this
        share of the total is done since the line before.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        unit: str = "it",
        done: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        seconds: float = 10.0,
        share: float = 0.05,
    ):
        self.total, self.description, self.unit, self.done = total, description, unit, done
        self._seconds, self._share = seconds, share
        self._first: tuple[float, int] | None = None  # when the first update came, and `done` after it
        self._values: dict[str, float | int] = {}
        self._console = console or Console()
        self._enabled = enabled
        self._bar = self._make_bar() if enabled and self._console.is_terminal else None
        self._line_at: tuple[float, int] | None = None

    def __enter__(self) -> Progress:
        self._began = time.perf_counter()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()
        elif self._line_at is not None and self._line_at[1] != self.done:
            self._print_line(time.perf_counter())

    def update(self, n: int = 1, **values: float | int) -> None:
        """`n` more units are done; `values` are shown beside the count until newer ones come."""
        now = time.perf_counter()
        self.done += n
        self._values.update(values)
        self._first = self._first or (now, self.done)
        if self._bar:
            self._bar.update(self._task, completed=self.done, values=self._speed(now) + show(self._values))
        elif self._enabled:
            self._update_lines(now)

    def _update_lines(self, now: float) -> None:
        if self._line_at is not None and self.done < self.total:
            then, done = self._line_at
            if now - then < self._seconds and self.done - done < self._share * self.total:
                return
        self._print_line(now)

    def _print_line(self, now: float) -> None:
        self._line_at = (now, self.done)
        percent = 100 * self.done / max(self.total, 1)
        line = f"{self.description} {self.done:,}/{self.total:,} ({percent:.0f} %)  {_clock(now - self._began)}"
        self._console.print(line + self._speed(now) + show(self._values), markup=False, highlight=False, soft_wrap=True)

    def _speed(self, now: float) -> str:
        """Rate and time left; nothing before the second update."""
        then, first = self._first or (now, self.done)
        if self.done == first or now <= then:
            return ""
        rate = (self.done - first) / (now - then)
        left = f"  ETA {_clock((self.total - self.done) / rate)}" if self.done < self.total else ""
        return f"  {number(rate)} {self.unit}/s{left}"

    def _make_bar(self) -> RichProgress:
        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
        )
        self._task = bar.add_task(self.description, total=self.total, completed=self.done, values="")
        return bar


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def show(values: dict[str, float | int]) -> str:
    """ "  loss 2.345  tokens/s 12.3K": names as keyword arguments, units at their end."""
    return "".join(f"  {name.replace('_per_second', '/s')} {number(value)}" for name, value in values.items())


def number(value: float | int) -> str:
    """Four significant digits; thousands, millions and more as K, M, G, T."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= scale:
            return f"{value / (1e3 if letter == 'K' else scale):.4g}{letter}"
    return f"{value:.4g}"
