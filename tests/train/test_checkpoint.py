import json
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from memjax import Repeat, Residual, from_config, to_config
from memjax.errors import CheckpointError
from memjax.lm.model import FeedForward, LanguageModel
from memjax.train import checkpoint, load_params, make_optimizer

MODEL = LanguageModel(Repeat(Residual(FeedForward(8, 16)), 2), vocab=11)
CONFIG = to_config(MODEL)


class Extra(NamedTuple):
    store: Any
    count: Any


class Position:
    """A data iterator as far as a checkpoint sees it."""

    def __init__(self, at):
        self.at = at

    def get_state(self):
        return {"next_index": self.at}

    def set_state(self, state):
        self.at = state["next_index"]


def _drawn(seed, tree):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda a: jnp.asarray(draw(size=a.shape), a.dtype), tree)


PARAMS = jax.eval_shape(MODEL.init, jax.random.key(0))
ABSTRACT = {"params": PARAMS, "opt_state": jax.eval_shape(optax.adam(1e-3).init, PARAMS)}


def _save(directory, step, **changes):
    parts = {**_drawn(step, ABSTRACT), "key": jax.random.key(5), "config": CONFIG, "data_iterator": Position(step)}
    return checkpoint.save(directory, step, **{**parts, **changes})


def _assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    _save(directory, 3)
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run") / "step_00000003"


def _restore(directory, **changes):
    return checkpoint.restore(directory, **{**ABSTRACT, "config": CONFIG, **changes})


# ---------------------------------------------------------------------------------------------- there and back


def test_everything_comes_back_to_the_bit(saved):
    data = Position(0)
    got = _restore(saved, data_iterator=data)
    _assert_same({"params": got.params, "opt_state": got.opt_state}, _drawn(3, ABSTRACT))
    assert (got.step, data.at, got.extra) == (3, 3, None)
    assert jax.random.uniform(got.key) == jax.random.uniform(jax.random.key(5))


def test_dtypes_subnormals_nans_and_raw_keys_survive(tmp_path):
    extra = Extra(jnp.asarray([1e-40, jnp.nan, -0.0], jnp.bfloat16), jnp.int32(7))
    params = {"w": jnp.asarray([1e-42, jnp.inf, -0.0, jnp.nan], jnp.float32)}
    checkpoint.save(
        tmp_path, 1, params=params, opt_state=optax.EmptyState(), key=jax.random.PRNGKey(9), config={}, extra=extra
    )
    got = checkpoint.restore(tmp_path, params=params, opt_state=optax.EmptyState(), extra=extra)
    _assert_same((got.params, got.opt_state, got.extra), (params, optax.EmptyState(), extra))
    np.testing.assert_array_equal(got.key, jax.random.PRNGKey(9))


def test_a_memory_is_rebuilt_from_the_file_alone(saved):
    for path in (saved, saved / "step_00000003"):
        config, params = load_params(path)
        assert from_config(config) == MODEL
        _assert_same(params, _drawn(3, ABSTRACT)["params"])


def test_restore_follows_the_sharding_of_today(saved):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec(None, "x"))
    whole = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), PARAMS)
    abstract["embed"] = jax.ShapeDtypeStruct((11, 8), jnp.float32, sharding=spread)
    _, params = load_params(saved, abstract)
    assert params["embed"].sharding == spread
    _assert_same(params, _drawn(3, ABSTRACT)["params"])


def test_the_newest_finished_step_counts_and_old_ones_are_deleted(tmp_path):
    assert checkpoint.finished_steps(tmp_path / "none") == []
    for step in (5, 10, 15):
        _save(tmp_path, step)
    (tmp_path / "step_00000020.tmp").mkdir()  # killed while it was written, or while orbax wrote into it
    (tmp_path / "step_00000020.tmp.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.finished_steps(tmp_path) == [5, 10, 15]
    assert _restore(tmp_path).step == 15 and _restore(tmp_path, step=5).step == 5
    checkpoint.delete_old(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000015"]
    _save(tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000015", "step_00000020"]


# ---------------------------------------------------------------------------------------------- refusals


def test_no_checkpoint_and_a_second_one_of_the_same_step(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"needed any checkpoint, finished steps are \[\]"):
        _restore(tmp_path)
    with pytest.raises(CheckpointError, match=r"needed step 4, finished steps are \[3\]"):
        _restore(saved, step=4)
    with pytest.raises(CheckpointError, match="there is a checkpoint of step 3 already"):
        _save(saved, 3)


def test_the_first_field_of_another_config_is_named(saved):
    other = to_config(LanguageModel(Repeat(Residual(FeedForward(8, 24)), 2), vocab=11))
    with pytest.raises(CheckpointError, match=r"step_00000003: config\.body\.block\.memory\.hidden is 16 .* needed 24"):
        _restore(saved, config=other)
    with pytest.raises(CheckpointError, match=r"config\.seed is absent in the checkpoint, needed 0"):
        _restore(saved, config={**CONFIG, "seed": 0})
    assert _restore(saved, config=None).step == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(embed=jax.ShapeDtypeStruct((11, 8), jnp.bfloat16)), r"float32\[11, 8\] .* needed bfloat16"),
        (lambda p: p.update(embed=jax.ShapeDtypeStruct((12, 8), jnp.float32)), r"needed float32\[12, 8\]"),
        (lambda p: p.update(bias=jax.ShapeDtypeStruct((2,), jnp.float32)), r"has no params/bias, needed float32\[2\]"),
        (lambda p: p.pop("norm"), r"params/norm is float32\[8\] in the checkpoint, needed no such array"),
    ],
)
def test_another_structure_shape_or_dtype_is_named(saved, capfd, change, message):
    abstract = {**ABSTRACT, "params": dict(PARAMS)}
    change(abstract["params"])
    with pytest.raises(CheckpointError, match=message) as error:
        _restore(saved, **abstract)
    assert len(str(error.value)) < 300 and capfd.readouterr().err == ""


