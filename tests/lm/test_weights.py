"""Published layouts: read as our models, written back byte for byte, and refused by name where they don't fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax import tensors
from memjax.errors import CheckpointError, ConfigError
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.in_state.gla import GatedLinearAttention
from memjax.in_state.rwkv7 import RWKV7
from memjax.lm.weights import is_pretrained, load_pretrained, save_pretrained, special_tokens
from memjax.memory import Flow, from_config, to_config
from pallas_kernels.compat import QUICK_COMPILE
from tests.lm.published import CONFIGS, arrays, write_file, write_folder, write_shards

IDS = np.array([[3, 1, 4, 1, 5, 9, 2]], np.int32)
KINDS = tuple(CONFIGS)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def logits_of(model, params):
    apply = jax.jit(lambda p, s, x: model.apply(p, s, x)[0], compiler_options=QUICK_COMPILE)
    return np.asarray(apply(params, model.init_state(1), IDS))


# ---------------------------------------------------------------------------------------------- read and written back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_same_bytes(tmp_path, kind, dtype):
    source = write_folder(tmp_path / "source", kind, arrays(kind, np.dtype(dtype)))
    model, params = load_pretrained(source)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(params))
    assert from_config(to_config(model)) == model
    save_pretrained(tmp_path / "copy", model, params, like=source)
    assert contents(tmp_path / "copy") == contents(source)


@pytest.mark.parametrize("kind", ["gla", "state_spaces"])
def test_the_same_bytes_in_shards(tmp_path, kind):
    source = write_shards(tmp_path / "source", kind, arrays(kind))
    model, params = load_pretrained(source)
    whole = load_pretrained(write_folder(tmp_path / "whole", kind))
    assert model == whole[0]
    jax.tree.map(np.testing.assert_array_equal, params, whole[1])
    save_pretrained(tmp_path / "copy", model, params, like=source)
    assert contents(tmp_path / "copy") == contents(source)


def test_what_changed_is_written(tmp_path):
    source = write_folder(tmp_path / "source", "gla")
    model, params = load_pretrained(source)
    w_q = params["body"]["0"]["memory"]["w_q"].at[1, 2, 3].set(7.0)
    params["body"]["0"]["memory"]["w_q"] = w_q
    save_pretrained(tmp_path / "new", model, params, like=source)
    found = load_pretrained(tmp_path / "new")[1]
    jax.tree.map(np.testing.assert_array_equal, found, params)
    want = arrays("gla")
    want["model.layers.1.attn.q_proj.weight"][3, 2] = 7.0  # [out, in], and the second layer
    write_folder(tmp_path / "want", "gla", want)
    assert contents(tmp_path / "new") == contents(tmp_path / "want")


def test_the_compute_dtype(tmp_path):
    source = write_folder(tmp_path / "source", "gla")
    model, params = load_pretrained(source, dtype="bfloat16")
    assert model.dtype == "bfloat16"
    save_pretrained(tmp_path / "copy", model, params, like=source)


def test_special_tokens(tmp_path):
    assert special_tokens(write_folder(tmp_path / "a", "gla")) == (1, 2)
    assert special_tokens(write_folder(tmp_path / "b", "gla", eos_token_id=[5, 6], bos_token_id=None)) == (None, 5)
    assert special_tokens(write_folder(tmp_path / "c", "state_spaces")) == (None, None)


# ---------------------------------------------------------------------------------------------- numbers


def rms(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def standardised(x, w, b, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w + b


def swiglu(x, gate, up, down):
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def mixed(memory, found, prefix, x, shared=None):
    """A memory on float32 x, with parameters by its own table, which the golden layers test."""
    here = {n.removeprefix(prefix): a for n, a in found.items() if n.startswith(prefix)}
    params, state = tensors.read(memory.tensors(), here), memory.init_state(1)
    apply = jax.jit(memory.apply, compiler_options=QUICK_COMPILE)
    x = jnp.asarray(x, jnp.float32)
    y, _ = apply(params, state, x if shared is None else Flow(x, shared))
    return (np.asarray(y.x, np.float64), y.shared) if isinstance(y, Flow) else np.asarray(y, np.float64)


def float64_of(kind):
    return {name: a.astype(np.float64) for name, a in arrays(kind).items()}


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_of_swiglu_blocks(tmp_path, fused):
    found = arrays("gla")
    for i in range(2 if fused else 0):
        at = f"model.layers.{i}.mlp."
        both = np.concatenate([found[at + "gate_proj.weight"], found.pop(at + "up_proj.weight")])
        found[at + "gate_proj.weight"] = both
    source = write_folder(tmp_path / "source", "gla", found)
    model, params = load_pretrained(source)

    w, eps = float64_of("gla"), 1e-6
    mixer = GatedLinearAttention(16, heads=2, norm_eps=eps)
    h = w["model.embeddings.weight"][IDS]
    for at in ("model.layers.0.", "model.layers.1."):
        h = h + mixed(mixer, w, at + "attn.", rms(h, w[at + "attn_norm.weight"], eps))
        mlp = (w[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = h + swiglu(rms(h, w[at + "mlp_norm.weight"], eps), *mlp)
    want = rms(h, w["model.norm.weight"], eps) @ w["lm_head.weight"].T
    np.testing.assert_allclose(logits_of(model, params), want, rtol=1e-4, atol=1e-4)
    save_pretrained(tmp_path / "copy", model, params, like=source)
    assert contents(tmp_path / "copy") == contents(source)


def test_a_model_of_rwkv7(tmp_path):
    model, params = load_pretrained(write_folder(tmp_path / "source", "rwkv7"))
    w, eps, shared = float64_of("rwkv7"), 1e-5, {}
    h = w["model.embeddings.weight"][IDS]
    h = standardised(h, w["model.layers.0.pre_norm.weight"], w["model.layers.0.pre_norm.bias"], eps)
    for i in range(3):
        at = f"model.layers.{i}."
        memory = RWKV7(16, 8, layer=i, layers=3, decay_low_rank_dim=4, a_low_rank_dim=3, v_low_rank_dim=2,
                       gate_low_rank_dim=5)  # fmt: skip
        x = standardised(h, w[at + "attn_norm.weight"], w[at + "attn_norm.bias"], eps)
        y, shared = mixed(memory, w, at + "attn.", x, shared)
        h = h + y
        x = standardised(h, w[at + "ffn_norm.weight"], w[at + "ffn_norm.bias"], eps)
        before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)
        inner = np.maximum((x + (before - x) * w[at + "ffn.x_k"]) @ w[at + "ffn.key.weight"].T, 0) ** 2
        h = h + inner @ w[at + "ffn.value.weight"].T
    want = standardised(h, w["model.norm.weight"], w["model.norm.bias"], eps) @ w["lm_head.weight"].T
    np.testing.assert_allclose(logits_of(model, params), want, rtol=1e-4, atol=1e-4)


def test_a_model_of_mamba2(tmp_path):
    model, params = load_pretrained(write_folder(tmp_path / "source", "mamba2"))
    w, eps = float64_of("mamba2"), 1e-5
    mixer = model.body.block.memory
    h = w["backbone.embeddings.weight"][IDS]
    for at in ("backbone.layers.0.", "backbone.layers.1."):
        h = h + mixed(mixer, w, at + "mixer.", rms(h, w[at + "norm.weight"], eps))
    want = rms(h, w["backbone.norm_f.weight"], eps) @ w["lm_head.weight"].T
    np.testing.assert_allclose(logits_of(model, params), want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- configurations


def model_of(tmp_path, kind, **changes):
    return load_pretrained(write_folder(tmp_path / "source", kind, **changes))[0]


def test_fields_are_handed_on(tmp_path):
    model = model_of(tmp_path, "gated_deltanet")
    assert model.body.block.blocks[0].memory == GatedDeltaNet(16, 2, head_dim=4, expand_v=2.0, norm_eps=1e-6)
    assert model.body.block.blocks[1].memory.hidden == 256  # int(16 * 4 * 2 / 3) = 42, to a multiple of 256
    assert (model.eps, model.body.block.blocks[0].eps, model.body.n, model.vocab) == (1e-6, 1e-6, 2, 11)


def test_the_dialects_of_mamba2(tmp_path):
    ours = model_of(tmp_path, "mamba2")
    other = dict(CONFIGS["mamba2"])
    for theirs, fla in (("layer_norm_epsilon", "norm_eps"), ("rms_norm", "rmsnorm"), ("time_step_limit", "dt_limit")):
        other[fla] = other.pop(theirs)
    (tmp_path / "source" / "config.json").write_text(json.dumps(other))
    assert load_pretrained(tmp_path / "source")[0] == ours
    other["dt_limit"] = [0.0, {"__float__": "Infinity"}]
    (tmp_path / "source" / "config.json").write_text(json.dumps(other))
    assert load_pretrained(tmp_path / "source")[0] == ours
    state_spaces = load_pretrained(write_folder(tmp_path / "other", "state_spaces"))[0]
    assert state_spaces.body == ours.body and state_spaces.tied and state_spaces.vocab == 16


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("gla", {"model_type": "bert"}, "field 'model_type' is 'bert', needs one of gla, delta_net"),
        ("gla", {"feature_map": "relu"}, "field 'feature_map' is 'relu', needs None"),
        ("gla", {"use_gv": True}, "field 'use_gv' is True, needs False"),
        ("gla", {"hidden_act": "powlu"}, "field 'hidden_act' is 'powlu', needs 'swish' or 'silu'"),
        ("gla", {"attn": {"layers": [0], "num_heads": 2}}, "field 'attn' is {'layers'"),
        ("gla", {"attnres_block_size": 2}, "field 'attnres_block_size' is 2, needs None"),
        ("gla", {"hidden_size": "16"}, "field 'hidden_size' is '16', needs a whole number"),
        ("gla", {"norm_eps": 0}, "field 'norm_eps' is 0, needs a number above 0"),
        ("gla", {"norm_eps": float("inf")}, "field 'norm_eps' is inf, needs a number above 0"),
        ("gla", {"num_hidden_layers": 10**9}, "field 'num_hidden_layers' is 1000000000, needs a whole .* to 10000"),
        ("gla", {"vocab_size": 10**40}, "field 'vocab_size' is 1000000.*, needs a whole number from 1 to"),
        ("gla", {"model_type": ["gla"]}, r"field 'model_type' is \['gla'\], needs a text"),
        ("gla", {"num_heads": "2"}, "its fields describe nothing that can be built: TypeError|heads"),
        ("gla", {"num_heads": 3}, "needs dim . expand_k .* multiple of heads = 3"),
        ("delta_net", {"use_short_conv": False}, "field 'use_short_conv' is False, needs True"),
        ("delta_net", {"norm_first": True}, "field 'norm_first' is True, needs False"),
        ("gated_deltanet", {"use_short_conv": False}, "field 'use_short_conv' is False"),
        ("retnet", {"elementwise_affine": False}, "field 'elementwise_affine' is False, needs True"),
        ("rwkv7", {"value_dim": [16, 32, 16]}, "field 'value_dim' is .*, needs the same width in all layers"),
        ("rwkv7", {"hidden_act": "relu"}, "field 'hidden_act' is 'relu', needs 'sqrelu'"),
        ("mamba2", {"use_bias": True}, "field 'use_bias' is True, needs False"),
        ("mamba2", {"num_heads": 5}, "field 'num_heads' is 5, needs 4"),
        ("mamba2", {"D_has_hdim": True}, "field 'D_has_hdim' is True"),
        ("state_spaces", {"ssm_cfg": 3}, "field 'ssm_cfg' is 3, needs an object"),
        ("mamba2", {"time_step_limit": 3}, "its fields describe nothing that can be built: TypeError"),
        ("state_spaces", {"ssm_cfg": {}}, "field 'ssm_cfg' is {}, needs the layer 'Mamba2'"),
        ("state_spaces", {"attn_layer_idx": [1]}, r"field 'attn_layer_idx' is \[1\]"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, kind, changes, message):
    with pytest.raises(ConfigError, match=f"source.config.json: .*{message}"):
        model_of(tmp_path, kind, **changes)


def test_fields_that_are_missing(tmp_path):
    source = write_folder(tmp_path / "source", "gla")
    config = json.loads((source / "config.json").read_text())
    for name in ("num_kv_heads", "attn", "use_output_gate", "tie_word_embeddings", "hidden_ratio"):  # newer than some
        del config[name]
    (source / "config.json").write_text(json.dumps(config))
    assert load_pretrained(source)[0].body.n == 2
    del config["num_heads"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="config.json: has no field 'num_heads'"):
        load_pretrained(source)
    (source / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="config.json: is a list, needs an object"):
        load_pretrained(source)
    (source / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: not JSON, or truncated"):
        load_pretrained(source)
    with pytest.raises(CheckpointError, match="nowhere.config.json: No such file"):
        load_pretrained(tmp_path / "nowhere")
    assert not is_pretrained(source) and not is_pretrained(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------- files

NORM = "model.layers.1.attn.g_norm_swish_gate.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: found.pop(NORM), rf"has no tensor '{NORM}', needs \[8\]"),
        (lambda found: found.pop("lm_head.weight"), "has no tensor 'lm_head.weight'"),
        (lambda found: found.update(more=np.zeros(1, np.float32)), "tensor 'more' is none of this model"),
        (
            lambda found: found.update({NORM: np.zeros(9, np.float32)}),
            rf"tensor '{NORM}' is \[9\], needs \[8\]",
        ),
        (lambda found: found.update({NORM: np.zeros(8, np.int32)}), f"tensor '{NORM}' is I32, needs F32 or F16"),
        (
            lambda found: found.pop("model.layers.0.mlp.up_proj.weight"),
            r"no tensor 'model.layers.0.mlp.up_proj.weight'",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    found = arrays("gla")
    change(found)
    source = write_folder(tmp_path / "source", "gla", found)
    with pytest.raises(CheckpointError, match=f"source.model.safetensors: .*{message}"):
        load_pretrained(source)


def test_the_norm_beside_the_gate(tmp_path):
    """With fuse_norm false the norm has a shorter name."""
    found = {n.replace("g_norm_swish_gate", "g_norm"): a for n, a in arrays("gla").items()}
    source = write_folder(tmp_path / "source", "gla", found, fuse_norm=False)
    model, params = load_pretrained(source)
    jax.tree.map(np.testing.assert_array_equal, params, load_pretrained(write_folder(tmp_path / "b", "gla"))[1])
    save_pretrained(tmp_path / "copy", model, params, like=source)
    assert contents(tmp_path / "copy") == contents(source)


def test_tied_embeddings(tmp_path):
    found = arrays("gla")
    del found["lm_head.weight"]
    source = write_folder(tmp_path / "tied", "gla", found, tie_word_embeddings=True)
    model, params = load_pretrained(source)
    assert model.tied and "head" not in params
    save_pretrained(tmp_path / "copy", model, params, like=source)
    assert contents(tmp_path / "copy") == contents(source)

    found["lm_head.weight"] = found["model.embeddings.weight"]
    twice = write_folder(tmp_path / "twice", "gla", found, tie_word_embeddings=True)
    params["embed"] = params["embed"] + 1
    save_pretrained(tmp_path / "changed", model, params, like=twice)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "changed")[1]["norm"], params["norm"])
    found["lm_head.weight"] = found["lm_head.weight"] + found["lm_head.weight"].dtype.type(1)
    with pytest.raises(CheckpointError, match="'lm_head.weight' differs from 'model.embeddings.weight'"):
        load_pretrained(write_folder(tmp_path / "apart", "gla", found, tie_word_embeddings=True))


def test_damaged_files(tmp_path):
    source = write_folder(tmp_path / "source", "gla")
    file = source / "model.safetensors"
    data = file.read_bytes()
    for kept in (data[:-5], data[:100], b""):
        file.write_bytes(kept)
        with pytest.raises(CheckpointError, match="model.safetensors: truncated or damaged"):
            load_pretrained(source)
    file.rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither model.safetensors nor .*; pytorch_model.bin is not read"):
        load_pretrained(source)


def test_damaged_shards(tmp_path):
    source = write_shards(tmp_path / "source", "gla", arrays("gla"))
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = source / "model-00001-of-00002.safetensors"

    table["weight_map"]["model.norm.weight"] = first.name
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="00001-of-00002.safetensors: has no tensor 'model.norm.weight'"):
        load_pretrained(source)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="index.json: has no field 'weight_map'"):
        load_pretrained(source)
    table["weight_map"]["model.norm.weight"] = "../elsewhere"
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="field 'weight_map' needs the name of a file"):
        load_pretrained(source)
    table["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(table))
    load_pretrained(source)
    first.unlink()
    with pytest.raises(CheckpointError, match="00001-of-00002.safetensors: "):
        load_pretrained(source)


def test_what_is_in_two_shards(tmp_path):
    found = arrays("gla")
    source = write_shards(tmp_path / "source", "gla", found)
    second = source / "model-00002-of-00002.safetensors"
    write_file(second, {n: found[n] for n in list(found)[len(found) // 2 - 1 :]})
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors: tensor .* is in model-00001-of-00002"):
        load_pretrained(source)


def test_saving_refuses(tmp_path):
    source = write_folder(tmp_path / "source", "gla")
    model, params = load_pretrained(source)
    with pytest.raises(CheckpointError, match="source: exists"):
        save_pretrained(source, model, params, like=source)
    other = write_folder(tmp_path / "other", "retnet")
    with pytest.raises(ConfigError, match="other.config.json describes"):
        save_pretrained(tmp_path / "new", model, params, like=other)
    with pytest.raises(CheckpointError, match="params: array 'head' is missing"):
        save_pretrained(tmp_path / "new", model, {k: v for k, v in params.items() if k != "head"}, like=source)
    with pytest.raises(CheckpointError, match="params: array 'more' is none of this model"):
        save_pretrained(tmp_path / "new", model, {**params, "more": jnp.zeros(1)}, like=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "source"]
