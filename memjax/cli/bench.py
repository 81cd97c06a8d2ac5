"""`memjax bench`: whether the ops are right, and how fast they are, on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from memjax.cli.console import Command, note, size
from memjax.errors import ConfigError

Part = Literal["errors", "times", "scaling"]
GROUPS = ("outputs", "inputs", "gates", "state")
NARROW = 100  # columns; with fewer, percentiles and ratios would cut the medians
MODES = {"forward": "forward", "residuals": "+ residuals", "both": "+ backward", "decode": "decode, µs"}


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Check every implementation of the ops, time them beside others, and write a record.

    The record is written after each part. That of another configuration is not replaced.

    Exit code 1: an error is larger than allowed.
    """

    what: Positional[Literal["ops"]]
    """ops: the operations of pallas_kernels."""
    ops: tuple[str, ...] = ()
    """Ops (delta_rule) or forms of them (delta_rule/head); default: all."""
    parts: tuple[Part, ...] = ("errors", "times", "scaling")
    """What is measured."""
    shapes: Literal["cpu", "fla", "tests"] | None = None
    """cpu: 4096 tokens, 4 heads of 64.
    tests: a small one, 192 tokens, 3 heads of 24.
    fla: those of flash-linear-attention's benchmark, in bfloat16.
    Default: cpu and tests on a CPU, else fla."""
    repeats: int = 20
    """Samples of each figure."""
    peers: bool = True
    """Leave out lax.associative_scan and flash-linear-attention, which is timed once `make peers` has installed it."""
    peers_python: Path | None = None
    """The Python with flash-linear-attention; default: .venv-peers/bin/python here or beside memjax."""
    out: Path = Path("build/bench")
    """Folder for the record."""
    quick: bool = False
    """One small shape and few samples, no peers, no record: shows that everything runs, not how fast.
    It has no use for --shapes, --repeats, --peers-python and --out, and refuses them."""

    def run(self) -> int:
        from memjax.bench import ops, peers
        from memjax.bench.timing import keep_memory
        from memjax.train.progress import Progress

        self._check()
        kept = not self.quick and keep_memory()  # before jax starts its threads
        out = self.start()
        plan = self._plan()
        body: dict[str, Any] = {"config": self._config(plan), "load_before": _load(), "keeps_memory": kept}
        record = None if self.quick else self._begin(body["config"])
        python = self._peers_python(plan)
        if record and (body["load_before"] or 0) > 0.5:
            _busy(out, body["load_before"])
        with contextlib.ExitStack() as stack:
            if python:
                fla = stack.enter_context(peers.Fla(python))
                body["peers"] = fla.about
                plan = plan._replace(fla=fla)
            for part in dict.fromkeys(self.parts):
                rows = []
                with Progress(ops.units(part, plan), part, unit="case", console=out) as bar:
                    for found in ops.PARTS[part](plan):
                        rows += found
                        bar.update()
                body |= {part: rows, "load_after": _load()}
                if plan.fla and plan.fla.gone:
                    body["peers"]["ended"] = plan.fla.gone
                if record:
                    record.write(body)
                _print(out, part, rows)
        if plan.fla and plan.fla.gone:
            note(f"flash-linear-attention was not timed to the end: {plan.fla.gone}")
        if record:
            out.print(f"wrote {record.path}", style="green", soft_wrap=True)
            # the run itself keeps every core at work
            if (body["load_after"] or 0) > (os.cpu_count() or 1) + 0.5:
                _busy(out, body["load_after"])
        wrong = ops.too_large(body.get("errors", []))
        for row in wrong:
            what = f"{row['case']} {row['who']}, {row['dtype']}, {row['contents']} inputs: {row['worst']}"
            note(f"{what} has an error of {row['error']:.1e}, allowed are {ops.allowed(row):.0e}")
        return 1 if wrong else 0

    def _check(self) -> None:
        if not self.parts:
            raise ConfigError(f"--parts: needs one or more of {', '.join(get_args(Part))}")
        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats}, needs at least 1")
        for name in ("shapes", "repeats", "peers_python", "out"):
            if self.quick and getattr(self, name) != getattr(Bench, name):
                flag = name.replace("_", "-")
                raise ConfigError(f"--quick has its own shape and samples, no peers and no record: leave out --{flag}")

    def _begin(self, config: dict[str, Any]) -> Any:
        from memjax.record import begin_record

        try:
            return begin_record("bench_ops", self.out, config)
        except OSError as error:
            raise ConfigError(f"--out {self.out}: {error.strerror}, needs a folder that can be written") from None

    def _peers_python(self, plan: Any) -> Path | None:
        """The Python of flash-linear-attention, if it is there and something is to be timed beside it."""
        from memjax.bench import ops, peers

        if not plan.peers or "times" not in self.parts:
            return None
        python = peers.find_python(self.peers_python)
        if not any(ops.uses_fla(case, shape) for case in plan.cases for shape in plan.shapes):
            note("flash-linear-attention is not timed: it has none of these forms on this device and in these dtypes")
            return None
        if python is None:
            note("flash-linear-attention is not timed: `make peers` installs it")
        return python

    def _plan(self) -> Any:
        import jax

        from memjax.bench import cases, ops

        try:
            chosen = tuple(cases.select(self.ops))
        except KeyError as error:
            known = ", ".join(cases.CASES)
            raise ConfigError(f"--ops: no op or form is called {error}; there are {known}") from None
        if self.quick:
            small = tuple(cases.Shape(1, t, 2, 16) for t in (128, 256))
            checked = cases.Shape(1, 2 * cases.CHUNK + 7, 2, 24)
            shapes = tuple(cases.SHAPES["quick"])
            return ops.Plan(chosen, shapes, ("float32",), checked, small, repeats=3, hasty=True, peers=False)
        usual = ("cpu", "tests") if jax.default_backend() == "cpu" else ("fla",)
        shapes = [s for name in ((self.shapes,) if self.shapes else usual) for s in cases.SHAPES[name]]
        return ops.Plan(chosen, tuple(shapes), repeats=self.repeats, peers=self.peers)

    def _config(self, plan: Any) -> dict[str, Any]:
        """What the record says of the run, and nothing of one machine's folders."""
        shapes = [shape._asdict() for shape in plan.shapes]
        return {
            "ops": [case.name for case in plan.cases],
            "parts": self.parts,
            "shapes": shapes,
            "repeats": plan.repeats,
            "with_peers": plan.peers,
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
    from memjax.bench import cases, ops

    for dtype in _unique(row["dtype"] for row in rows):
        _title(out, f"Errors, {dtype}: rms of the difference / rms of the float64 recurrence")
        _note(out, "outputs: o and the final state; gates: and rates; state: the initial one")
        _note(out, "the worst implementation, on inputs that are usual, hard, or alike in whole chunks")
        table = _table("op", "inputs", *("gradient of\n" * (group != "outputs") + group for group in GROUPS))
        for contents in cases.CONTENTS:
            limits = [ops.allowed({"dtype": dtype, "contents": contents, "group": group}) for group in GROUPS]
            first = "allowed" if contents == cases.CONTENTS[0] else ""
            table.add_row(*(Text(cell, "dim") for cell in (first, contents, *(f"{limit:.0e}" for limit in limits))))
        for case in _unique(row["case"] for row in rows):
            for contents in cases.CONTENTS:
                line = []
                for group in GROUPS:
                    of = (case, dtype, contents, group)
                    seen = [r for r in rows if (r["case"], r["dtype"], r["contents"], r["group"]) == of]
                    worst = f"{max(r['error'] for r in seen):.0e}" if seen else "–"
                    line.append(Text(worst, "bold red" if ops.too_large(seen) else ""))
                table.add_row(case if contents == cases.CONTENTS[0] else "", Text(contents, "dim"), *line)
        out.print(table)
        out.print()


def _times(out: Console, rows: list[dict[str, Any]]) -> None:
    _title(out, f"Milliseconds, {_shape(rows)}")
    _note(out, "median" if _narrow(out) else "median (20th to 80th percentile)")
    table = _table("op", *MODES.values())
    refused = []
    for case, own in _by_case(rows):
        table.add_row(Text(case, "bold"))
        timed = {(row["who"], row["mode"]): row for row in own if "mode" in row}
        peers = {row["who"]: row for row in own if "error" in row or "refused" in row}
        refused += [f"{case}, {who} refuses it: {row['refused']}" for who, row in peers.items() if "refused" in row]
        for who in _unique(row["who"] for row in own):
            cells = [_spread(out, timed.get((who, mode)), 1e6 if mode == "decode" else 1e3) for mode in MODES]
            if who in peers and not any((who, mode) in timed for mode in MODES):
                error = peers[who].get("error")
                refusal = "refuses it" if "refused" in peers[who] else f"differs by {error:.0e}"
                cells[0] = Text(refusal, "red")
            table.add_row(Text(f"  {who}", "cyan" if who in peers else ""), *cells)
    out.print(table)
    for line in refused:
        _note(out, line)
    out.print()


def _ratios(out: Console, rows: list[dict[str, Any]]) -> None:
    table = _table("op", *(mode.partition(",")[0] for mode in MODES.values()))
    for case, own in _by_case(rows):
        timed = {(row["who"], row["mode"]): row["median"] for row in own if "mode" in row}
        others = _unique(who for who, _ in timed if who not in ("xla", "default"))
        if others:
            table.add_row(Text(case, "bold"))
        for who in others:
            pairs = [(timed.get((who, mode)), timed.get(("default", mode))) for mode in MODES]
            cells = [f"{theirs / ours:.2f}" if theirs and ours else "–" for theirs, ours in pairs]
            table.add_row(f"  than {'the plain scan' if who == 'reference' else who}", *cells)
    if table.row_count:
        _title(out, f"How many times faster the default is, {_shape(rows)}")
        out.print(table)
        out.print()


def _memory(out: Console, rows: list[dict[str, Any]]) -> None:
    _title(out, f"Memory of forward and backward as compiled, {_shape(rows)}")
    _note(out, "states: one a chunk of 64; sum: of inputs, outputs and these")
    table = _table("op", "peak", "inputs", "outputs", "states", "peak / sum")
    for case, own in _by_case(rows):
        table.add_row(Text(case, "bold"))
        for row in own:
            if "memory" in row:
                peak, *parts = (row["memory"][name] for name in ("peak", "inputs", "outputs", "chunk_states"))
                table.add_row(f"  {row['who']}", *map(size, (peak, *parts)), f"{peak / sum(parts):.2f}")
    out.print(table)
    out.print()


def _scaling(out: Console, rows: list[dict[str, Any]]) -> None:
    lengths = _unique(row["t"] for row in rows)
    _title(out, "Milliseconds of the default while t doubles")
    if not _narrow(out):
        _note(out, "(how many times that of half the length)")
    _note(out, f"{rows[0]['shape']['h']} heads or more: those without products outgrow the cache at every length")
    table = _table("op", *(f"t={t:,}" for t in lengths))
    for case, own in _by_case(rows):
        table.add_row(Text(case, "bold"))
        for mode in _unique(row["mode"] for row in own):
            found = {row["t"]: row for row in own if row["mode"] == mode}
            cells = [_number(1e3 * found[t]["median"]) for t in lengths]
            ratios = [None if _narrow(out) else found[t]["ratio"] for t in lengths]
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


def _narrow(out: Console) -> bool:
    return out.width < NARROW


def _spread(out: Console, row: dict[str, Any] | None, scale: float) -> Text:
    if row is None:
        return Text("–", "dim")
    median, p20, p80 = (_number(scale * row[name]) for name in ("median", "p20", "p80"))
    return Text(median) if _narrow(out) else Text.assemble(median, (f" ({p20}–{p80})", "dim"))


def _number(x: float) -> str:
    """Three digits without an exponent or a last point: 0.0123, 1.23, 12.3, 1234."""
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}".rstrip(".")


def _unique(names: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(names))


def _load() -> float | None:
    """How many programs wanted a core in the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _busy(out: Console, load: float) -> None:
    out.print(
        f"the machine is busy (load {load:.1f} on {os.cpu_count()} cores): no times to keep",
        style="yellow",
        soft_wrap=True,
    )