def test_another_optimizer_is_named(saved):
    opt_state = jax.eval_shape(make_optimizer(MODEL, steps=10).init, PARAMS)
    with pytest.raises(CheckpointError, match="opt_state/"):
        _restore(saved, opt_state=opt_state)


def test_what_was_not_stored_is_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match="has no extra"):
        _restore(saved, extra={"a": jnp.zeros(1)})
    _save(tmp_path, 1, data_iterator=None)
    with pytest.raises(CheckpointError, match="has no data position"):
        _restore(tmp_path, data_iterator=Position(0))


def test_what_is_no_json_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"data_iterator.get_state\(\) is .*, needs JSON values"):
        _save(tmp_path, 1, data_iterator=Position({1, 2}))
    with pytest.raises(CheckpointError, match=r"config is \{'dim': array\(3\)\}, needs JSON values"):
        _save(tmp_path, 1, config={"dim": np.asarray(3)})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_or_breaks(saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(CheckpointError, match=r"written: needs [\d,]+ bytes, the disk has 10 left"):
            _save(tmp_path, 4)
    full = OSError(28, "No space left on device")
    for verb, call in (("written", lambda: _save(tmp_path, 4)), ("read", lambda: _restore(saved))):
        with monkeypatch.context() as patch:
            for name in ("save_checkpointables", "load_checkpointables"):
                patch.setattr(ocp, name, lambda *_: (_ for _ in ()).throw(full))
            with pytest.raises(CheckpointError, match=rf"step_0000000\d: can't be {verb}: No space left on device"):
                call()
    assert checkpoint.finished_steps(tmp_path) == []
    _save(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004"]


# ---------------------------------------------------------------------------------------------- damage


def _files(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.stat().st_size)


def test_any_file_missing_cut_or_flipped_is_named(copied, capfd):
    names = _files(copied)
    assert "checkpoint.json" in names and len(names) > 10
    for name in names:
        file = copied / name
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        cut = whole[: len(whole) // 2]
        for damage, message in ((None, "missing"), (cut, "truncated"), (bytes(flipped), "damaged")):
            file.unlink()
            if damage is not None:
                file.write_bytes(damage)
            with pytest.raises(CheckpointError) as error:
                _restore(copied.parent)
            assert str(file) in str(error.value) and message in str(error.value)
            file.write_bytes(whole)
    assert _restore(copied.parent).step == 3
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("text", ["", "[1]", '"x"', "[" * 100_000, '{"crc32": ' + "1" * 5000 + "}", "{}", "\ud800"])
def test_a_manifest_that_is_none(copied, text):
    (copied / "checkpoint.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="checkpoint.json: the file is truncated or damaged"):
        _restore(copied.parent)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "3"), ("step", -1), ("config", None), ("key", 7), ("key", {"impl": "fry", "data": [0, 5]}),
        ("key", {"impl": None, "data": [10**30]}), ("data", {"at": 3}), ("files", ["a"]), ("files", {"../x": [1, 1]}),
        ("files", {"a": [1]}), ("files", {"/etc/passwd": [1, 1]}), ("files", ...),
    ],
)  # fmt: skip
def test_a_forged_manifest_is_refused_by_field(copied, field, value):
    """With a right checksum: what an author could write who knows the format."""
    manifest = json.loads((copied / "checkpoint.json").read_text())
    del manifest["crc32"]
    manifest[field] = value
    if value is ...:
        del manifest[field]
    manifest["crc32"] = checkpoint._crc32_of(manifest)
    (copied / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"checkpoint.json: field '{field}' is ") as error:
        _restore(copied.parent, data_iterator=Position(0))
    assert "\n" not in str(error.value)


def test_another_format_is_refused(copied):
    file = copied / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: format is 99, needed 1"):
        load_params(copied)
