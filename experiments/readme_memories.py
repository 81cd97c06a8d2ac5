"""The README's tables of what memories recall, how they model text beyond their training, and what decoding costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from experiments.markdown import missing, source, table, tokens

Record = dict[str, Any] | None
RECALL = "python -m experiments.recall --jobs 2 --record"
HYBRID = "python -m experiments.hybrid_ratio --jobs 2 --record"
LANGUAGE = "python -m experiments.language_model --record"
DECODE = "python -m experiments.decode_cost --record"


def recall_picture(record: Record) -> str:
    """The picture that the experiment has drawn."""
    if record is None:
        return f"*The picture of what a state recalls stands here once `{RECALL}` has run.*"
    return "![Right answers to recalled pairs against the bytes of the state](experiments/records/recall.png)"


def recall(record: Record) -> str:
    """A row for each memory at its middle size, best first, and which of the published claims hold."""
    if record is None:
        return missing(RECALL)
    contestants = dict.fromkeys(row["contestant"] for row in record["recall"])
    sizes = {name: [row for row in record["recall"] if row["contestant"] == name] for name in contestants}
    middle = sorted((rows[len(rows) // 2] for rows in sizes.values()), key=lambda row: -row["mean"]["K=16"])
    far = {row["contestant"]: row["mean"] for row in record.get("length", [])}
    longest = max((int(name[2:]) for mean in far.values() for name in mean), default=0)
    rows = []
    for row in middle:
        scores = [f"{row['mean'][k]:.2f} ({row['low'][k]:.2f} to {row['high'][k]:.2f})" for k in row["mean"]]
        found = far.get(row["contestant"], {}).get(f"T={longest}")
        passkey = () if not far else ("–" if found is None else f"{found:.2f}",)
        rows.append((f"`{row['contestant']}`", f"{row['state_bytes']:,}", *scores, *passkey))
    claims = record["claims"]
    said = [
        f"{what}: {'; '.join(text for text, holds in claims.items() if holds == which) or 'none'}."
        for what, which in (("Holds here", True), ("Does not hold here", False))
    ]
    header = ("memory", "bytes of state", "4 pairs", "8 pairs", "16 pairs")
    header += (f"passkey, {tokens(longest)} tokens",) if far else ()
    edge = max(record["config"]["learning_rates"])
    chosen = {row["contestant"]: row["learning_rate"] for row in record["recall"]}
    said.append(
        f"The learning rate is the best of {', '.join(f'{r:g}' for r in record['config']['learning_rates'])} for the "
        f"middle size on the first seed's rows, for {list(chosen.values()).count(edge)} of {len(chosen)} the largest; "
        "passkeys: one seed, one rate."
    )
    return "\n\n".join((table(header, rows), " ".join(said), source(record, RECALL)))


def hybrid_ratio(record: Record) -> str:
    """Right answers to 16 pairs by the ratio of linear to full layers."""
    if record is None:
        return missing(HYBRID)
    by = {(row["contestant"], row["size"]): row for row in record["recall"]}
    cell = lambda row: "{:.2f} ({:.2f} to {:.2f})".format(*(row[of]["K=16"] for of in ("mean", "low", "high")))  # noqa: E731
    ratios = record["ratios"]
    header = ("16 pairs, 4 layers", *ratios, "all full")
    full = cell(by["attention", 0])
    names = [name for name in dict.fromkeys(name for name, _ in by) if name != "attention"]
    rows = [(f"`{name}`, 8 x 8", *(cell(by[name, i]) for i in range(len(ratios))), full) for name in names]
    return table(header, rows) + "\n\n" + source(record, HYBRID)


def language_model(record: Record) -> str:
    """Bits per byte of held-out text in each stretch beyond the length of training."""
    if record is None:
        return missing(LANGUAGE)
    rows = []
    for name in dict.fromkeys(run["memory"] for run in record["runs"]):
        same = [run for run in record["runs"] if run["memory"] == name]
        bits = [f"{statistics.fmean(v):.3f}" for v in zip(*(run["bits_per_byte"] for run in same), strict=True)]
        forgetting = f"{statistics.fmean(run['forgetting'][-1] for run in same):.3f}"
        rows.append((f"`{name}`", f"{same[0]['state_bytes']:,}", *bits, forgetting))
    multiples = record["multiples"]
    between = [f"{a}x to {b}x" for a, b in zip(multiples, multiples[1:], strict=False)]
    header = ("memory", "bytes of state", f"up to {multiples[0]}x", *between, f"{between[-1]}, state dropped")
    config = record["config"]
    about = (
        f"Bits per byte of held-out text by its distance from the beginning, in windows of {config['context']} tokens, "
        f"the length of training; {config['layers']} layers of width {config['dim']}, {config['steps']} updates, one "
        f"learning rate, {seeds(len(config['seeds']))}. Each stretch is other text: compare within a column, and the "
        "last two columns, of which the second forgets the state at each window. "
    )
    return table(header, rows) + "\n\n" + about + source(record, LANGUAGE)


def decode_cost(record: Record) -> str:
    """Microseconds of a decoded token after short and long histories."""
    if record is None:
        return missing(DECODE)
    histories = sorted({row["history"] for row in record["rows"]})
    rows = []
    for name in dict.fromkeys(row["memory"] for row in record["rows"]):
        by = {row["history"]: row for row in record["rows"] if row["memory"] == name}
        first, last = by[histories[0]], by[histories[-1]]
        state = f"{first['state_bytes'] / 2**20:.2g}"
        if first["state_bytes"] != last["state_bytes"]:
            state += f" to {last['state_bytes'] / 2**20:,.0f}"
        ratio = f"{last['median'] / first['median']:.2f}"
        rows.append((f"`{name}`", state, *(f"{1e6 * by[n]['median']:.0f}" for n in histories), ratio))
    header = ("µs a token after a history of", "MiB of state", *map(tokens, histories), "last / first")
    config = record["config"]
    about = f"One layer of width {config['dim']}; medians of {config['repeats']} runs taken in turns. "
    return table(header, rows) + "\n\n" + about + source(record, DECODE)


def seeds(n: int) -> str:
    """ "one seed", "3 seeds"."""
    return "one seed" if n == 1 else f"{n} seeds"


BLOCKS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("recall_picture", recall_picture),
    ("recall", recall),
    ("hybrid_ratio", hybrid_ratio),
    ("language_model", language_model),
    ("decode_cost", decode_cost),
)
"""Block of the README -> how it is drawn from the newest record of the experiment that it is named after."""
