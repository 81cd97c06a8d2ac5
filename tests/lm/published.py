"""Small models in published layouts: names, shapes, order and config.json as the libraries write them."""

import json
import struct

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}
# What transformers adds to every config.json.
USUAL = {
    "_name_or_path": "somewhere/else", "auto_map": {"AutoConfig": "configuration.Config"}, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.02, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.48.0", "use_cache": True, "vocab_size": 11,
}  # fmt: skip
FLA = {
    **USUAL, "attn": None, "attn_mode": "chunk", "fuse_cross_entropy": True, "fuse_norm": True, "fuse_swiglu": True,
    "hidden_act": "swish", "hidden_ratio": 4, "hidden_size": 16, "intermediate_size": None, "norm_eps": 1e-06,
    "num_hidden_layers": 2,
}  # fmt: skip
CONFIGS = {
    "gla": {
        **FLA, "architectures": ["GLAForCausalLM"], "model_type": "gla", "clamp_min": None, "conv_size": 4,
        "elementwise_affine": True, "expand_k": 0.5, "expand_v": 1, "feature_map": None, "num_heads": 2,
        "num_kv_heads": None, "use_gk": True, "use_gv": False, "use_output_gate": True, "use_short_conv": False,
    },
    "delta_net": {
        **FLA, "architectures": ["DeltaNetForCausalLM"], "model_type": "delta_net", "conv_size": 4, "expand_k": 1,
        "expand_v": 1, "num_heads": 2, "qk_activation": "silu", "qk_norm": "l2", "use_beta": True, "use_gate": False,
        "use_output_norm": True, "use_short_conv": True,
    },
    "gated_deltanet": {
        **FLA, "architectures": ["GatedDeltaNetForCausalLM"], "model_type": "gated_deltanet", "conv_size": 4,
        "allow_neg_eigval": False, "expand_v": 2, "head_dim": 4, "num_heads": 2, "num_v_heads": None, "use_gate": True,
        "use_short_conv": True,
    },
    "retnet": {
        **FLA, "architectures": ["RetNetForCausalLM"], "model_type": "retnet", "elementwise_affine": True,
        "expand_k": 1, "expand_v": 2, "feature_map": None, "hidden_ratio": 2, "num_heads": 2, "num_kv_heads": None,
        "use_output_gate": True, "use_short_conv": False, "conv_size": 4,
    },
    "rwkv7": {
        **USUAL, "architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7", "a_low_rank_dim": 3, "attn": None,
        "attn_mode": "chunk", "decay_low_rank_dim": 4, "fuse_norm": True, "gate_low_rank_dim": 5, "head_dim": 8,
        "hidden_act": "sqrelu", "hidden_ratio": 4.0, "hidden_size": 16, "intermediate_size": 24, "norm_bias": True,
        "norm_eps": 1e-05, "norm_first": True, "num_heads": 2, "num_hidden_layers": 3, "use_l2warp": True,
        "v_low_rank_dim": 2, "value_dim": [16, 16, 16],
    },
    "mamba2": {
        **USUAL, "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "chunk_size": 256, "conv_kernel": 4,
        "expand": 2, "head_dim": 8, "hidden_act": "silu", "hidden_size": 16, "layer_norm_epsilon": 1e-05,
        "n_groups": 2, "num_heads": 4, "num_hidden_layers": 2, "rescale_prenorm_residual": False,
        "residual_in_fp32": True, "rms_norm": True, "state_size": 4, "time_step_floor": 0.0001,
        "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 128,
        "use_bias": False, "use_conv_bias": True,
    },
    "state_spaces": {
        "d_model": 16, "d_intermediate": 0, "n_layer": 2, "vocab_size": 11, "ssm_cfg": {
            "layer": "Mamba2", "headdim": 8, "d_state": 4, "ngroups": 2,
        }, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    },
}  # fmt: skip


def shapes(kind):
    """name -> shape, spelled out for each library, at the sizes of CONFIGS."""
    if kind in ("mamba2", "state_spaces"):
        vocab, embedding = (11, "embeddings") if kind == "mamba2" else (16, "embedding")
        found = {f"backbone.{embedding}.weight": (vocab, 16)}
        for i in range(2):
            at = f"backbone.layers.{i}."
            found |= {
                at + "mixer.A_log": (4,), at + "mixer.D": (4,), at + "mixer.conv1d.bias": (48,),
                at + "mixer.conv1d.weight": (48, 1, 4), at + "mixer.dt_bias": (4,),
                at + "mixer.in_proj.weight": (84, 16), at + "mixer.norm.weight": (32,),
                at + "mixer.out_proj.weight": (16, 32), at + "norm.weight": (16,),
            }  # fmt: skip
        return {**found, "backbone.norm_f.weight": (16,), "lm_head.weight": (vocab, 16)}
    found = {"lm_head.weight": (11, 16), "model.embeddings.weight": (11, 16)}
    for i in range(3 if kind == "rwkv7" else 2):
        at = f"model.layers.{i}."
        found |= {at + name: shape for name, shape in LAYERS[kind].items()}
        if kind == "rwkv7" and i == 0:
            found = {n: s for n, s in found.items() if ".v_lora." not in n}
            found |= {at + "pre_norm.weight": (16,), at + "pre_norm.bias": (16,)}
    if kind == "rwkv7":
        found["model.norm.bias"] = (16,)
    return {**found, "model.norm.weight": (16,)}


