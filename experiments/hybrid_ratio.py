"""Recall against the ratio of linear to full layers: models of four layers, from all linear to all attention.

    python -m experiments.hybrid_ratio --jobs 2   # goes on where it stopped; under an hour on two cores
    python -m experiments.hybrid_ratio --quick    # one memory, a few steps

A linear layer has one head with a state of 8 x 8, too small for what is asked, so that it shows how far one or two
layers of attention make up for it. Task and recipe are those of `experiments.recall`; the learning rate is chosen for
each memory at 3:1 with the full layer first.

Source: A systematic analysis of hybrid linear attention, arXiv 2507.06457 (language modelling is flat in the ratio,
recall is not).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments import begun, recorded, settings, trainings
from experiments.trainings import Layers, Run, in_processes, over_sizes, summarised, table

LAYERS = 4
FULL = "attention"
RATIOS = ("4:0", "3:1, full last", "3:1, full first", "2:2, full last", "2:2, full first")
"""Linear to full layers, and where in its period the full one stands; `HybridStack` has it last."""


@dataclass(frozen=True, kw_only=True)
class Config(trainings.Config):
    """What is trained."""

    memories: tuple[str, ...] = ("gated_delta_net", "gla", "retnet")
    """Names of `memjax list` that have a head_dim, or an expand_k and expand_v, of their own."""
    head_dim: int = 8
    """Of a linear layer's one head."""
    learning_rates: tuple[float, ...] = (5e-3, 1.2e-2)
    output: Path = Path("build/hybrid_ratio")


QUICK: dict[str, Any] = {
    "memories": ("gated_delta_net",), "seeds": (0,), "learning_rates": (5e-3,), "steps": 20, "rows": 64,
}  # fmt: skip


def layers_of(config: Config, run: Run) -> Layers:
    """The layers of a run: its size is the number of a ratio."""
    full, linear = ("sliding_window_attention", {}), (run.contestant, {"head_dim": config.head_dim})
    if run.contestant == FULL:
        return (full,) * LAYERS
    ratio, _, place = RATIOS[run.size].partition(", ")
    linears, fulls = map(int, ratio.split(":"))
    if not fulls:
        return (linear,) * LAYERS
    period = (linear,) * (linears // fulls) + (full,)
    return (period if place == "full last" else period[::-1]) * fulls


def train(config: Config, run: Run) -> dict[str, Any]:
    """The result of one run, from its file if it is there."""
    from memjax.tasks import SETTINGS

    return trainings.train(config, run, layers_of(config, run), SETTINGS["mqar"])


def results(config: Config, name: str) -> list[dict[str, Any]]:
    """Every ratio of a memory with every seed, trained or read from its files."""
    sizes, rates = 1 if name == FULL else len(RATIOS), config.learning_rates
    return over_sizes(partial(train, config), "hybrid", name, sizes=sizes, learning_rates=rates, seeds=config.seeds)


def main(config: Config) -> dict[str, Any]:
    config = begun(config, QUICK)
    names = (*config.memories, FULL)
    if config.jobs > 1:
        in_processes(config.jobs, config.device, results, [(config, name) for name in names])
    rows = [row for name in names for row in results(config, name)]
    body = {"config": settings(config), "ratios": RATIOS, "recall": summarised(rows), "runs": rows}
    named = [
        {**row, "contestant": FULL if row["contestant"] == FULL else f"{row['contestant']} {RATIOS[row['size']]}"}
        for row in body["recall"]
    ]
    table("recall: share of right answers, mean (worst to best seed)", named)
    recorded("hybrid_ratio", body, config)
    return body


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
