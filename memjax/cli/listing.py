"""`memjax list`: the map of the field, and one memory in detail."""

from __future__ import annotations

import functools
import importlib.resources
import inspect
import json
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from memjax.cli.console import Command, hint, size
from memjax.errors import ConfigError

COLORS = {"in_state": "green", "in_context": "cyan", "in_storage": "magenta", "in_weights": "yellow"}
DIM = 512
SOURCE = 120  # columns of a line of source
LABEL = re.compile(r"^[A-Z]\w*: +|(?:^ *|: +)\w+ {2,}")  # "Update: ", "  step   "
NUMBERS = (("year", 4), ("state", 8), ("laws", 5), ("goldens", 7))  # the columns behind the name, and their widths


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """The memories of the library by where they keep what they know; with a name, one of them in detail."""

    name: Positional[str | None] = None
    """A memory, such as gated_delta_net; without one: all."""

    def run(self) -> None:
        out = self.start()
        if self.name is None:
            _print_all(out)
        else:
            _print_one(out, self.name, entry(self.name))


def entry(name: str) -> Any:
    """The catalog's entry; ConfigError with the names that are close, or all of them."""
    from memjax.catalog import CATALOG

    if name not in CATALOG:
        raise ConfigError(f"no memory is called {name!r}; {hint(name, CATALOG)}")
    return CATALOG[name]


