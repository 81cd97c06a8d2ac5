"""Published language models: their config.json as a `LanguageModel` of ours, and the names of their tensors.

    gla, delta_net, gated_deltanet, retnet, rwkv7   flash-linear-attention
    mamba2                                          transformers, flash-linear-attention
    a config with d_model and ssm_cfg               mamba_ssm, as state-spaces publishes Mamba-2

A field that computes something our memories have is handed on. One that computes something they don't have must say
that it is off. All others, about training and speed, are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from memjax.blocks import block
from memjax.combinators import Residual, Stack
from memjax.errors import ConfigError, MemjaxError, shorten
from memjax.in_state.rwkv7 import RWKV7ChannelMixing
from memjax.lm.model import LanguageModel
from memjax.lm.rwkv import LayerNorm, Normed, RWKVLanguageModel
from memjax.lm.weights.config import Config
from memjax.lm.weights.names import Published, Run, around, stacked, under
from memjax.memory import Memory, named
from memjax.tensors import same


def published(file: Path, dtype: str = "float32") -> Published:
    """The model that a config.json describes, with this compute dtype, and where its tensors are.

    Raises:
      CheckpointError: the file is missing or no JSON.
      ConfigError: naming the file and the field: a kind of model, or a value, that is not read.
    """
    config = Config(file)
    try:
        known = _published(config, dtype)
        named(known.model.param_specs())
        return known
    except MemjaxError:
        raise
    except Exception as error:  # fields of the wrong type fail wherever they are used first
        said = f"{type(error).__name__}: {shorten(error)}"
        raise ConfigError(f"{file}: its fields describe nothing that can be built: {said}") from error


def _published(config: Config, dtype: str) -> Published:
    kind = config.get("model_type", "")
    if not isinstance(kind, str):
        raise config.error("model_type", "a text")
    if not kind and "ssm_cfg" in config.values:
        return _state_spaces(config, dtype)
    if kind == "mamba2":
        return _mamba2(config, dtype)
    if kind == "rwkv7":
        return _rwkv7(config, dtype)
    if kind in FLA:
        return _fla(config, dtype, FLA[kind])
    raise config.error("model_type", f"one of {', '.join((*FLA, 'mamba2', 'rwkv7'))}")


# ---------------------------------------------------------------------------------------------- flash-linear-attention


LAYERS = 10_000  # at most: they are gone through one by one before the first tensor is looked for


class Fields(NamedTuple):
    """memory: in the catalog. needed, optional: fields of config.json -> of the memory. off: what is not read."""

    memory: str
    needed: dict[str, str]
    optional: dict[str, str]
    off: dict[str, tuple]


FLA: Mapping[str, Fields] = MappingProxyType(
    {
        "gla": Fields(
            "gla",
            {"num_heads": "heads", "expand_k": "expand_k", "expand_v": "expand_v"},
            {
                "num_kv_heads": "kv_heads", "use_short_conv": "use_short_conv", "conv_size": "conv_size",
                "use_output_gate": "use_gate", "clamp_min": "clamp_min",
            },
            {"feature_map": (None,), "use_gk": (True,), "use_gv": (False,)},
        ),
        "delta_net": Fields(
            "delta_net",
            {"num_heads": "heads", "expand_k": "expand_k", "expand_v": "expand_v", "conv_size": "conv_size"},
            {
                "qk_activation": "qk_activation", "qk_norm": "qk_norm", "use_beta": "use_beta", "use_gate": "use_gate",
                "allow_neg_eigval": "allow_neg_eigval",
            },
            {"use_short_conv": (True,), "use_output_norm": (True,), "use_rope": (False,), "use_elu": (False,)},
        ),
        "gated_deltanet": Fields(
            "gated_delta_net",
            {"num_heads": "heads", "head_dim": "head_dim", "expand_v": "expand_v", "conv_size": "conv_size"},
            {"num_v_heads": "v_heads", "use_gate": "use_gate", "allow_neg_eigval": "allow_neg_eigval"},
            {"use_short_conv": (True,)},
        ),
        "retnet": Fields(  # its model does not hand use_short_conv to the layers, so that field is not looked at
            "retnet",
            {"num_heads": "heads", "expand_k": "expand_k", "expand_v": "expand_v"},
            {"num_kv_heads": "kv_heads", "use_output_gate": "use_gate"},
            {"feature_map": (None,)},
        ),
    }
)  # fmt: skip


def _fla(config: Config, dtype: str, known: Fields) -> Published:
    config.only(hidden_act=("swish", "silu"), elementwise_affine=(True,), norm_first=(False,), **known.off)
    config.only(attn=(None,), attnres_block_size=(None,))
    dim, eps = config.whole("hidden_size"), config.number("norm_eps")
    fields = {ours: config.get(theirs) for theirs, ours in known.needed.items()}
    fields |= {ours: config.values[theirs] for theirs, ours in known.optional.items() if theirs in config.values}
    mixer = config.build(known.memory, dim=dim, norm_eps=eps, **fields)
    layer = block(mixer, _hidden(config, dim, (2, 3), 256), eps)
    names = ("attn_norm.weight", "attn."), ("mlp_norm.weight", "mlp.")
    runs = [Run(layer, names, config.whole("num_hidden_layers", most=LAYERS))]
    body, layers = stacked(runs, "model.layers.")
    model = LanguageModel(body, config.whole("vocab_size"), dtype, _tied(config), eps=eps)
    return around(model, layers, "model.embeddings.weight", {"norm": same("model.norm.weight")})


def _rwkv7(config: Config, dtype: str) -> Published:
    config.only(hidden_act=("sqrelu",), attn=(None,), norm_bias=(True, False), norm_first=(True, False))
    dim, n, eps = config.whole("hidden_size"), config.whole("num_hidden_layers", most=LAYERS), config.number("norm_eps")
    values = config.get("value_dim", None) or dim
    if isinstance(values, list):
        if set(values) != {values[0]}:
            raise config.error("value_dim", "the same width in all layers")
        values = values[0]
    ranks = {name: config.whole(name) for name in (f"{x}_low_rank_dim" for x in ("decay", "a", "v", "gate"))}
    head_dim = config.get("head_dim", None) or dim // config.whole("num_heads")
    hidden, norm = _hidden(config, dim, (1, 1), 32), LayerNorm(dim, eps, config.get("norm_bias", True))

    def layer(i: int) -> tuple[Memory, Memory]:
        shape = {"dim": dim, "head_dim": head_dim, "value_dim": values, **ranks, "norm_eps": eps}
        mixing = config.build("rwkv7", layer=i, layers=n, **shape)
        return Normed(mixing, norm), Normed(RWKV7ChannelMixing(dim, hidden, i, n), norm)

    names = ("attn_norm.", "attn."), ("ffn_norm.", "ffn.")
    first = config.get("norm_first", True)
    runs = [Run(Stack((norm, *layer(0)) if first else layer(0)), ("pre_norm.", *names) if first else names, None)]
    if n > 1:  # layers are numbered for their initial values only, so that those above the first can share a Repeat
        runs.append(Run(Stack(layer(1)), names, n - 1))
    body, layers = stacked(runs, "model.layers.")
    model = RWKVLanguageModel(body, config.whole("vocab_size"), dtype, _tied(config), eps=eps, bias=norm.bias)
    return around(model, layers, "model.embeddings.weight", under("norm.", "model.norm.", norm.tensors()))


# ---------------------------------------------------------------------------------------------- Mamba-2


def _mamba2(config: Config, dtype: str) -> Published:
    """What transformers calls layer_norm_epsilon, rms_norm and time_step_limit flash-linear-attention calls otherwise.

    transformers itself normalises the output over all groups together; like mamba_ssm, which has trained the published
    weights, we do so group by group. It is the same for one group.
    """
    config.only(hidden_act=("silu", "swish"), use_bias=(False,), use_conv_bias=(True,), norm_before_gate=(False,))
    config.only(rms_norm=(True,), rmsnorm=(True,), D_has_hdim=(False,))
    eps = config.number("norm_eps" if "norm_eps" in config.values else "layer_norm_epsilon")
    limit = "dt_limit" if "dt_limit" in config.values else "time_step_limit"
    least, most = (_float(v) for v in config.get(limit, (0.0, math.inf)))
    mixer = config.build(
        "mamba2",
        dim=config.whole("hidden_size"),
        expand=config.whole("expand"),
        head_dim=config.whole("head_dim"),
        state_size=config.whole("state_size"),
        groups=config.whole("n_groups"),
        conv_size=config.whole("conv_kernel"),
        dt_limit=(least, None if math.isinf(most) else most),
        norm_eps=eps,
    )
    heads = mixer.dim * config.values["expand"] // config.values["head_dim"]
    config.only(num_heads=(heads,))
    n, vocab = config.whole("num_hidden_layers", most=LAYERS), config.whole("vocab_size")
    return _of_mixers(mixer, n, vocab, dtype, _tied(config), eps)


def _state_spaces(config: Config, dtype: str) -> Published:
    ssm = config.get("ssm_cfg")
    if not isinstance(ssm, dict):
        raise config.error("ssm_cfg", "an object")
    read = {"layer", "d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"}
    if ssm.get("layer") != "Mamba2" or not ssm.keys() <= read:
        raise config.error("ssm_cfg", f"the layer 'Mamba2' and no fields but {', '.join(sorted(read))}")
    config.only(rms_norm=(True,), d_intermediate=(0,), attn_layer_idx=([],))
    names = {"d_state": "state_size", "d_conv": "conv_size", "expand": "expand", "headdim": "head_dim"}
    fields = {ours: ssm[theirs] for theirs, ours in {**names, "ngroups": "groups"}.items() if theirs in ssm}
    eps, multiple = 1e-5, config.whole("pad_vocab_size_multiple", 8)  # no field says otherwise
    mixer = config.build("mamba2", dim=config.whole("d_model"), norm_eps=eps, **fields)
    vocab = -(-config.whole("vocab_size") // multiple) * multiple
    n, tied = config.whole("n_layer", most=LAYERS), config.get("tie_embeddings", True)
    return _of_mixers(mixer, n, vocab, dtype, tied, eps)


def _of_mixers(mixer: Memory, n: int, vocab: int, dtype: str, tied: bool, eps: float) -> Published:
    body, layers = stacked([Run(Residual(mixer, eps), ("norm.weight", "mixer."), n)], "backbone.layers.")
    model = LanguageModel(body, vocab, dtype, tied, eps=eps)
    return around(model, layers, "backbone.embeddings.weight", {"norm": same("backbone.norm_f.weight")})


# ---------------------------------------------------------------------------------------------- small parts


def _hidden(config: Config, dim: int, share: tuple[int, int], multiple: int) -> int:
    """Channels of the feed-forward layers: as given, or a share of hidden_ratio times the width, rounded up."""
    if config.get("intermediate_size", None) is not None:
        return config.whole("intermediate_size")
    ratio = 4 if config.get("hidden_ratio", None) is None else config.number("hidden_ratio")
    return -(-int(dim * ratio * share[0] / share[1]) // multiple) * multiple


def _tied(config: Config) -> bool:
    config.only(tie_word_embeddings=(False, True))
    return config.get("tie_word_embeddings", False)


def _float(value: Any) -> float:
    """A number; transformers may write those that JSON lacks as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)
