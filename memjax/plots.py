"""Pictures of what a run or a record says. matplotlib is imported when one is drawn."""

from __future__ import annotations

import json
import os
from pathlib import Path

from memjax.errors import DataError

INK, LINE, GRID = "#333333", "#2a6f97", "#e6e6e6"


def plot_loss(jsonl_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw every series of a metrics file (`memjax.train.JSONLWriter`) over the steps, one panel a series, to a PNG.

    A positive series that spans a factor of ten or more has a logarithmic axis. Points that are not finite are left
    out.

    Raises:
      DataError: the file is missing, has a line that is not a JSON object with "step", or has no series.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

    series = _read(Path(jsonl_path))
    figure = Figure(figsize=(7, 0.6 + 1.5 * len(series)), dpi=150, layout="constrained")
    panels = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, (steps, values)) in zip(panels, series.items(), strict=True):
        panel.plot(steps, values, color=LINE, linewidth=1.4, marker="." if len(steps) < 30 else None)
        if min(values) > 0 and max(values) / min(values) >= 10:
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_minor_locator(NullLocator())
        thousands = max(map(abs, values)) >= 1e4
        panel.yaxis.set_major_formatter(EngFormatter(sep="") if thousands else StrMethodFormatter("{x:g}"))
        last = EngFormatter(places=1, sep="")(values[-1]) if thousands else f"{values[-1]:.4g}"
        panel.set_title(name.replace("_", " "), loc="left", fontsize=10, color=INK)
        panel.set_title(last, loc="right", fontsize=9, color=LINE)
        panel.grid(color=GRID, linewidth=0.8)
        panel.tick_params(colors=INK, labelsize=8, length=0)
        panel.spines[:].set_visible(False)
    panels[-1].set_xlabel("step", color=INK, fontsize=9)
    _write(FigureCanvasAgg(figure), Path(png_path))


def _read(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """name -> (steps, values), in the order in which the names appear."""
    if not path.is_file():
        raise DataError(f"{path}: the file is missing, needs a metrics file (JSON lines)")
    series: dict[str, tuple[list[int], list[float]]] = {}
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, KeyError, AttributeError):
            raise DataError(f"{path}: line {i} is {line[:60]!r}, needs a JSON object with 'step'") from None
        for name, value in values.items():
            if isinstance(value, int | float) and abs(value) < float("inf"):
                steps, column = series.setdefault(name, ([], []))
                steps.append(step)
                column.append(value)
    if not series:
        raise DataError(f"{path}: has no series of numbers, needs one at least")
    return series


def _write(canvas, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    canvas.print_figure(temporary, format="png")
    os.replace(temporary, path)
