"""`memjax eval`: a memory of the catalog learns a recall task in a small model, and is scored slice by slice."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memjax.cli.console import Command, hint, json_object, size
from memjax.cli.listing import entry
from memjax.errors import ConfigError
from memjax.record import write_json


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Train a small model of one memory on a synthetic task and print its accuracy by slice, beside chance.

    The model is small on purpose: layers of the memory alone, with one small head, so that what the state can hold
    shows. Steps, layers and learning rate are those of the task if they are not given.
    """

    memory: str = "gated_delta_net"
    """A name of `memjax list`."""
    task: str = "mqar"
    """A name of --list-tasks."""
    list_tasks: bool = False
    """Only show the tasks."""
    fields: str = "{}"
    """JSON: fields of the memory ('{"heads": 2}')."""
    task_fields: str = "{}"
    """JSON: fields of the task, in every slice ('{"random_fill": false}')."""
    dim: int = 64
    head_dim: int = 16
    """Width of keys and values, where the memory has a field for it."""
    layers: int | None = None
    hidden: int | None = None
    """Width of a feed-forward block behind each memory; 0: none."""
    conv: int | None = None
    """Taps of a convolution in front of each memory, 0: none. Default: 4 where the memory has none of its own."""
    steps: int | None = None
    """Updates."""
    batch: int | None = None
    """Rows of an update."""
    learning_rate: float | None = None
    """Its peak, of AdamW."""
    weight_decay: float = 0.1
    seeds: tuple[int, ...] = (0,)
    """Each is a training of its own."""
    rows: int = 512
    """Rows that each slice is tested on."""
    implementation: str | None = None
    """Of the ops: a name such as xla or reference; by default the best for this machine."""
    json: Path | None = None
    """Where to write the result."""

    def run(self) -> None:
        if self.list_tasks:
            _print_tasks(self.start())
            return
        from memjax.lm.small import small_model
        from memjax.memory import How, to_config
        from memjax.train.evaluation import measure
        from memjax.train.progress import Progress
        from memjax.train.small import Recipe

        known = entry(self.memory)
        for name in ("dim", "head_dim", "layers", "rows", "steps", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}, needs at least 1")
        if self.hidden is not None and self.hidden < 0:
            raise ConfigError(f"--hidden is {self.hidden}, needs at least 0")
        if self.conv is not None and (self.conv < 0 or self.conv == 1):
            raise ConfigError(f"--conv is {self.conv}, needs 0 or at least 2 taps")
        if not self.seeds:
            raise ConfigError("--seeds: needs at least one number")
        setting = self._setting()
        given = {name: getattr(self, name) for name in ("steps", "batch", "learning_rate", "weight_decay")}
        recipe = Recipe.of(setting, **given)
        models = []
        for window in (max(task.tokens for task in setting.train), setting.longest):
            mixers = self._mixers(known, window, setting)
            hidden = setting.hidden if self.hidden is None else self.hidden
            models.append(small_model(mixers, setting.vocab, hidden=hidden, conv=self.conv))
        model, reader = models
        how = How(self.implementation)
        if self.implementation is not None and self.implementation not in model.implementations:
            has = ", ".join(model.implementations) or "none by name"
            raise ConfigError(f"--implementation is {self.implementation!r}, {self.memory} has {has}")

        out = self.start()
        layers = len(mixers)
        shape = f"{layers} layer{'s'[: layers > 1]}, dim {self.dim}, {model.param_bytes() // 4:,} parameters"
        out.print(f"model  {self.memory}, {shape}, state {size(model.state_bytes(1))} a row", soft_wrap=True)
        out.print(f"task   {self.task}: {setting.source}", soft_wrap=True)
        results = []
        with Progress(len(self.seeds) * recipe.steps, "train", unit="step", console=out) as bar:
            for seed in self.seeds:
                report = lambda n, loss: bar.update(n, loss=loss)  # noqa: E731
                results.append(
                    measure(model, setting, recipe, reader=reader, rows=self.rows, seed=seed, how=how, report=report)
                )
        _print_scores(out, setting, results)
        times = ", ".join(f"{r.seconds:.0f} s" for r in results)
        speed = f"{1e3 * statistics.median(r.step_seconds for r in results):.3g} ms an update"
        out.print(f"trained in {times}, {speed}; reading the longest rows takes {size(reader.state_bytes(1))} of state")
        if self.json is not None:
            body = {
                "memory": self.memory,
                "task": self.task,
                "model": to_config(model),
                "recipe": asdict(recipe),
                "seeds": self.seeds,
                "rows": self.rows,
                "chance": {name: task.chance for name, task in setting.test.items()},
                "results": [result.plain() for result in results],
            }
            write_json(self.json, body)
            out.print(f"wrote {self.json}", style="green", soft_wrap=True)

    def _setting(self) -> Any:
        from memjax.tasks import SETTINGS

        if self.task not in SETTINGS:
            raise ConfigError(f"no task is called {self.task!r}; {hint(self.task, SETTINGS)}")
        setting, changes = SETTINGS[self.task], json_object("--task-fields", self.task_fields)
        for task in (*setting.train, *setting.test.values()):
            has = [f.name for f in fields(task)]
            if unknown := [name for name in changes if name not in has]:
                raise ConfigError(
                    f"--task-fields: {type(task).__name__} has no field {unknown[0]!r}; it has {', '.join(has)}"
                )
        try:
            return setting.replace(**changes)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"--task-fields: {error}") from None

    def _mixers(self, known: Any, window: int, setting: Any) -> Any:
        from memjax.lm.small import small_mixers

        own = json_object("--fields", self.fields)
        if "layers" in own:
            raise ConfigError("--fields: layers is set by --layers")
        try:
            return small_mixers(
                self.memory,
                **{"dim": self.dim, "head_dim": self.head_dim, "window": window, "vocab": setting.vocab, **own},
                layers=setting.layers if self.layers is None else self.layers,
            )
        except ConfigError as error:
            raise ConfigError(f"--memory {self.memory}: {error}") from None


# ---------------------------------------------------------------------------------------------- tables


def _print_tasks(out: Console) -> None:
    from memjax.tasks import SETTINGS

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("task", "slices", "tokens", "steps", "from"):
        table.add_column(header, no_wrap=header != "from", justify="right" if header == "steps" else "left")
    for name, setting in SETTINGS.items():
        lengths = sorted({task.tokens for task in setting.train})
        tested = list(setting.test)
        shown = ", ".join(tested) if len(tested) < 4 else f"{tested[0]} … {tested[-1]}"
        tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]}–{lengths[-1]}"
        table.add_row(name, shown, tokens, f"{setting.steps:,}", Text(setting.source, "dim"))
    out.print(table)


def _print_scores(out: Console, setting: Any, results: list[Any]) -> None:
    """Means over seeds, with the standard deviation where there are several."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("slice", no_wrap=True)
    for header in ("accuracy", "chance", "scaled", "whole row", "last answer"):
        table.add_column(header, justify="right")
    for name, task in setting.test.items():
        scores = [r.scores[name] for r in results]
        columns = {
            "accuracy": [s.accuracy for s in scores],
            "chance": None,
            "scaled": [s.scaled(task.chance) for s in scores],
            "exact": [s.exact for s in scores],
            "last": [s.last for s in scores],
        }
        cells = [
            Text(f"{task.chance:.3f}", "dim") if of is None else Text(_mean(of), "bold" * (task.metric == column))
            for column, of in columns.items()
        ]
        table.add_row(name, *cells)
    out.print()
    out.print(table)


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    mean = math.fsum(values) / len(values)
    return f"{mean:.3f}{spread}"
