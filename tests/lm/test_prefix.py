"""A saved prefix continues where it was saved, is refused by any other model, and is never half-written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from memjax.combinators import Residual, Stack
from memjax.errors import CheckpointError
from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.lm import prefix as prefixes
from memjax.lm.generate import Prefix, generate, read
from memjax.lm.model import LanguageModel
from memjax.lm.prefix import fingerprint, is_prefix, load_prefix, save_prefix

V = 11
ATTENTION = SlidingWindowAttention(8, heads=2, window=4)
MODEL = LanguageModel(Stack((Residual(GatedDeltaNet(8, 2, head_dim=4)), Residual(ATTENTION))), V, embed_std=1.0)
PARAMS = MODEL.init(jax.random.key(0))
PROMPT = np.random.default_rng(0).integers(0, V, (2, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def prefix():
    return read(MODEL, PARAMS, MODEL.init_state(2), PROMPT)


@pytest.fixture
def file(tmp_path, prefix):
    save_prefix(tmp_path / "a.prefix", MODEL, PARAMS, prefix)
    return tmp_path / "a.prefix"


def change(file, update, **metadata):
    """The file with other arrays or other fields."""
    with safetensors.safe_open(file, "numpy") as opened:
        fields = {**opened.metadata(), **metadata}
    arrays = safetensors.numpy.load_file(file)
    update(arrays)
    safetensors.numpy.save_file(arrays, file, fields)


def test_it_goes_on_as_if_it_had_not_been_saved(file, prefix):
    loaded = load_prefix(file, MODEL, PARAMS)
    assert jax.tree.structure(loaded) == jax.tree.structure(prefix)
    jax.tree.map(np.testing.assert_array_equal, loaded, prefix)
    want, _ = generate(MODEL, PARAMS, prefix, steps=5)
    got, _ = generate(MODEL, PARAMS, loaded, steps=5)
    np.testing.assert_array_equal(got, want)


def test_dtypes_are_kept(tmp_path, prefix):
    """A ring of keys may be bfloat16, counts are int32, and a scalar stays one."""
    half = Prefix({"a": jnp.asarray([1.5, -2.25], jnp.bfloat16), "n": jnp.int32(7)}, prefix.logits)
    arrays = prefixes._arrays(half)
    safetensors.numpy.save_file({n: np.asarray(a) for n, a in arrays.items()}, tmp_path / "half")
    found = prefixes.TensorFile(tmp_path / "half")
    for name, a in arrays.items():
        assert (found[name].dtype, found[name].shape) == (a.dtype, a.shape)
        np.testing.assert_array_equal(found[name], a)


def test_other_models_are_refused(file):
    other = jax.tree.map(lambda a: a, PARAMS)
    other["norm"] = other["norm"].at[3].add(1e-6)
    assert fingerprint(MODEL, other) != fingerprint(MODEL, PARAMS)
    with pytest.raises(CheckpointError, match=r"a.prefix: field 'model' is \w+..., this model is"):
        load_prefix(file, MODEL, other)
    model = LanguageModel(MODEL.body, V, embed_std=1.0, logit_scale=2.0)
    with pytest.raises(CheckpointError, match="a.prefix: field 'memory' is of a model with another configuration"):
        load_prefix(file, model, PARAMS)


@pytest.mark.parametrize(
    "update, fields, message",
    [
        (lambda a: None, {"version": "2"}, "field 'version' is '2', needs '1'"),
        (lambda a: None, {"format": "pt"}, "field 'format' is 'pt', needs 'memjax-prefix'"),
        (lambda a: a.pop("logits"), {}, "has no array 'logits'"),
        (lambda a: a.pop("state.body.0.memory.S"), {}, "has no array 'state.body.0.memory.S'"),
        (
            lambda a: a.update({"state.body.0.memory.S": np.zeros((2, 2, 4, 4), np.float32)}),
            {},
            r"array 'state.body.0.memory.S' is float32\[2, 2, 4, 4\], needs float32\[2, 2, 4, 8\]",
        ),
        (lambda a: a.update(more=np.zeros(1, np.float32)), {}, "array 'more' is none of this model"),
        (lambda a: a.update(logits=a["logits"][:1]), {}, "needs float32"),
    ],
)
def test_damage_is_named(file, update, fields, message):
    change(file, update, **fields)
    with pytest.raises(CheckpointError, match=f"a.prefix: .*{message}"):
        load_prefix(file, MODEL, PARAMS)


def test_files_that_are_not_there_or_not_whole(file, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: "):
        load_prefix(tmp_path / "nowhere", MODEL, PARAMS)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="a.prefix: truncated or damaged"):
        load_prefix(file, MODEL, PARAMS)
    assert not is_prefix(file)


def test_only_a_prefix_is_replaced(file, tmp_path, prefix):
    save_prefix(file, MODEL, PARAMS, prefix)
    (tmp_path / "thesis").write_text("chapter one")
    with pytest.raises(CheckpointError, match="thesis: exists and is no saved state"):
        save_prefix(tmp_path / "thesis", MODEL, PARAMS, prefix)


def test_an_interruption_leaves_the_old_file(file, tmp_path, prefix, monkeypatch):
    before = file.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prefixes.os, "fsync", interrupt)  # the new file is written by then
    with pytest.raises(KeyboardInterrupt):
        save_prefix(file, MODEL, PARAMS, Prefix(prefix.state, prefix.logits + 1))
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.prefix"]
