"""The experiments on small models: which rate is taken, which results are kept, what is claimed from a summary."""

import json
from dataclasses import replace

import pytest

from experiments import hybrid_ratio, recall, trainings
from experiments.trainings import Run
from memjax.tasks import SETTINGS
from memjax.train import evaluation


def result(run, accuracy, **more):
    scores = {name: {"accuracy": accuracy, "last": 1 - accuracy} for name in ("K=4", "K=16")}
    return {**run._asdict(), "scores": scores, "state_bytes": 8, "reader_state_bytes": 9, "step_seconds": 0.1,
            "recipe": {"learning_rate": run.learning_rate}, **more}  # fmt: skip


def test_the_best_rate_at_the_middle_size_is_used_for_all():
    asked = []

    def train_one(run):
        asked.append(run)
        return result(run, {0.1: 0.2, 0.2: 0.9, 0.3: 0.5}[run.learning_rate] - 0.1 * run.seed)

    rows = trainings.over_sizes(train_one, "recall", "x", sizes=3, learning_rates=(0.1, 0.2, 0.3), seeds=(0, 2))
    assert asked[:3] == [Run("recall", "x", 1, rate, 0) for rate in (0.1, 0.2, 0.3)]
    assert [(r["size"], r["seed"], r["learning_rate"]) for r in rows] == [(s, k, 0.2) for s in range(3) for k in (0, 2)]
    (one, *_), summary = rows, trainings.summarised(rows)
    assert one["tried"] == {0.1: 0.2, 0.2: 0.9, 0.3: 0.5} and len(summary) == 3
    first = summary[0]
    assert first["mean"]["K=4"] == pytest.approx(0.8) and first["low"]["K=4"] == pytest.approx(0.7)
    assert first["high"]["K=16"] == 0.9 and first["seeds"] == 2 and first["reader_state_bytes"] == 9
    assert trainings.summarised(rows, "last")[0]["mean"]["K=4"] == pytest.approx(0.2)


class Measured:
    scores, seconds = {}, 0.0

    def plain(self):
        return {"scores": {"K=4": {"accuracy": 0.5}}, "state_bytes": 1}


def test_a_result_is_kept_as_long_as_nothing_it_depends_on_changes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: made.append(1) or Measured())
    config = trainings.Config(output=tmp_path, jobs=2, steps=3)
    run, setting = Run("recall", "hybrid 3:1, (x)", 0, 0.1, 0), SETTINGS["mqar"]
    layers = (("gated_delta_net", {"head_dim": 8}),)
    trainings.train(config, run, layers, setting)
    again = trainings.train(config, run, layers, setting)
    assert len(made) == 1 and again == json.loads((tmp_path / "results" / run.file).read_text())
    assert run.file == "recall-hybrid_3-1_x-0-0.1-0.json"
    other = (("gated_delta_net", {"head_dim": 16}),)
    trainings.train(config, run, other, setting)
    trainings.train(config, run, other, replace(setting, hidden=8))
    trainings.train(replace(config, steps=4), run, other, replace(setting, hidden=8))
    trainings.train(replace(config, steps=4, rows=64), run, other, replace(setting, hidden=8))
    assert len(made) == 5
    assert not any("0x" in repr(s) for s in SETTINGS.values())  # an address would differ in every process


def test_layers_of_each_ratio():
    config = hybrid_ratio.Config(head_dim=4)
    kinds = {
        ratio: "".join(name[0] for name, _ in hybrid_ratio.layers_of(config, Run("hybrid", "gla", i, None, 0)))
        for i, ratio in enumerate(hybrid_ratio.RATIOS)
    }
    assert kinds == {
        "4:0": "gggg", "3:1, full last": "gggs", "3:1, full first": "sggg", "2:2, full last": "gsgs",
        "2:2, full first": "sgsg",
    }  # fmt: skip
    assert [name[0] for name, _ in hybrid_ratio.layers_of(config, Run("hybrid", "attention", 0, None, 0))] == ["s"] * 4


def test_claims_follow_the_figures():
    def row(contestant, size, mean, spread=0.0):
        of = lambda x: {"K=8": x, "K=16": x}  # noqa: E731
        return {"contestant": contestant, "size": size, "mean": of(mean), "low": of(mean - spread),
                "high": of(mean + spread)}  # fmt: skip

    rows = [row("gated_delta_net", 1, 0.9), row("delta_net", 1, 0.91), row("linear_attention", 1, 0.5)]
    rows += [row("based", 0, 0.5, 0.1), row("based", 1, 0.8, 0.1), row("based", 2, 0.9, 0.1)]
    rows += [row("mamba2", 1, 0.7), row("retnet", 1, 0.2), row("retnet", 2, 0.8)]
    parity = [{"contestant": f"beta in (0, {n})", "mean": {"T=32": t, "T=64": 0.5}} for n, t in ((2, 1.0), (1, 0.6))]
    assert recall.claims({"recall": rows, "parity": parity}) == {
        "Gated DeltaNet 16x16 recalls K=8 above 0.8": True,
        "Gated DeltaNet 16x16 is above linear attention 16x16": True,
        "Gated DeltaNet >= DeltaNet, 16x16": False,
        "Mamba-2 >= RetNet, 10 KB": False,  # at equal bytes, not at equal place in the list
        "Based rises with the feature size": True,
        "Based rises with the window": False,  # within the spread of the seeds
        "parity with beta in (0, 2) is solved at the length of training": True,
        "parity with beta in (0, 1) is at chance": False,
    }
    assert recall.claims({}) == {}
