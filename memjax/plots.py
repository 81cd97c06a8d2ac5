"""Pictures of what a run or a record says. matplotlib is imported when one is drawn."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

from memjax.errors import DataError

INK, LINE, GRID = "#333333", "#2a6f97", "#e6e6e6"
MANY = ("#2a6f97", "#5a8f3c", "#8e5aa8", "#c99a2e", "#3aa6a0", "#7a5c3e", "#d46aa0", "#4b4b8f")
ANSWERS, RECALL = "#c8553d", ("#2a6f97", "#61a5c2", "#89c2d9", "#013a63")


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


def plot_needle_bank(record_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw a record of `experiments.needle_bank` to a PNG: recall and answers as the memory around the needles grows.

    A line is the mean over the training seeds, a band reaches from the worst seed to the best. The axis of shares
    begins below the lowest of them.

    Raises:
      DataError: the file is missing, or is no record of that experiment; the message names the field.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator, NullLocator, PercentFormatter

    tokens, trained_on, series = _read_needle_bank(Path(record_path))
    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.set_xscale("log", base=2)
    panel.axvspan(trained_on / 2, trained_on, color=GRID, alpha=0.6, linewidth=0)
    panel.axvline(trained_on, color=INK, linewidth=0.8)
    recalls = len(series) - 1
    for i, (name, seeds) in enumerate(series.items()):
        color = RECALL[i % len(RECALL)] if i < recalls else ANSWERS
        mean = [sum(column) / len(column) for column in zip(*seeds, strict=True)]
        panel.plot(tokens, mean, color=color, linewidth=1.6, marker="o", markersize=4, label=name, zorder=3)
        if len(seeds) > 1:
            low, high = (list(map(edge, zip(*seeds, strict=True))) for edge in (min, max))
            panel.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
    lowest = min(share for seeds in series.values() for row in seeds for share in row)
    bottom = max(0.0, math.floor(10 * lowest - 0.5) / 10)
    panel.set_ylim(bottom - 0.02 * (1 - bottom), 1 + 0.02 * (1 - bottom))
    panel.set_xlim(trained_on / 2, tokens[-1] * 1.4)
    ticks = sorted({trained_on, *tokens})
    panel.set_xticks(ticks, [_binary(n) for n in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(MultipleLocator(0.02 if bottom >= 0.9 else 0.05 if bottom >= 0.7 else 0.1))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.annotate(
        f"trained on\n{_binary(trained_on)} tokens", (trained_on, 0.06), xycoords=("data", "axes fraction"),
        xytext=(5, 0), textcoords="offset points", fontsize=8, color=INK,
    )  # fmt: skip
    answers = [sum(column) / len(column) for column in zip(*series["answers"], strict=True)]
    panel.set_title(
        f"Right answers: {answers[0]:.1%} with {_binary(tokens[0])} tokens in memory, "
        f"{answers[-1]:.1%} with {_binary(tokens[-1])}",
        loc="left", fontsize=10, color=INK,
    )  # fmt: skip
    panel.set_xlabel("tokens in memory", color=INK, fontsize=9)
    count = len(series["answers"])
    spread = f"mean of {count} training seeds, bands from the worst to the best" if count > 1 else "one training seed"
    legend = panel.legend(title=spread, title_fontsize=8, fontsize=8, labelcolor=INK, frameon=False, alignment="left")
    legend.get_title().set_color(INK)
    panel.grid(color=GRID, linewidth=0.8)
    panel.tick_params(colors=INK, labelsize=8, length=0)
    panel.spines[:].set_visible(False)
    _write(FigureCanvasAgg(figure), Path(png_path))


def plot_recall(record_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw a record of `experiments.recall` to a PNG: right answers against the bytes of the state.

    A point is the mean over slices and seeds, a bar reaches from the worst seed to the best; sizes of one memory are
    joined by a line.

    Raises:
      DataError: the file is missing, or is no record of that experiment; the message names the field.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    series = _read_recall(Path(record_path))
    figure = Figure(figsize=(7.6, 4.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.set_xscale("log", base=2)
    lines = sorted(series, key=lambda name: -series[name][-1][1])
    colors = itertools.cycle(MANY)
    for name in lines:
        points, several, attention = series[name], len(series[name]) > 1, name.startswith("attention")
        color = ANSWERS if attention else next(colors) if several else "#999999"
        size, mean, low, high = zip(*points, strict=True)
        spread = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        panel.errorbar(
            size, mean, yerr=spread, color=color, linewidth=1.5 if several else 0, elinewidth=0.8, marker="o",
            markersize=4 if several else 3, label=name, zorder=3 if several else 2,
        )  # fmt: skip
        if not several:
            above = (4, -9 if attention else 3)  # apart from what else recalls everything
            panel.annotate(
                name, (size[0], mean[0]), xytext=above, textcoords="offset points", fontsize=7, color="#666666"
            )
    panel.set_ylim(-0.02, 1.03)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g} KB"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.set_title("Right answers to 4, 8 and 16 recalled pairs", loc="left", fontsize=10, color=INK)
    panel.set_xlabel("bytes of the state of a row", color=INK, fontsize=9)
    handles = [h for h, name in zip(*panel.get_legend_handles_labels(), strict=True) if len(series[name]) > 1]
    if handles:
        panel.legend(handles=handles, fontsize=8, labelcolor=INK, frameon=False, loc="lower right")
    panel.grid(color=GRID, linewidth=0.8)
    panel.tick_params(colors=INK, labelsize=8, length=0)
    panel.spines[:].set_visible(False)
    _write(FigureCanvasAgg(figure), Path(png_path))


def _read_recall(path: Path) -> dict[str, list[tuple[float, float, float, float]]]:
    """Name -> (bytes, mean, worst, best) of each size, ascending."""
    if not path.is_file():
        raise DataError(f"{path}: the file is missing, needs a record of experiments.recall")
    mean = lambda scores: sum(scores.values()) / len(scores)  # noqa: E731
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["recall"]:
            point = float(row["state_bytes"]), mean(row["mean"]), mean(row["low"]), mean(row["high"])
            series.setdefault(row["contestant"], []).append(point)
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"{path}: is no record of experiments.recall: {error}") from None
    return {name: sorted(points) for name, points in series.items()}


def _read_needle_bank(path: Path) -> tuple[list[int], int, dict[str, list[list[float]]]]:
    """Tokens, the size trained on, and name -> share [seed][size]; "answers" is the last name."""
    if not path.is_file():
        raise DataError(f"{path}: the file is missing, needs a record of experiments.needle_bank")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        runs = [run["sizes"] for run in body["runs"]]
        tokens = [int(row["tokens"]) for row in runs[0]]
        layers = range(len(runs[0][0]["recall_at_4"]))
        series = {
            f"recall@4, router layer {i + 1}": [[r["recall_at_4"][i] for r in run] for run in runs] for i in layers
        }
        series["answers"] = [[row["accuracy"] for row in run] for run in runs]
        trained_on = int(body["trained_on"])
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from None
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path}: is no record of experiments.needle_bank: {error}") from None
    if any(len(row) != len(tokens) for seeds in series.values() for row in seeds):
        raise DataError(f"{path}: its runs have different numbers of sizes, needs the same {len(tokens)} in each")
    return tokens, trained_on, series


def _binary(n: int) -> str:
    """16384 -> "16K" (K is 1024)."""
    return f"{n >> 20}M" if n % (1 << 20) == 0 else f"{n >> 10}K"


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
