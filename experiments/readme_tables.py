"""Draws the tables and the picture of README.md from the catalog and from the newest record.

    python -m experiments.readme_tables

Each stands between two comments, <!-- name --> and <!-- /name -->, and what is between them is replaced: `places` and
`catalog` (memjax.catalog), `picture` and `needle_bank` (experiments/records/needle_bank-*.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import RECORDS
from memjax.catalog import CATALOG, PLACES

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", RECORDS / "needle_bank.png"
BENCH = "memjax bench ops --out experiments/records"
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
        return (
            f"There is no record yet: `{COMMAND}` makes one,\nand `python -m experiments.readme_tables` puts it here."
        )
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
    where, seeds = record["environment"], len(runs)
    many = (
        f"{seeds} training seeds: means, answers from the worst to the best seed" if seeds > 1 else "One training seed"
    )
    source = (
        f"{many}; the drop in right answers is relative to the first row, with the widest 95 % interval of a seed. "
        f"Trained with {tokens(record['trained_on'])} tokens of memory. Record "
        f"[`{record['name']}`](experiments/records/{record['name']}), {where['cpu'] or where['device']}, "
        f"jax {where['versions']['jax']}, made by `{COMMAND if seeds > 1 else COMMAND.partition(' --')[0]}`."
    )
    return table(("tokens", "documents", "recall@4 by router layer", "answers", "drop"), rows) + "\n\n" + source


def ops(record: dict[str, Any] | None) -> str:
    """Times and memory of the ops at the shape that the peers share, and how time grows with the length."""
    if record is None:
        return f"There is no record yet: `{BENCH}` makes one,\nand `python -m experiments.readme_tables` puts it here."
    shape = next(row["shape"] for row in record["times"] if row["shape"]["t"] == 4096)
    timed: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in record["times"]:
        if row["shape"] == shape and "mode" in row:
            timed.setdefault(row["case"], {})[row["who"], row["mode"]] = row
    rows = []
    for case, found in timed.items():
        ours = {mode: found["default", mode] for mode in ("forward", "both")}
        peer = next((who for who, _ in found if who not in ("reference", "xla", "default")), None)

        def times(who: str | None, found: Any = found, ours: Any = ours) -> str:
            """How many times longer another takes, forward / forward and backward."""
            return " / ".join(
                f"{found[who, mode]['median'] / ours[mode]['median']:.1f}" if (who, mode) in found else "–"
                for mode in ours
            )

        memory = ours["both"]["memory"]
        share = memory["peak"] / (memory["inputs"] + memory["outputs"] + memory["chunk_states"])
        rows.append((
            f"`{case}`", " / ".join(f"{1e3 * row['median']:.1f}" for row in ours.values()), times("reference"),
            f"{peer}: {times(peer)}" if peer else "–", f"{share:.2f}",
        ))  # fmt: skip
    where = record["environment"]
    peers = (
        ", ".join(f"{name} {record['peers'][name]}" for name in ("torch", "fla-core")) if "peers" in record else "none"
    )
    source = (
        f"b={shape['b']}, t={shape['t']}, h={shape['h']}, d={shape['d']}, {shape['dtype']}; medians of "
        f"{record['config']['repeats']} runs taken in turns; each pair is forward / forward and backward. Peak memory "
        f"is that of forward and backward as compiled, relative to inputs, outputs and one state a chunk. "
        f"{'Freed memory is kept for the next call, as a training loop has it. ' if record.get('keeps_memory') else ''}"
        f"{growth(record.get('scaling', []))}Record "
        f"[`{record['name']}`](experiments/records/{record['name']}), {where['cpu'] or where['device']}, "
        f"{where['cores']} cores, load {record['load_before']} before, jax {where['versions']['jax']}; peers: {peers}. "
        f"Made by `{BENCH}`."
    )
    header = ("op", "ms", "plain scan takes so many times longer", "and a peer", "peak memory")
    return table(header, rows) + "\n\n" + source


def growth(scaling: list[dict[str, Any]]) -> str:
    """By how much the time of an op grows as t doubles, or nothing if that was not measured."""
    if not scaling:
        return ""
    lengths = sorted({row["t"] for row in scaling})
    medians: dict[tuple[str, str], dict[int, float]] = {}
    for row in scaling:
        medians.setdefault((row["case"], row["mode"]), {})[row["t"]] = row["median"]
    wide = len({row["shape"]["h"] for row in scaling if "shape" in row}) > 1
    means = [(by[lengths[-1]] / by[lengths[0]]) ** (1 / (len(lengths) - 1)) for by in medians.values()]
    return (
        f"From t={tokens(lengths[0])} to {tokens(lengths[-1])} a doubling of t multiplies the time of an op by "
        f"{min(means):.2f} to {max(means):.2f} on average, a single one by at most "
        f"{max(row['ratio'] for row in scaling if row['ratio']):.2f}"
        f"{' (diagonal_scan and short_conv with four times the channels, too many for the cache)' if wide else ''}. "
    )


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
        "ops": lambda: ops(newest("bench_ops", folder)),
    }  # fmt: skip
    for name, draw in blocks.items():
        found = list(re.finditer(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", text, re.DOTALL))
        if len(found) != 1:
            raise SystemExit(f"{README.name}: needs one block <!-- {name} --> to <!-- /{name} -->")
        text = f"{text[: found[0].start()]}{draw()}\n{text[found[0].end() :]}"
    return text


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def tokens(n: int) -> str:
    """16384 -> "16K"; K is 1024."""
    return f"{n >> 20}M" if n % (1 << 20) == 0 else f"{n >> 10}K"


def main() -> None:
    from memjax.plots import plot_needle_bank

    if record := newest("needle_bank"):
        plot_needle_bank(RECORDS / record["name"], PICTURE)
    README.write_text(redraw(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{README.name}: {len(CATALOG)} memories, record {record['name'] if record else 'none'}")


if __name__ == "__main__":
    main()
