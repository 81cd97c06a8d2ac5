"""`memjax bench`: whether the ops are right, and how fast they are, on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from memjax.cli.console import Command, note, size
from memjax.errors import ConfigError

Part = Literal["errors", "times", "scaling"]
GROUPS = ("outputs", "inputs", "gates", "state")
MODES = {"forward": "forward", "residuals": "+ residuals", "both": "+ backward", "decode": "decode, µs"}


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Check every implementation of the ops, time them beside others, and write a record.

    Exit code 1: an error is larger than allowed.
    """

    what: Positional[Literal["ops"]]
    """ops: the operations of pallas_kernels."""
    ops: tuple[str, ...] = ()
    """Ops (delta_rule) or forms of them (delta_rule/head); default: all."""
    parts: tuple[Part, ...] = ("errors", "times", "scaling")
    """What is measured."""
    shapes: Literal["cpu", "fla", "tests"] | None = None
    """cpu: 4096 tokens, 4 heads of 64. fla: those of flash-linear-attention's benchmark, in bfloat16. tests: those of
    this library's tests. Default: cpu and tests on a CPU, else fla."""
    repeats: int = 20
    """Samples of each figure."""
    peers: bool = True
    """Leave out flash-linear-attention, which is timed where `make peers` has installed it."""
    peers_python: Path | None = None
    """The Python that has it; default: .venv-peers/bin/python here or beside memjax."""
    out: Path = Path("build/bench")
    """Folder for the record."""
    quick: bool = False
    """One small shape and few samples, no peers, no record: shows that everything runs, not how fast."""

    def run(self) -> int:
        from memjax.bench import ops, peers
        from memjax.record import write_record
        from memjax.train.progress import Progress

        out = self.start()
        plan = self._plan()
        python = (
            peers.find_python(self.peers_python) if self.peers and not self.quick and "times" in self.parts else None
        )
        body: dict[str, Any] = {"config": self._config(plan), "load_before": _load(out)}
        with contextlib.ExitStack() as stack:
            if python:
                fla = stack.enter_context(peers.Fla(python))
                body["peers"] = fla.about
                plan = plan._replace(fla=fla)
            for part in dict.fromkeys(self.parts):
                body[part] = rows = []
                with Progress(ops.units(part, plan), part, unit="case", console=out) as bar:
                    for found in ops.PARTS[part](plan):
                        rows += found
                        bar.update()
                _print(out, part, rows)
        body["load_after"] = _load()
        if "times" in self.parts and not python and self.peers and not self.quick:
            note("flash-linear-attention was not timed: `make peers` installs it")
        if not self.quick:
            path = write_record("bench_ops", body, self.out)
            out.print(f"wrote {path}", style="green", soft_wrap=True)
        wrong = ops.too_large(body.get("errors", []))
        for row in wrong:
            contents = ", hard inputs" if row["hard"] else ""
            what = f"{row['case']} {row['who']}, {row['dtype']}{contents}: {row['worst']}"
            note(f"{what} has an error of {row['error']:.1e}, allowed are {ops.allowed(row):.0e}")
        return 1 if wrong else 0

    def _plan(self) -> Any:
        import jax

        from memjax.bench import cases, ops

        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats}, needs at least 1")
        try:
            chosen = tuple(cases.select(self.ops))
        except KeyError as error:
            known = ", ".join(cases.CASES)
            raise ConfigError(f"--ops: no op or form is called {error}; there are {known}") from None
        if self.quick:
            small = tuple(cases.Shape(1, t, 2, 16) for t in (128, 256))
            checked = cases.Shape(1, 2 * cases.CHUNK + 7, 2, 8)
            return ops.Plan(chosen, tuple(cases.SHAPES["quick"]), ("float32",), checked, small, repeats=3, hasty=True)
        usual = ("cpu", "tests") if jax.default_backend() == "cpu" else ("fla",)
        shapes = [s for name in ((self.shapes,) if self.shapes else usual) for s in cases.SHAPES[name]]
        return ops.Plan(chosen, tuple(shapes), repeats=self.repeats)

    def _config(self, plan: Any) -> dict[str, Any]:
        """What the record says of the run, and nothing of one machine's folders."""
        shapes = [shape._asdict() for shape in plan.shapes]
        return {
            "ops": [case.name for case in plan.cases],
            "parts": self.parts,
            "shapes": shapes,
            "repeats": plan.repeats,
        }


# ---------------------------------------------------------------------------------------------- tables


def _print(out: Console, part: str, rows: list[dict[str, Any]]) -> None:
    out.print()
    if part == "errors":
        _errors(out, rows)
    elif part == "scaling":
        _scaling(out, rows)
    else:
        for shape in _unique(tuple(row["shape"].values()) for row in rows):
            here = [row for row in rows if tuple(row["shape"].values()) == shape]
            for table in (_times, _ratios, _memory):
                table(out, here)


