"""Draws the tables and the picture of README.md from the catalog and from the newest record.

    python -m experiments.readme_tables

Each stands between two comments, <!-- name --> and <!-- /name -->, and what is between them is replaced: `places` and
`catalog` (memjax.catalog), `picture` and `needle_bank` (experiments/records/needle_bank-*.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments import RECORDS, readme_memories, readme_ops
from experiments.markdown import missing, source, table, tokens
from memjax.catalog import CATALOG, PLACES

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", RECORDS / "needle_bank.png"
COMMAND = "python -m experiments.needle_bank --seeds 0 1 2 --record"
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


def picture(record: dict[str, Any] | None) -> str:
    """The picture of the newest record, in one line."""
    if record is None:
        return f"*The picture of what the demo measures stands here once `{COMMAND}` has run.*"
    trained, largest = record["trained_on"], record["runs"][0]["sizes"][-1]["tokens"]
    alt = f"Recall and right answers while the memory grows to {tokens(largest)} tokens, {largest // trained} times"
    return f"![{alt} the {tokens(trained)} of training]({PICTURE.relative_to(ROOT)})"


def needle_bank(record: dict[str, Any] | None) -> str:
    """The numbers of the newest record."""
    if record is None:
        return missing(COMMAND)
    runs, rows = record["runs"], []
    for same in zip(*(run["sizes"] for run in runs), strict=True):
        recall = [sum(layer) / len(same) for layer in zip(*(row["recall_at_4"] for row in same), strict=True)]
        answers = [row["accuracy"] for row in same]
        spread = f" ({min(answers):.3f} to {max(answers):.3f})" if len(same) > 1 else ""
        drops = [row for row in same if row["drop"] is not None]
        drop = "–"
        if drops:
            low, high = (pick(row["drop_interval"][i] for row in drops) for i, pick in ((0, min), (1, max)))
            drop = f"{sum(row['drop'] for row in drops) / len(drops):.1%} ({low:.1%} to {high:.1%})"
        rows.append((
            tokens(same[0]["tokens"]), f"{same[0]['documents']:,}", " / ".join(f"{r:.3f}" for r in recall),
            f"{sum(answers) / len(answers):.3f}{spread}", drop,
        ))  # fmt: skip
    seeds = len(runs)
    many = (
        f"{seeds} training seeds: means, answers from the worst to the best seed" if seeds > 1 else "One training seed"
    )
    said = (
        f"{many}; the drop in right answers is relative to the first row, with the widest 95 % interval of a seed. "
        f"Trained with {tokens(record['trained_on'])} tokens of memory. "
    ) + source(record, COMMAND if seeds > 1 else COMMAND.partition(" --")[0])
    return table(("tokens", "documents", "recall@4 by router layer", "answers", "drop"), rows) + "\n\n" + said


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
    record = newest("needle_bank", folder)
    blocks: dict[str, Callable[[], str]] = {
        "places": places, "catalog": catalog,
        "picture": lambda: picture(record), "needle_bank": lambda: needle_bank(record),
        "ops": lambda: readme_ops.ops(newest("bench_ops", folder)),
        **{name: partial(draw, newest(name.removesuffix("_picture"), folder)) for name, draw in readme_memories.BLOCKS},
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
        plot_needle_bank(RECORDS / record["name"], PICTURE)
    README.write_text(redraw(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.name}: {len(CATALOG)} memories, record {record['name'] if record else 'none'}")


if __name__ == "__main__":
    main()
