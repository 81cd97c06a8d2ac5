"""Small trainings for the experiments that compare memories: each is one file, and one that is there is not made again.

A contestant is a list of layers by catalog name and fields. `train` makes a small language model of them, trains it on
a setting of `memjax.tasks`, and keeps what came out; `in_processes` does so on several cores at once.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

Layer = tuple[str, dict[str, Any]]
Layers = tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the experiments that train small models have alike."""

    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (2e-3, 5e-3, 1.2e-2)
    """Of which one is chosen for each memory."""
    steps: int | None = None
    """Updates; None: those of the task."""
    rows: int = 1024
    """Rows that each slice is tested on."""
    jobs: int = 1
    """Processes that train side by side, each on its share of the cores: a small training uses one well."""
    device: str | None = None
    """Platform to run on: cpu, gpu or tpu; by default the best that jax finds."""
    output: Path
    """Folder for the results, the record and its picture."""
    record: bool = False
    """Put record and picture into experiments/records instead of the output folder."""
    quick: bool = False
    """Few memories, one seed, a few steps: shows that everything runs, not how well."""


class Run(NamedTuple):
    """One training. size: its number among the contestant's sizes. learning_rate: None: that of the setting."""

    part: str
    contestant: str
    size: int
    learning_rate: float | None
    seed: int

    @property
    def file(self) -> str:
        rate = "own" if self.learning_rate is None else f"{self.learning_rate:g}"
        name = self.contestant.replace(":", "-")
        for mark, instead in ((" ", "_"), (",", ""), ("(", ""), (")", "")):
            name = name.replace(mark, instead)
        return f"{self.part}-{name}-{self.size}-{rate}-{self.seed}.json"


def models(layers: Layers, setting: Any) -> tuple[Any, Any]:
    """The model that is trained, and the one that reads the test rows: a longer window where attention is whole."""
    from memjax.catalog import Part
    from memjax.lm.small import small_mixers, small_model

    def build(window: int) -> Any:
        mixers = []
        for i, (name, fields) in enumerate(layers):
            same = {"layers": len(layers), "window": window, "vocab": setting.vocab, **fields}
            if "memory" in fields:
                same["memory"] = Part(*fields["memory"])
            mixers.append(small_mixers(name, **same)[i])
        return small_model(mixers, setting.vocab, hidden=setting.hidden)

    return build(max(task.tokens for task in setting.train)), build(setting.longest)


def train(config: Config, run: Run, layers: Layers, setting: Any) -> dict[str, Any]:
    """The result of one run, from its file if it is there and of the same layers, setting, recipe and rows."""
    from memjax.record import write_json
    from memjax.train.evaluation import measure
    from memjax.train.progress import Progress
    from memjax.train.small import Recipe

    recipe = Recipe.of(setting, steps=config.steps, learning_rate=run.learning_rate)
    about = {**run._asdict(), "layers": layers, "setting": repr(setting), "recipe": asdict(recipe), "rows": config.rows}
    about = json.loads(json.dumps(about))  # as it stands in a file: lists for tuples
    path = config.output / ("quick" if config.quick else "results") / run.file
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in about} == about:
            return found
    model, reader = models(layers, setting)
    title = f"{run.part} {run.contestant} {run.size + 1}/{run.seed}"
    measured = dict(reader=reader, rows=config.rows, seed=run.seed)
    if config.jobs == 1:
        with Progress(recipe.steps, title, unit="step") as shown:
            report = lambda n, loss: shown.update(n, loss=loss)  # noqa: E731
            result = measure(model, setting, recipe, **measured, report=report)
    else:
        result = measure(model, setting, recipe, **measured)
        scores = " ".join(f"{score.accuracy:.3f}" for score in result.scores.values())
        print(f"{title}, rate {recipe.learning_rate:g}: {scores}, {result.seconds:.0f} s", flush=True)
    body = {**about, **result.plain(), "reader_state_bytes": reader.state_bytes(1)}
    write_json(path, body)
    return body


def over_sizes(
    train_one: Callable[[Run], dict[str, Any]],
    part: str,
    contestant: str,
    *,
    sizes: int,
    learning_rates: tuple[float, ...],
    seeds: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Every size with every seed, at the learning rate that is best for the middle size with the first seed."""
    tried = {
        rate: mean_accuracy(train_one(Run(part, contestant, sizes // 2, rate, seeds[0]))) for rate in learning_rates
    }
    best = max(tried, key=lambda rate: tried[rate])
    return [
        {**train_one(Run(part, contestant, size, best, seed)), "tried": tried}
        for size, seed in itertools.product(range(sizes), seeds)
    ]


def in_processes(jobs: int, device: str | None, work: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> None:
    """Call `work` with each of these, on `jobs` processes that have an even share of the cores each.

    What it returns is dropped: it keeps its results in files. `work` is a function of a module. device: platform that
    they run on.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    spawn = multiprocessing.get_context("spawn")
    number = spawn.Value("i", 0)
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(number, jobs, device)) as pool:
        for done in [pool.submit(work, *call) for call in calls]:
            done.result()


def _begin(number: Any, jobs: int, device: str | None) -> None:
    """Two trainings on all cores take longer than each on its own half, since a small one can't use them."""
    if device:
        os.environ["JAX_PLATFORMS"] = device  # jax is not imported yet
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[mine % jobs :: jobs] or cores)


def mean_accuracy(result: Mapping[str, Any]) -> float:
    """Over the slices."""
    return statistics.fmean(score["accuracy"] for score in result["scores"].values())


def summarised(rows: list[dict[str, Any]], score: str = "accuracy") -> list[dict[str, Any]]:
    """One row for each contestant and size: state bytes, and mean, least and most of a score over the seeds of each
    slice."""
    out = []
    for key in dict.fromkeys((row["contestant"], row["size"]) for row in rows):
        same = [row for row in rows if (row["contestant"], row["size"]) == key]
        scores = {name: [row["scores"][name][score] for row in same] for name in same[0]["scores"]}
        out.append({
            "contestant": key[0], "size": key[1], "state_bytes": same[0]["state_bytes"],
            "reader_state_bytes": same[0]["reader_state_bytes"],
            "learning_rate": same[0]["recipe"]["learning_rate"], "seeds": len(same),
            "step_seconds": statistics.median(row["step_seconds"] for row in same),
            "mean": {name: statistics.fmean(v) for name, v in scores.items()},
            "low": {name: min(v) for name, v in scores.items()},
            "high": {name: max(v) for name, v in scores.items()},
        })  # fmt: skip
    return out


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a summary, no wider than a terminal."""
    from rich.console import Console
    from rich.table import Table

    from memjax.cli.console import size

    out = Table(title=title, title_justify="left", box=None)
    slices = list(rows[0]["mean"])
    out.add_column("memory", overflow="fold")
    for header in ("state", *slices):
        out.add_column(header, justify="right", no_wrap=True)
    share = lambda x, digits=2: f"{x:.{digits}f}".removeprefix("0")  # noqa: E731
    for row in rows:
        spread = row["seeds"] > 1
        cells = [
            share(row["mean"][s], 3) + (f" {share(row['low'][s])}–{share(row['high'][s])}" if spread else "")
            for s in slices
        ]
        out.add_row(row["contestant"], size(row["state_bytes"]), *cells)
    Console().print(out)