def _errors(out: Console, rows: list[dict[str, Any]]) -> None:
    from memjax.bench import ops

    for dtype in _unique(row["dtype"] for row in rows):
        _title(out, f"Errors, {dtype}: rms of the difference over rms of the float64 recurrence, worst implementation")
        _note(out, "of o and the final state, and of the gradients of inputs, gates (and rates) and the initial state")
        cells = [(hard, group) for hard in (False, True) for group in GROUPS]
        heads = ("usual inputs\n", "\n", "\n", "\n", "hard inputs\n", "\n", "\n", "\n")
        table = _table("\nop", *(head + group for head, (_, group) in zip(heads, cells, strict=True)))
        limits = [ops.allowed({"dtype": dtype, "hard": hard, "group": group}) for hard, group in cells]
        table.add_row(Text("allowed", "dim"), *(Text(f"{limit:.0e}", "dim") for limit in limits))
        for case in _unique(row["case"] for row in rows):
            line = []
            for (hard, group), limit in zip(cells, limits, strict=True):
                of = (case, dtype, hard, group)
                seen = [r["error"] for r in rows if (r["case"], r["dtype"], r["hard"], r["group"]) == of]
                wrong = seen and not max(seen) <= limit
                line.append(Text(f"{max(seen):.0e}" if seen else "–", "bold red" if wrong else ""))
            table.add_row(case, *line)
        out.print(table)
        out.print()


def _times(out: Console, rows: list[dict[str, Any]]) -> None:
    _title(out, f"Milliseconds, {_shape(rows)}")
    _note(out, "median (20th to 80th percentile)")
    table = _table("op", *MODES.values())
    for case, own in _by_case(rows):
        table.add_row(Text(case, "bold"))
        timed = {(row["who"], row["mode"]): row for row in own if "mode" in row}
        peers = {row["who"]: row for row in own if "mode" not in row}
        for who in _unique(row["who"] for row in own):
            cells = [_spread(timed.get((who, mode)), 1e6 if mode == "decode" else 1e3) for mode in MODES]
            if who in peers and (who, "both") not in timed:
                error = peers[who].get("error")
                cells[0] = Text("refuses it" if error is None else f"differs by {error:.0e}", "red")
            table.add_row(Text(f"  {who}", "cyan" if who in peers else ""), *cells)
    out.print(table)
    out.print()


def _ratios(out: Console, rows: list[dict[str, Any]]) -> None:
    table = _table("op", *(mode.partition(",")[0] for mode in MODES.values()))
    for case, own in _by_case(rows):
        timed = {(row["who"], row["mode"]): row["median"] for row in own if "mode" in row}
        for who in _unique(who for who, _ in timed if who not in ("xla", "default")):
            pairs = [(timed.get((who, mode)), timed.get(("default", mode))) for mode in MODES]
            cells = [f"{theirs / ours:.2f}" if theirs and ours else "–" for theirs, ours in pairs]
            table.add_row(f"{case} [dim]than[/dim] {'the plain scan' if who == 'reference' else who}", *cells)
    if table.row_count:
        _title(out, f"How many times faster the default is, {_shape(rows)}")
        out.print(table)
        out.print()


def _memory(out: Console, rows: list[dict[str, Any]]) -> None:
    _title(out, f"Memory of forward and backward as compiled, {_shape(rows)}")
    _note(out, "states: one a chunk of 64; of the sum of inputs, outputs and these the peak is so many times")
    table = _table("op", "peak", "inputs", "outputs", "states", "peak / sum")
    for case, own in _by_case(rows):
        for row in own:
            if "memory" in row:
                peak, *parts = (row["memory"][name] for name in ("peak", "inputs", "outputs", "chunk_states"))
                table.add_row(f"{case} [dim]{row['who']}[/dim]", *map(size, (peak, *parts)), f"{peak / sum(parts):.2f}")
    out.print(table)
    out.print()


def _scaling(out: Console, rows: list[dict[str, Any]]) -> None:
    lengths = _unique(row["t"] for row in rows)
    _title(out, "Milliseconds of the default while t doubles")
    _note(out, "(how many times that of half the length)")
    table = _table("op", *(f"t={t:,}" for t in lengths))
    for case, own in _by_case(rows):
        table.add_row(Text(case, "bold"))
        for mode in _unique(row["mode"] for row in own):
            found = {row["t"]: row for row in own if row["mode"] == mode}
            cells = [_number(1e3 * found[t]["median"]) for t in lengths]
            ratios = [found[t]["ratio"] for t in lengths]
            table.add_row(
                f"  {MODES[mode]}", *(f"{c} ({r:.2f})" if r else c for c, r in zip(cells, ratios, strict=True))
            )
    out.print(table)
    out.print()


def _title(out: Console, text: str) -> None:
    out.print(Text(text, "bold"), soft_wrap=True)


def _note(out: Console, text: str) -> None:
    out.print(Text(text, "dim"), soft_wrap=True)


def _table(first: str, *headers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _by_case(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(case, [row for row in rows if row["case"] == case]) for case in _unique(row["case"] for row in rows)]


def _shape(rows: list[dict[str, Any]]) -> str:
    from memjax.bench.cases import Shape

    return str(Shape(**rows[0]["shape"]))


def _spread(row: dict[str, Any] | None, scale: float) -> Text:
    if row is None:
        return Text("–", "dim")
    p20, p80 = (_number(scale * row[name], digits=2) for name in ("p20", "p80"))
    return Text.assemble(_number(scale * row["median"]), (f" ({p20}–{p80})", "dim"))


def _number(x: float, digits: int = 3) -> str:
    """Without an exponent or a last point: 0.0123, 1.23, 12.3, 1234."""
    return f"{x:.0f}" if x >= 10 ** (digits - 1) else f"{x:#.{digits}g}".rstrip(".")


def _unique(names: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(names))


def _load(out: Console | None = None) -> float | None:
    """How many programs want a core; the record says it, and a busy machine is told of."""
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if out and load > 0.5:
        out.print(
            f"the machine is busy (load {load:.1f} on {os.cpu_count()} cores): no times for a record", style="yellow"
        )
    return round(load, 2)
