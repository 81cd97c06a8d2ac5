"""Draws the tables and the picture of README.md from the catalog and from the newest record.

    python -m experiments.readme_tables

Each stands between two comments, <!-- name --> and <!-- /name -->, and what is between them is replaced: `places` and
`catalog` (memjax.catalog), and the others from the newest record of the experiment of that name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments import RECORDS, readme_bank, readme_memories, readme_ops
from experiments.markdown import table
from memjax.catalog import CATALOG, PLACES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
GROWS = {"in_state": "no", "in_context": "up to its window", "in_storage": "with each document", "in_weights": "no"}


def places() -> str:
    """The four places, how many memories each has, and the first of them."""
    rows = []
    for place, meaning in PLACES.items():
        names = sorted(name for name, entry in CATALOG.items() if entry.place == place)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        link = f"[`memjax/{place}/`](memjax/{place})"
        rows.append((link, meaning, GROWS[place], f"{len(names)}: {shown}"))
    return table(("folder", "the memory is", "grows with the input", "memories"), rows)


def catalog() -> str:
    """One row a memory, by place and name; the name leads to its file."""
    rows = []
    for place in PLACES:
        for name, entry in sorted(CATALOG.items()):
            if entry.place == place:
                file = entry.path.rpartition(".")[0].replace(".", "/") + ".py"
                paper = entry.paper if str(entry.year) in entry.paper else f"{entry.paper} ({entry.year})"
                paper = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
                goldens = str(len(entry.goldens)) if entry.goldens else "–"
                rows.append((f"[`{name}`]({file})", entry.summary, f"`{place}`", paper, goldens))
    return table(("memory", "what it is", "place", "paper", "goldens"), rows)


def newest(experiment: str, folder: Path = RECORDS) -> dict[str, Any] | None:
    """The newest record of an experiment, with its file's "name"; None if there is none.

    Records of the ops without the times that are shown, of a run with --parts or --shapes, are passed over.
    """
    records = [{**json.loads(path.read_text()), "name": path.name} for path in folder.glob(f"{experiment}-*.json")]
    if experiment == "bench_ops":
        lengths = [{row["shape"]["t"] for row in record.get("times", [])} for record in records]
        records = [r for r, ts in zip(records, lengths, strict=True) if 4096 in ts]
    return max(records, key=lambda record: (record["date"], record["name"]), default=None)


def redraw(text: str, folder: Path = RECORDS) -> str:
    """The README with every block drawn anew. Raises SystemExit naming a block that it lacks."""
    blocks: dict[str, Callable[[], str]] = {
        "places": places, "catalog": catalog,
        "picture": lambda: readme_bank.picture(newest("needle_bank", folder)),
        "ops": lambda: readme_ops.ops(newest("bench_ops", folder)),
        **{
            name: partial(draw, newest(name.removesuffix("_picture"), folder))
            for name, draw in (*readme_bank.BLOCKS, *readme_memories.BLOCKS)
        },
    }  # fmt: skip
    for name, draw in blocks.items():
        found = list(re.finditer(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", text, re.DOTALL))
        if len(found) != 1:
            raise SystemExit(f"{README.name}: needs one block <!-- {name} --> to <!-- /{name} -->")
        text = f"{text[: found[0].start()]}{draw()}\n{text[found[0].end() :]}"
    return text


def main() -> None:
    from memjax.plots import plot_needle_bank

    if record := newest("needle_bank"):
        plot_needle_bank(RECORDS / record["name"], ROOT / readme_bank.PICTURE)
    README.write_text(redraw(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.name}: {len(CATALOG)} memories, record {record['name'] if record else 'none'}")


if __name__ == "__main__":
    main()
