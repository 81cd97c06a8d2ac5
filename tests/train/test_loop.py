import json
import signal
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memjax.errors import CheckpointError, ConfigError, DataError
from memjax.memory import Param, normal
from memjax.train import checkpoint, fit, make_optimizer
from memjax.train.loop import DivergedError
from tests.train import runs
from tests.train.runs import CONFIG, OPTIMIZER, STEPS, Rows, run

LOGGED = [1, 2, 4, 6, 8, 10, 12]


@pytest.fixture(scope="module")
def undisturbed():
    return run()


def _lines(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def _assert_same(result, undisturbed, directory):
    """Parameters, optimizer state and every metric, bit for bit."""
    assert result.step == STEPS
    got, want = ((r.params, r.opt_state) for r in (result, undisturbed))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    plain = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in undisturbed.history]
    assert _lines(directory) == plain and [line["step"] for line in plain] == LOGGED


def test_it_trains_and_says_so(undisturbed):
    first, last = undisturbed.history[0], undisturbed.history[-1]
    assert last["loss"] < first["loss"]
    assert set(last) == {"step", "loss", "largest", "grad_norm", "tokens_per_second"}
    assert "tokens_per_second" not in first  # its time is compilation


def test_the_params_given_stay_usable():
    params = runs.params()
    fit(runs.loss, params, Rows(), optimizer=OPTIMIZER, steps=2, key=jax.random.PRNGKey(0), progress=False)
    assert np.isfinite(params["w"]).all()


# ---------------------------------------------------------------------------------------------- resume


def test_stopped_and_resumed_equals_undisturbed(undisturbed, tmp_path):
    middle = run(tmp_path, steps=7)
    assert middle.step == 7 and checkpoint.finished_steps(tmp_path) == [5, 7]
    data = Rows()
    # A stop that was asked for logs its last step, which the undisturbed run does not.
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(v) + "\n" for v in _lines(tmp_path) if v["step"] != 7))
    result = run(tmp_path, data=data, key=jax.random.key(99))  # the stored key counts
    _assert_same(result, undisturbed, tmp_path)
    assert data.at == STEPS and checkpoint.finished_steps(tmp_path) == [10, 12]


def test_ctrl_c_saves_and_raises_and_the_run_resumes(undisturbed, tmp_path):
    def before(i):
        if i == 6:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=Rows(before))
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.finished_steps(tmp_path) == [5, 7]  # the step under way was finished
    _assert_same(run(tmp_path), undisturbed, tmp_path)


def test_second_ctrl_c_stops_at_once(tmp_path):
    def before(i):
        if i == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    # A process in the background of a shell ignores the signal from its start.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, data=Rows(before))
    finally:
        signal.signal(signal.SIGINT, usual)
    assert checkpoint.finished_steps(tmp_path) == [5]


def test_killed_process_resumes_from_disk(undisturbed, tmp_path):
    command = [sys.executable, "-m", "tests.train.runs", str(tmp_path), "9"]
    child = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert checkpoint.finished_steps(tmp_path) == [5] and _lines(tmp_path)[-1]["step"] == 8
    _assert_same(run(tmp_path), undisturbed, tmp_path)


def test_a_finished_run_is_not_trained_again(tmp_path, undisturbed):
    run(tmp_path)
    data = Rows()
    result = run(tmp_path, data=data)
    assert result.history == [] and data.at == STEPS
    _assert_same(result, undisturbed, tmp_path)


def test_a_grain_dataset_goes_on_where_it_was(tmp_path):
    rows = np.arange(600, dtype=np.float32).reshape(100, 6) / 600
    seen = []

    def data():
        return grain.MapDataset.source(rows).shuffle(seed=3).repeat().map(lambda x: {"x": x}).batch(4).to_iter_dataset()

    def watched(params, batch, key):
        jax.debug.callback(lambda x: seen.append(np.array(x)), batch["x"])
        return jnp.mean((batch["x"] @ params["w"]) ** 2), {}

    specs = {"w": Param((6, 6), ("model", "model"), normal(0.3)), "b": Param((6,), ("model",), normal(0.1), "vector")}
    options = dict(optimizer=make_optimizer(specs, steps=40), key=jax.random.key(0), progress=False, config=CONFIG)
    for steps in (27, 31):  # beyond the first epoch of 25 batches
        fit(watched, runs.params(), data(), steps=steps, directory=tmp_path, **options)
    jax.effects_barrier()
    want = [batch["x"] for batch, _ in zip(data(), range(31), strict=False)]
    np.testing.assert_array_equal(np.stack(seen), np.stack(want))


# ---------------------------------------------------------------------------------------------- dispatch


def test_the_host_runs_ahead_of_the_device_and_compiles_once(monkeypatch):
    """Even where every step is logged, the next batch is asked for before the metrics of a step are waited for."""
    events, traces, device_get = [], [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: [device_get(tree), events.append("wait")][0])

    def counted(params, batch, key):
        traces.append(None)
        return runs.loss(params, batch, key)

    options = dict(optimizer=OPTIMIZER, steps=4, key=jax.random.key(0), progress=False, log_every=1)
    fit(counted, runs.params(), Rows(lambda i: events.append(f"batch {i}")), **options)
    assert events == ["batch 0", "batch 1", "wait", "batch 2", "wait", "batch 3", "wait", "wait"]
    assert len(traces) == 1


def test_data_parallel_equals_one_device_and_resumes(undisturbed, tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    run(tmp_path, steps=5)  # on one device
    result = run(tmp_path, batch_sharding=sharding)
    assert result.params["w"].sharding.device_set == set(mesh.devices.flat)
    np.testing.assert_allclose(result.params["w"], undisturbed.params["w"], atol=1e-5)


# ---------------------------------------------------------------------------------------------- refusals


def test_divergence_is_named_and_not_saved(tmp_path):
    class Poisoned(Rows):
        def __next__(self):
            batch = super().__next__()
            return {"x": batch["x"] * np.float32("nan" if self.at > 7 else 1)}

    with pytest.raises(DivergedError, match=r"not finite at step 8: loss nan, .*newest checkpoint is .*step_00000005"):
        run(tmp_path, data=Poisoned())
    assert checkpoint.finished_steps(tmp_path) == [5] and _lines(tmp_path)[-1]["step"] == 6


def test_divergence_is_found_before_a_checkpoint_between_log_lines(tmp_path):
    class Poisoned(Rows):
        def __next__(self):
            return {"x": super().__next__()["x"] * np.float32("nan" if self.at == 5 else 1)}

    with pytest.raises(DivergedError, match="step 5"):
        run(tmp_path, data=Poisoned(), log_every=100)
    assert checkpoint.finished_steps(tmp_path) == []


def test_resuming_with_another_config_names_the_field(tmp_path):
    run(tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=r"config\.width is 6 in the checkpoint, needed 7"):
        run(tmp_path, config={**CONFIG, "width": 7})


def test_data_that_ends_or_cannot_be_resumed(tmp_path):
    with pytest.raises(DataError, match="data ended after 3 batches, needs 12"):
        run(data=[next(Rows()) for _ in range(3)])
    with pytest.raises(DataError, match="data gives a list_iterator, needs get_state"):
        run(tmp_path, data=[next(Rows())])
    with pytest.raises(ConfigError, match="config is None, needed with directory"):
        run(tmp_path, config=None)
    with pytest.raises(ConfigError, match="save_every is 0"):
        run(tmp_path, save_every=0)
    with pytest.raises(ConfigError, match="log_every is 0"):
        run(log_every=0)
