"""A model folder gives back what was saved, or an error that names the file and the field."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from memjax.data import ByteTokenizer
from memjax.errors import CheckpointError, ConfigError, TokenizerError
from memjax.in_state.gla import GatedLinearAttention
from memjax.lm import files
from memjax.lm.files import ReadingSettings, load_model, save_model
from tests.lm import tiny

MODEL = tiny.model()
PARAMS = tiny.params(MODEL)
LEAF = "body.0.0.memory.w_q"


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "model", MODEL, PARAMS, tiny.TOKENIZER, reading=tiny.READING)
    return tmp_path / "model"


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_params(folder, change):
    arrays = safetensors.numpy.load_file(folder / "params.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, folder / "params.safetensors")


def test_what_is_saved_comes_back(saved):
    loaded = load_model(saved)
    assert loaded.model == MODEL
    assert loaded.reading == tiny.READING
    assert loaded.tokenizer == tiny.TOKENIZER
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)
    logits, _ = loaded.model.apply(loaded.params, loaded.model.init_state(1), jnp.zeros((1, 3), jnp.int32))
    assert logits.shape == (1, 3, tiny.TOKENIZER.vocab_size)


def test_names_are_dotted_paths(saved):
    assert LEAF in safetensors.numpy.load_file(saved / "params.safetensors")


def test_the_hash_is_that_of_configuration_and_parameters(saved, tmp_path):
    def hash_of(name, model, params, **kw):
        return save_model(tmp_path / name, model, params, tiny.TOKENIZER, **kw)

    assert hash_of("same", MODEL, PARAMS) == load_model(saved).hash
    assert hash_of("params", MODEL, tiny.params(MODEL, 1)) != load_model(saved).hash
    assert hash_of("config", tiny.model(top_k=2), PARAMS) != load_model(saved).hash


def test_reading_settings_may_be_edited(saved):
    before = load_model(saved).hash
    edit(saved, reading={"document_tokens": 64, "passages": 1, "answer_tokens": 9})
    assert load_model(saved).reading == ReadingSettings(64, 1, 9)
    assert load_model(saved).hash == before
    edit(saved, reading={"document_tokens": 0, "passages": 1, "answer_tokens": 9})
    with pytest.raises(ConfigError, match="config.json: reading settings: document_tokens is 0"):
        load_model(saved)


def test_bfloat16_is_rounded_once_and_takes_half_the_space(saved, tmp_path):
    hash_ = save_model(tmp_path / "half", MODEL, PARAMS, tiny.TOKENIZER, dtype="bfloat16")
    loaded = load_model(tmp_path / "half")
    assert (loaded.dtype, load_model(saved).dtype) == ("bfloat16", "float32")
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, rounded)
    whole, half = ((folder / "params.safetensors").stat().st_size for folder in (saved, tmp_path / "half"))
    assert half < 0.6 * whole
    again = save_model(tmp_path / "again", MODEL, loaded.params, tiny.TOKENIZER, dtype=loaded.dtype)
    assert again == hash_ != load_model(saved).hash


def test_a_file_of_two_dtypes_is_refused(saved):
    edit_params(saved, lambda arrays: arrays.update({LEAF: arrays[LEAF].astype(jnp.bfloat16)}))
    with pytest.raises(CheckpointError, match=r"params.safetensors: array .* is (bfloat16|float32)\[.*needs"):
        load_model(saved)


def test_a_model_that_reads_no_bank_has_no_reading_settings(tmp_path):
    save_model(tmp_path / "model", MODEL, PARAMS, tiny.TOKENIZER)
    assert load_model(tmp_path / "model").reading is None


def test_truncated_parameters(saved):
    file = saved / "params.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"params.safetensors: truncated or damaged: .* \([\d,]+ bytes, needs"):
        load_model(saved)


def test_a_missing_array(saved):
    edit_params(saved, lambda arrays: arrays.pop(LEAF))
    with pytest.raises(CheckpointError, match=rf"params.safetensors: has no array '{LEAF}', needs float32\[8, 8\]"):
        load_model(saved)


def test_an_array_of_another_shape(saved):
    edit_params(saved, lambda arrays: arrays.update({LEAF: np.zeros((8, 9), np.float32)}))
    with pytest.raises(CheckpointError, match=rf"array '{LEAF}' is float32\[8, 9\], needs float32\[8, 8\]"):
        load_model(saved)


def test_an_array_too_many(saved):
    edit_params(saved, lambda arrays: arrays.update(more=np.zeros(1, np.float32)))
    with pytest.raises(CheckpointError, match="array 'more' is none of this model"):
        load_model(saved)


def test_changed_parameters(saved):
    edit_params(saved, lambda arrays: arrays.update({LEAF: arrays[LEAF] + 1}))
    with pytest.raises(CheckpointError, match="params.safetensors: field 'hash' of config.json"):
        load_model(saved)


def test_a_changed_configuration(saved):
    config = json.loads((saved / "config.json").read_text())
    edit(saved, memory={**config["memory"], "logit_scale": 2.0})
    with pytest.raises(CheckpointError, match="field 'hash'"):
        load_model(saved)
    edit(saved, memory={**config["memory"], "logit_scales": 2.0})
    with pytest.raises(ConfigError, match="config.json: .*no field 'logit_scales'"):
        load_model(saved)


@pytest.mark.parametrize("field, value", [("version", 2), ("format", "other")])
def test_another_version_or_format(saved, field, value):
    edit(saved, **{field: value})
    with pytest.raises(CheckpointError, match=f"config.json: field '{field}' is {value!r}, needs"):
        load_model(saved)


@pytest.mark.parametrize("value", ["x", None, True, [1], 1.5])
@pytest.mark.parametrize("field, needs", [("params_bytes", "int"), ("hash", "str"), ("tokenizer_hash", "str")])
def test_fields_of_another_type(saved, field, needs, value):
    edit(saved, **{field: value})
    if not (isinstance(value, str) and needs == "str"):
        with pytest.raises(CheckpointError, match=f"config.json: field '{field}' is .*, needs a {needs}"):
            load_model(saved)


@pytest.mark.parametrize("change", [{"vocab": "x"}, {"body": None}, {"eps": [1]}, {"vocab": 0}, {"vocab": 10**30}])
def test_a_configuration_that_is_no_model(saved, as_user, change):
    """Fields are not checked where they are set: what they break is told all the same."""
    memory = json.loads((saved / "config.json").read_text())["memory"]
    edit(saved, memory={**memory, **change})
    with pytest.raises((ConfigError, CheckpointError), match="config.json: |params.safetensors: ") as error:
        load_model(saved)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_files_that_are_not_there(saved):
    with pytest.raises(CheckpointError, match="nowhere.config.json: .*needs a model folder"):
        load_model(saved / "nowhere")
    (saved / "params.safetensors").unlink()
    with pytest.raises(CheckpointError, match="params.safetensors: "):
        load_model(saved)


def test_truncated_configuration(saved):
    (saved / "config.json").write_text((saved / "config.json").read_text()[:50])
    with pytest.raises(CheckpointError, match="config.json: not JSON, or truncated"):
        load_model(saved)


def test_another_tokenizer(saved):
    ByteTokenizer(("<pad>",)).save(saved / "tokenizer.json")
    with pytest.raises(TokenizerError, match="tokenizer.json: its hash is"):
        load_model(saved)


def test_a_tokenizer_larger_than_the_model(tmp_path):
    large = ByteTokenizer((*tiny.TOKENIZER.special_tokens, "<more>"))
    with pytest.raises(TokenizerError, match="has 264 tokens, the model 263"):
        save_model(tmp_path / "model", MODEL, PARAMS, large)


def test_a_memory_without_token_ids_is_no_language_model(tmp_path):
    mixer = GatedLinearAttention(8, heads=2)
    with pytest.raises(ConfigError, match="GatedLinearAttention takes no token ids"):
        save_model(tmp_path / "model", mixer, mixer.init(jax.random.key(0)), tiny.TOKENIZER)


def test_parameters_of_another_dtype_are_refused(tmp_path):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(CheckpointError, match="is bfloat16.*, needs float32"):
        save_model(tmp_path / "model", MODEL, half, tiny.TOKENIZER)


def test_what_exists_is_replaced_only_if_asked_and_if_a_model(saved, tmp_path):
    new = tiny.params(MODEL, 1)
    with pytest.raises(CheckpointError, match="exists; overwrite=True"):
        save_model(saved, MODEL, new, tiny.TOKENIZER)
    hash_ = save_model(saved, MODEL, new, tiny.TOKENIZER, overwrite=True)
    assert load_model(saved).hash == hash_
    (tmp_path / "thesis").mkdir()
    with pytest.raises(CheckpointError, match="exists and is no model"):
        save_model(tmp_path / "thesis", MODEL, new, tiny.TOKENIZER, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "thesis"]


def test_an_interruption_leaves_the_old_model(saved, tmp_path, monkeypatch):
    before = load_model(saved).hash

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_hash", interrupt)  # the parameters are written by then
    with pytest.raises(KeyboardInterrupt):
        save_model(saved, MODEL, tiny.params(MODEL, 1), tiny.TOKENIZER, overwrite=True)
    monkeypatch.undo()
    assert load_model(saved).hash == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
