"""The README's table of the ops, from the newest record of `memjax bench ops`."""

from __future__ import annotations

from typing import Any

from experiments.markdown import missing, table, tokens

BENCH = "memjax bench ops --out experiments/records"


def ops(record: dict[str, Any] | None) -> str:
    """Times and memory of the ops at the shape that the peers share, and how time grows with the length."""
    if record is None:
        return missing(BENCH)
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
