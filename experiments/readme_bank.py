"""The README's picture and tables of banks: needles in a growing memory, and passages that the packaged model finds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from experiments.markdown import missing, source, table, tokens

Record = dict[str, Any] | None
PICTURE = "experiments/records/needle_bank.png"
NEEDLES = "python -m experiments.needle_bank --seeds 0 1 2 --record"
PACKAGED = "python -m experiments.packaged_model --text build/corpora/train/* --test build/corpora/test/* --record"
TEXTS = {"essays": "essays (an FAQ of political prose)", "go": "code (Go)", "manpages": "manuals (man pages, groff)"}


def picture(record: Record) -> str:
    """The picture of the newest record, in one line."""
    if record is None:
        return f"*The picture of what the demo measures stands here once `{NEEDLES}` has run.*"
    trained, largest = record["trained_on"], record["runs"][0]["sizes"][-1]["tokens"]
    alt = f"Recall and right answers while the memory grows to {tokens(largest)} tokens, {largest // trained} times"
    return f"![{alt} the {tokens(trained)} of training]({PICTURE})"


def needle_bank(record: Record) -> str:
    """The numbers of the newest record."""
    if record is None:
        return missing(NEEDLES)
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
    ) + source(record, NEEDLES if seeds > 1 else NEEDLES.partition(" --")[0])
    return table(("tokens", "documents", "recall@4 by router layer", "answers", "drop"), rows) + "\n\n" + said


def packaged_model(record: Record) -> str:
    """How often the document that a passage's question was made of is among ten."""
    if record is None:
        return missing(PACKAGED)
    rows = []
    for row in record["passages"]:
        passages = [f"{row['recall_at_10'][who]:.3f}" for who in ("model", "BM25", "both")]
        found = " / ".join(f"{recall:.2f}" for recall in row["needles"]["recall_at_4"])
        rows.append((TEXTS.get(row["kind"], row["kind"]), f"{row['documents']:,}", *passages, found,
                     f"{row['needles']['right']:.2f}"))  # fmt: skip
    header = ("folder", "documents", "model", "BM25", "both", "needles, by router layer", "right answers")
    first, asking = record["passages"][0], record["asking"]
    more = lambda who: sum(row["recall_at_10"][who] > row["recall_at_10"]["BM25"] for row in record["passages"])  # noqa: E731
    said = (
        f"The model alone finds more than BM25 in {more('model')} of {len(rows)} folders, both together (`--words`) in "
        f"{more('both')}. "
        f"Recall@10 of {first['questions']} questions, each a few words of a document with a third dropped, in "
        f"{tokens(record['config']['test_tokens'])} tokens; recall@4 and answers of {first['needles']['asked']} "
        f"needles in the same bank. A question to a bank of {asking['tokens'] / 1e6:.1f}M tokens on disk: first word "
        f"after {statistics.median(asking['first_word_seconds']):.2f} s, all of the answer after "
        f"{statistics.median(asking['seconds']):.2f} s, where the process has answered one before. "
        f"{record['config']['steps'] + record['config']['more_steps']:,} steps of training, one seed. "
    )
    return table(header, rows) + "\n\n" + said + source(record, PACKAGED)


BLOCKS: tuple[tuple[str, Callable[[Record], str]], ...] = (
    ("needle_bank", needle_bank),
    ("packaged_model", packaged_model),
)