def at_dim(entry: Any, dim: int) -> Any:
    """The memory at this width with its class's defaults, or None where that is impossible.

    Fields without a default get usual values: a memory is that of its own entry at this width, and what is no width is
    as in the entry's small instance.
    """
    from memjax.catalog import CATALOG, with_parts

    usual = {"dim": dim, "heads": max(1, dim // 64), "vocab": 32_000, "hidden": 4 * dim}
    needed = [n for n, p in inspect.signature(entry.cls).parameters.items() if p.default is p.empty or n == "dim"]
    try:
        build = lambda part: at_dim(CATALOG[part.name], dim)  # noqa: E731
        fields = {n: usual[n] if n in usual else with_parts(entry.small[n], build) for n in needed}
        return entry.build(**fields)
    except (KeyError, TypeError, ValueError):
        return None


@functools.cache
def laws() -> dict[str, dict[str, list[str]]]:
    """name -> "held", "declared off" and "not applicable" -> laws, as the suite found them."""
    return json.loads(importlib.resources.files("memjax").joinpath("catalog_laws.json").read_text(encoding="utf-8"))


def _laws_held(name: str) -> str:
    """How many laws a memory obeys, of those that apply to it: "9/12"."""
    found = laws().get(name)
    return "–" if found is None else f"{len(found['held'])}/{len(found['held']) + len(found['declared off'])}"


# ---------------------------------------------------------------------------------------------- all of them


def _print_all(out: Console) -> None:
    from memjax.catalog import CATALOG, PLACES

    width = max(map(len, CATALOG)) + 2
    for place, meaning in PLACES.items():
        color = COLORS[place]
        out.print()
        out.print(Text.assemble((place, f"bold {color}"), "  ", (meaning, color)))
        headers = "".join(f"  {header:>{w}}" for header, w in NUMBERS)
        out.print(Text(" " * width + headers, "dim"))
        for name, e in sorted((n, e) for n, e in CATALOG.items() if e.place == place):
            memory = at_dim(e, DIM)
            state = "–" if memory is None else size(memory.state_bytes(1))
            values = str(e.year), state, _laws_held(name), str(len(e.goldens) or "–")
            numbers = "".join(f"  {v:>{w}}" for v, (_, w) in zip(values, NUMBERS, strict=True))
            out.print(Text.assemble(("  " + name.ljust(width - 2), "bold"), numbers))
            for text, style in ((e.summary, ""), (e.paper, "dim")):
                out.print(Text(_filled(text, out.width, first="    "), style))
    out.print()
    for line in (
        f"{len(CATALOG)} memories, each with what it is and its paper. memjax list NAME shows one of them.",
        f"state: bytes of one row at dim {DIM}, with the defaults of the class, however long the input.",
        "laws: how many hold, of those that apply; the others are declared off (tests/exceptions.py says why).",
        "goldens: files of reference numbers that it reproduces.",
    ):
        out.print(Text(_filled(line, out.width), "dim"))


# ---------------------------------------------------------------------------------------------- one of them


def _print_one(out: Console, name: str, e: Any) -> None:
    from memjax.catalog import PLACES

    memory, dim = at_dim(e, DIM), DIM
    if memory is None:
        memory, dim = e.build_small(), e.small["dim"]
    module = sys.modules[e.cls.__module__]
    about = inspect.cleandoc(module.__doc__ or "").split("\n\n")
    paper = next((p for p in about if p.startswith("Paper:")), None)

    out.print(Text.assemble((name, f"bold {COLORS[e.place]}"), f"   memjax.{e.place}: {PLACES[e.place]}"))
    for paragraph in about:
        if paragraph != paper:
            out.print()
            out.print(Text(reflowed(paragraph, out.width)))
    out.print()
    found = laws().get(name, {})
    for label, text in (
        ("when to use", e.when),
        ("paper", f"{e.paper} ({e.year})" if paper is None else " ".join(paper.removeprefix("Paper:").split())),
        ("goldens", ", ".join(e.goldens) or "none"),
        ("laws", f"{_laws_held(name)} hold" if found else "not judged yet"),
        *((f"  {label}", ", ".join(found[label])) for label in ("declared off", "not applicable") if found.get(label)),
    ):
        lines = _filled(text, out.width, first=" " * 18)[18:]
        out.print(Text.assemble((label.ljust(18), "" if label.startswith(" ") else "bold"), lines))
    out.print()
    out.print(Text(f"state at dim {dim}, one row", "bold"))
    out.print(_arrays(memory, "state"))
    out.print()
    out.print(Text(reflowed(f"{e.cls.__name__}: {inspect.getdoc(e.cls)}", out.width)))
    out.print()
    out.print(Text(f"parameters at dim {dim}", "bold"))
    out.print(_arrays(memory, "params"))
    out.print()
    out.print(Text(f"{e.cls.__module__}.{memory}", "dim"))


def reflowed(text: str, width: int) -> str:
    """Paragraphs filled to the width. Formulas and tables stay on their lines, and go on indented where these are too
    long."""
    filled = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        if any(line.startswith(" ") for line in lines):
            about = ""
            for line in _unwrapped(lines):
                about = line.split(":")[0] if line[0] != " " else about
                indent = max(len(line) - len(line.lstrip()), *(m.end() for m in LABEL.finditer(line)), 0)
                filled.append(_filled(line, width, indent=" " * (indent + 2 * (about == "Update"))))
        else:
            filled.append(_filled(" ".join(lines), width))
        filled.append("")
    return "\n".join(filled[:-1])


def _unwrapped(lines: list[str]) -> list[str]:
    """Lines that were only broken because the next word did not fit into a line of source are one again."""
    whole, last = lines[:1], lines[0]
    for line in lines[1:]:
        if len(last) + 1 + len(line.split()[0]) > SOURCE and not LABEL.match(line):
            whole[-1] += " " + line.strip()
        else:
            whole.append(line)
        last = line
    return whole


def _filled(text: str, width: int, first: str = "", indent: str | None = None) -> str:
    """Lines of this width at most, broken between words; the first begins with `first`, the others with `indent`."""
    indent = first if indent is None else indent
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(lines)


def _arrays(memory: Any, kind: str) -> Table:
    import jax.numpy as jnp

    from memjax.memory import named

    params = kind == "params"
    specs = memory.param_specs() if params else memory.state_specs(1)
    total = memory.param_bytes() if params else memory.state_bytes(1)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("array", "axes", "shape", "dtype"):
        table.add_column(header, overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    for name, spec in named(specs).items():
        dtype = jnp.dtype(getattr(spec, "dtype", jnp.float32))
        axes = Text(" ".join(axis or "·" for axis in spec.axes), "dim")
        bytes_ = size(math.prod(spec.shape) * dtype.itemsize)
        table.add_row(Text(name), axes, Text(str(list(spec.shape))), dtype.name, bytes_)
    table.add_row(Text("in all", "bold"), "", "", "", Text(size(total), "bold"))
    return table