def _swiglu(hidden):
    return {
        "attn_norm.weight": (16,), "mlp.down_proj.weight": (16, hidden), "mlp.gate_proj.weight": (hidden, 16),
        "mlp.up_proj.weight": (hidden, 16), "mlp_norm.weight": (16,),
    }  # fmt: skip


LAYERS = {
    "gla": {
        "attn.g_norm_swish_gate.weight": (8,), "attn.g_proj.weight": (16, 16), "attn.gk_proj.0.weight": (16, 16),
        "attn.gk_proj.1.bias": (8,), "attn.gk_proj.1.weight": (8, 16), "attn.k_proj.weight": (8, 16),
        "attn.o_proj.weight": (16, 16), "attn.q_proj.weight": (8, 16), "attn.v_proj.weight": (16, 16),
        **_swiglu(256),
    },
    "delta_net": {
        "attn.b_proj.weight": (2, 16), "attn.k_conv1d.weight": (16, 1, 4), "attn.k_proj.weight": (16, 16),
        "attn.o_norm.weight": (8,), "attn.o_proj.weight": (16, 16), "attn.q_conv1d.weight": (16, 1, 4),
        "attn.q_proj.weight": (16, 16), "attn.v_conv1d.weight": (16, 1, 4), "attn.v_proj.weight": (16, 16),
        **_swiglu(256),
    },
    "gated_deltanet": {
        "attn.A_log": (2,), "attn.a_proj.weight": (2, 16), "attn.b_proj.weight": (2, 16), "attn.dt_bias": (2,),
        "attn.g_proj.weight": (16, 16), "attn.k_conv1d.weight": (8, 1, 4), "attn.k_proj.weight": (8, 16),
        "attn.o_norm.weight": (8,), "attn.o_proj.weight": (16, 16), "attn.q_conv1d.weight": (8, 1, 4),
        "attn.q_proj.weight": (8, 16), "attn.v_conv1d.weight": (16, 1, 4), "attn.v_proj.weight": (16, 16),
        **_swiglu(256),
    },
    "retnet": {
        "attn.g_norm_swish_gate.weight": (16,), "attn.g_proj.weight": (32, 16), "attn.k_proj.weight": (16, 16),
        "attn.o_proj.weight": (16, 32), "attn.q_proj.weight": (16, 16), "attn.v_proj.weight": (32, 16),
        **_swiglu(256),
    },
    "rwkv7": {
        "attn.a_lora.lora.0.weight": (3, 16), "attn.a_lora.lora.2.bias": (16,), "attn.a_lora.lora.2.weight": (16, 3),
        "attn.g_lora.lora.0.weight": (5, 16), "attn.g_lora.lora.2.weight": (16, 5), "attn.g_norm.bias": (16,),
        "attn.g_norm.weight": (16,), "attn.k_a": (16,), "attn.k_k": (16,), "attn.k_proj.weight": (16, 16),
        "attn.o_proj.weight": (16, 16), "attn.r_k": (2, 8), "attn.r_proj.weight": (16, 16),
        "attn.v_lora.lora.0.weight": (2, 16), "attn.v_lora.lora.2.bias": (16,), "attn.v_lora.lora.2.weight": (16, 2),
        "attn.v_proj.weight": (16, 16), "attn.w_lora.lora.0.weight": (4, 16), "attn.w_lora.lora.2.bias": (16,),
        "attn.w_lora.lora.2.weight": (16, 4), **{f"attn.x_{m}": (1, 1, 16) for m in "agkrvw"},
        "attn_norm.bias": (16,), "attn_norm.weight": (16,), "ffn.key.weight": (24, 16), "ffn.value.weight": (16, 24),
        "ffn.x_k": (16,), "ffn_norm.bias": (16,), "ffn_norm.weight": (16,),
    },
}  # fmt: skip


def arrays(kind, dtype=BF16):
    """Random tensors; A_log and dt_bias are float32 even in a checkpoint of bfloat16, as they are published."""
    rng = np.random.default_rng(0)
    wide = (".A_log", ".dt_bias")
    found = {
        name: (0.3 * rng.standard_normal(shape)).astype(np.float32 if name.endswith(wide) else dtype)
        for name, shape in shapes(kind).items()
    }
    if kind == "state_spaces":
        found["lm_head.weight"] = found["backbone.embedding.weight"]
    return found


def write_file(path, tensors, metadata=None):
    """The bytes as the format's description says, in the order of the dict."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, a in tensors.items():
        header[name] = {"dtype": CODES[a.dtype.name], "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def write_folder(folder, kind, tensors=None, **changes):
    """A published model, with changes of its config.json."""
    folder.mkdir()
    config = {**CONFIGS[kind], **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_file(
        folder / "model.safetensors",
        arrays(kind) if tensors is None else tensors,
        {"format": "pt", "made_by": "a test"},
    )
    return folder


def write_shards(folder, kind, tensors):
    """The same in two files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    names, half = list(tensors), len(tensors) // 2
    weight_map = {}
    for i, part in enumerate((names[:half], names[half:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        write_file(folder / file, {n: tensors[n] for n in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
