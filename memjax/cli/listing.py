"""`memjax list`: the map of the field, and one memory in detail."""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from memjax.cli.console import Command, size
from memjax.errors import ConfigError

COLORS = {"in_state": "green", "in_context": "cyan", "in_storage": "magenta", "in_weights": "yellow"}
DIM = 512


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
        close = difflib.get_close_matches(name, CATALOG, n=3, cutoff=0.5)
        close = close or [known for known in CATALOG if name.lower() in known]
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(CATALOG)}"
        raise ConfigError(f"no memory is called {name!r}; {hint}")
    return CATALOG[name]


def at_dim(entry: Any, dim: int) -> Any:
    """The memory with its class's defaults at this width, usual values where there is no default; None: impossible."""
    usual = {"dim": dim, "heads": max(1, dim // 64), "vocab": 32_000, "hidden": 4 * dim}
    needed = {n: usual.get(n) for n, p in inspect.signature(entry.cls).parameters.items() if p.default is p.empty}
    if None in needed.values():
        return None
    try:
        return entry.build(**{"dim": dim, **needed})
    except (TypeError, ValueError):
        return None


def _print_all(out: Console) -> None:
    from memjax.catalog import CATALOG, PLACES

    name_width = max(map(len, CATALOG)) + 2
    numbers = (("year", 4), (f"state, dim {DIM}", 14), ("goldens", 7))
    text_width = min(80, max(24, out.width - name_width - sum(width + 2 for _, width in numbers) - 2))
    for place, meaning in PLACES.items():
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(place, width=name_width, no_wrap=True, header_style=f"bold {COLORS[place]}")
        table.add_column(meaning, width=text_width, header_style=COLORS[place])
        for header, width in numbers:
            table.add_column(header, width=width, justify="right", no_wrap=True, header_style="dim")
        for name, e in sorted(CATALOG.items()):
            if e.place == place:
                memory = at_dim(e, DIM)
                state = "–" if memory is None else size(memory.state_bytes(1))
                what = Text.assemble(e.summary, "\n", (e.paper, "dim"))
                table.add_row(f"  {name}", what, str(e.year), state, str(len(e.goldens)) if e.goldens else "–")
        out.print()
        out.print(table)
    out.print(
        f"\n{len(CATALOG)} memories. State: bytes of one row, with the defaults of the class. "
        "Goldens: files of reference numbers.\nmemjax list NAME shows one of them.",
        style="dim",
    )


def _print_one(out: Console, name: str, e: Any) -> None:
    from memjax.catalog import PLACES

    memory, dim = at_dim(e, DIM), DIM
    if memory is None:
        memory, dim = e.build_small(), e.small["dim"]
    out.print(Text.assemble((name, f"bold {COLORS[e.place]}"), f"   memjax.{e.place}: {PLACES[e.place]}"))
    module = sys.modules[e.cls.__module__]
    for text in (module.__doc__, f"{e.cls.__name__}: {inspect.getdoc(e.cls)}"):
        out.print()
        out.print(Text(inspect.cleandoc(text or "")))
    out.print()
    out.print(Text.assemble(("when to use  ", "bold"), e.when))
    out.print(Text.assemble(("paper        ", "bold"), f"{e.paper} ({e.year})"))
    out.print(Text.assemble(("goldens      ", "bold"), ", ".join(e.goldens) or "none"))
    out.print()
    out.print(_arrays(memory, f"arrays at dim {dim}, one row"))
    out.print(Text(f"{e.cls.__module__}.{memory}", "dim"))


def _arrays(memory: Any, title: str) -> Table:
    import jax
    import jax.numpy as jnp

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("array", "axes", "shape", "dtype"):
        table.add_column(header)
    table.add_column("bytes", justify="right")
    for kind, specs, total in (
        ("params", memory.param_specs(), memory.param_bytes()),
        ("state", memory.state_specs(1), memory.state_bytes(1)),
    ):
        for path, spec in jax.tree_util.tree_leaves_with_path(specs):
            dtype = jnp.dtype(getattr(spec, "dtype", jnp.float32))
            axes = Text(" ".join(axis or "·" for axis in spec.axes), "dim")
            bytes_ = size(math.prod(spec.shape) * dtype.itemsize)
            name = ".".join([kind, *(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)])
            table.add_row(Text(name), axes, Text(str(list(spec.shape))), dtype.name, bytes_)
        table.add_row(Text(f"{kind} in all", "bold"), "", "", "", Text(size(total), "bold"))
        if kind == "params":
            table.add_section()
    return table
