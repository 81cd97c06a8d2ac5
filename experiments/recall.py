"""What memories recall: accuracy against the bytes of the state, state tracking, and length, as small trainings.

    python -m experiments.recall --jobs 2   # goes on where it stopped; an hour or two on two cores
    python -m experiments.recall --quick    # two memories, a few steps

Every memory learns multi-query associative recall (two layers without feed-forward blocks, 16 pairs at most) at three
sizes of its state, the first nine of the list below, or one. The learning rate is chosen once per memory, at the middle
size with seed 0. Each training is one file in the output folder; those that are there are not made again.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments import begun, recorded, settings, trainings
from experiments.trainings import Layers, Run, in_processes, over_sizes, summarised, table

Part = Literal["recall", "parity", "length"]
ATTENTION = "attention"


@dataclass(frozen=True, kw_only=True)
class Config(trainings.Config):
    """What is trained."""

    parts: tuple[Part, ...] = ("recall", "parity", "length")
    memories: tuple[str, ...] = ()
    """Names of the table below; none: all."""
    output: Path = Path("build/recall")


QUICK: dict[str, Any] = {
    "memories": (ATTENTION, "gated_delta_net"), "seeds": (0,), "learning_rates": (5e-3,), "steps": 20, "rows": 64,
}  # fmt: skip


def heads(name: str, *sizes: int, **fields: Any) -> tuple[Layers, ...]:
    """One head of 8, 16 or 32 keys and values: a state of so many squared."""
    return tuple((((name, {"head_dim": n, **fields}),) * 2) for n in sizes)


def based(features: int, window: int) -> Layers:
    """A layer of Based and one of attention over a small window, as in its paper."""
    fields = {"heads": 1, "feature_dim": features, "head_v_dim": 16}
    return ("based", fields), ("sliding_window_attention", {"window": window, "rotary": False})


THREE, ONE = (8, 16, 32), (16,)
CONTESTANTS: dict[str, tuple[Layers, ...]] = {
    # the published order is about these
    ATTENTION: ((("sliding_window_attention", {}),) * 2,),
    "gated_delta_net": heads("gated_delta_net", *THREE),
    "delta_net": heads("delta_net", *THREE),
    "gla": heads("gla", *THREE),
    "mamba2": tuple((("mamba2", {"expand": 1, "head_dim": 64, "state_size": n}),) * 2 for n in (4, 16, 64)),
    "retnet": heads("retnet", *THREE),
    "linear_attention": heads("linear_attention", *THREE, feature_map="elu", normalize=True),
    "based": (based(4, 8), based(8, 8), based(8, 16)),
    "mom": tuple(
        (("mom", {"memory": ("gated_delta_net", {"head_dim": n}), "num_memories": 4, "top_k": 1}),) * 2 for n in THREE
    ),
    # the others
    "simple_gla": heads("simple_gla", *ONE, gate_logit_normalizer=64.0),  # with 16 it forgets a row's first pairs
    "kda": heads("kda", *ONE),
    "gdn2": heads("gdn2", *ONE),
    "gated_deltaproduct": heads("gated_deltaproduct", *ONE, allow_neg_eigval=False),  # like Gated DeltaNet's
    "rwkv7": heads("rwkv7", *ONE),
    "mesa_net": heads("mesa_net", *ONE),
    "log_linear_attention": (
        (("log_linear_attention", {"expand": 1, "head_dim": 64, "state_size": 16, "max_length": 64}),) * 2,
    ),
    "hgrn": ((("hgrn", {}),) * 2,),
    "hgrn2": ((("hgrn2", {"expand_ratio": 16}),) * 2,),
    "mamba": ((("mamba", {"expand": 1, "state_size": 16}),) * 2,),
    "recurrentgemma_lru": ((("recurrentgemma_lru", {"heads": 1}),) * 2,),
    "window 8": ((("sliding_window_attention", {"window": 8}),) * 2,),
    "hybrid 3:1": (
        (("sliding_window_attention", {}),) + (("gated_delta_net", {"head_dim": 16}),) * 3,
    ),
    "hybrid 3:1, attention last": (
        (("gated_delta_net", {"head_dim": 16}),) * 3 + (("sliding_window_attention", {}),),
    ),
    "attention, 4 layers": ((("sliding_window_attention", {}),) * 4,),
}  # fmt: skip
ORDER = list(CONTESTANTS)[:9]
PARITY: dict[str, Layers] = {
    "beta in (0, 2)": (("gated_delta_net", {"heads": 2, "head_dim": 16, "allow_neg_eigval": True}),),
    "beta in (0, 1)": (("gated_delta_net", {"heads": 2, "head_dim": 16}),),
}


SCORES: dict[Part, tuple[str, str]] = {
    "recall": ("accuracy", "right answers"),
    "parity": ("last", "rows whose last answer is right"),  # the first tokens of a parity are easy
    "length": ("exact", "passkeys with every digit right"),
}


# ---------------------------------------------------------------------------------------------- one training


def setting_of(part: str) -> Any:
    """The task of a part: recall as the sheet of MQAR sizes it, parity, or passkeys up to 8 times the length."""
    from memjax.tasks import SETTINGS
    from memjax.tasks.passkey import Passkey
    from memjax.tasks.task import slices

    if part == "length":
        passkeys = {t: Passkey(t) for t in (512, 1024, 2048, 4096)}
        return replace(
            SETTINGS["passkey"], train=tuple(Passkey(t) for t in (128, 256, 384, 512)), test=slices("T", passkeys),
            batch=16, steps=1000,
        )  # fmt: skip
    return SETTINGS["mqar" if part == "recall" else part]


def layers_of(run: Run) -> Layers:
    """The layers of a run; for passkeys the middle size."""
    return PARITY[run.contestant] if run.part == "parity" else CONTESTANTS[run.contestant][run.size]


def train(config: Config, run: Run) -> dict[str, Any]:
    """The result of one run, from its file if it is there."""
    return trainings.train(config, run, layers_of(run), setting_of(run.part))


# ---------------------------------------------------------------------------------------------- the parts


def names_of(config: Config, part: Part) -> tuple[str, ...]:
    """The contestants of a part."""
    if part == "parity":
        return tuple(PARITY)
    names = config.memories or tuple(CONTESTANTS)
    return names if part == "recall" else tuple(name for name in names if name in ORDER)


def results(config: Config, part: Part, name: str) -> list[dict[str, Any]]:
    """All that is asked of a contestant, trained or read from its files.

    Recall and parity: the learning rates at the middle size, then every size with every seed at the best of them.
    Length: passkeys at 1, 2, 4 and 8 times the length of training, the middle size, one seed.
    """
    sizes = 1 if part == "parity" else len(CONTESTANTS[name])
    rates, seeds = config.learning_rates, config.seeds
    if part == "length":
        return [train(config, Run(part, name, sizes // 2, None, seeds[0]))]
    return over_sizes(partial(train, config), part, name, sizes=sizes, learning_rates=rates, seeds=seeds)


# ---------------------------------------------------------------------------------------------- what it shows


def claims(body: Mapping[str, Any]) -> dict[str, bool]:
    """What is published, and whether it holds here; what was not run is left out."""
    by = {(row["contestant"], row["size"]): row for row in body.get("recall", [])}
    found: dict[str, bool] = {}

    def say(text: str, holds: Any, *needed: tuple[str, int]) -> None:
        if all(key in by for key in needed):
            found[text] = bool(holds(*(by[key] for key in needed)))

    score = lambda row, of="mean": statistics.fmean(row[of].values())  # noqa: E731
    over = lambda a, b: score(a) >= score(b)  # noqa: E731
    rises = lambda a, b: score(b, "low") > score(a, "high")  # noqa: E731
    near = lambda a, b: abs(a["mean"]["K=16"] - b["mean"]["K=16"]) <= 0.03  # noqa: E731
    gdn, linear, delta, gla = (("gated_delta_net", 1), ("linear_attention", 1), ("delta_net", 1), ("gla", 1))
    mamba2, four = ("mamba2", 1), ("attention, 4 layers", 0)  # of 10 KB, as 32 x 32 of the others
    say("attention recalls K=16 above 0.95", lambda a: a["mean"]["K=16"] > 0.95, (ATTENTION, 0))
    say("Gated DeltaNet 16x16 recalls K=8 above 0.8", lambda a: a["mean"]["K=8"] > 0.8, gdn)
    say("Gated DeltaNet 16x16 is above linear attention 16x16", over, gdn, linear)
    say("3:1 with the attention first is within 0.03 of attention with as many layers", near, ("hybrid 3:1", 0), four)
    say("and so it is with the attention last", near, ("hybrid 3:1, attention last", 0), four)
    say("Gated DeltaNet >= DeltaNet, 16x16", over, gdn, delta)
    say("DeltaNet >= GLA, 16x16", over, delta, gla)
    say("DeltaNet >= Mamba-2, 10 KB", over, ("delta_net", 2), mamba2)
    say("GLA >= RetNet, 16x16", over, gla, ("retnet", 1))
    say("GLA >= linear attention, 16x16", over, gla, linear)
    say("Mamba-2 >= RetNet, 10 KB", over, mamba2, ("retnet", 2))
    say("Based rises with the feature size", rises, ("based", 0), ("based", 1))
    say("Based rises with the window", rises, ("based", 1), ("based", 2))
    say("MoM is above one of its memories alone, 16x16", over, ("mom", 1), gdn)
    for row in body.get("parity", []):
        mean = row["mean"]
        if row["contestant"].endswith("2)"):
            found[f"parity with {row['contestant']} is solved at the length of training"] = mean["T=32"] > 0.995
        else:
            found[f"parity with {row['contestant']} is at chance"] = all(abs(x - 0.5) < 0.06 for x in mean.values())
    return found


def main(config: Config) -> dict[str, Any]:
    if unknown := [name for name in config.memories if name not in CONTESTANTS]:
        raise SystemExit(f"--memories: no contestant is called {unknown[0]!r}; there are {', '.join(CONTESTANTS)}")
    from memjax import plots

    config = begun(config, QUICK)
    calls: list[tuple[Config, Part, str]]
    calls = [(config, part, name) for part in dict.fromkeys(config.parts) for name in names_of(config, part)]
    if config.jobs > 1:
        in_processes(config.jobs, config.device, results, calls)
    body: dict[str, Any] = {"config": settings(config)}
    for part in dict.fromkeys(config.parts):
        rows = [row for call in calls if call[1] == part for row in results(*call)]
        score, of = SCORES[part]
        body |= {part: summarised(rows, score), f"{part}_runs": rows}
        table(f"{part}: share of {of}, mean (worst to best seed)", body[part])
    body["claims"] = claims(body)
    if not config.quick:
        for text, holds in body["claims"].items():
            print(f"{'holds' if holds else 'FAILS':>6}  {text}")
    path = recorded("recall", body, config)
    if path and "recall" in body:
        plots.plot_recall(path, path.with_name("recall.png"))
    return body


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
