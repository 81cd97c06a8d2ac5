"""Memory sparse attention: a whole model (training forward, losses, gradients) and its three stages of inference.

A layer of the model runs its verbs on the parts of the sequence: `write` on documents, `apply` on template and
question, `apply` on what follows; the combinators thread the whole sequence through, as they do for any verb.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memjax.combinators import Combinator, Residual, Stack
from memjax.in_storage.msa import MSA, DocumentAttention
from memjax.in_storage.router_loss import router_loss
from memjax.lm import LanguageModel, block
from pallas_kernels.compat import QUICK_COMPILE
from tests.adapters import Arrays, Results, expect


def build(cfg: dict, routing: dict, tokens: int, documents: int, window: int) -> LanguageModel:
    expect("msa", cfg, rope_type="default", attention_bias=False, padding_attention_output=0.0)
    common: dict[str, Any] = dict(
        dim=cfg["hidden"], heads=cfg["heads"], kv_heads=cfg["kv"], head_dim=cfg["hd"], window=window,
        template=cfg["template_len"], query_start=cfg["query_start"], theta=cfg["theta"],
        qk_norm=cfg["qk_norm"], norm_eps=cfg["rms_norm_eps"],
    )  # fmt: skip
    router = MSA(
        **common, pool=routing["pooling_size"], top_k=routing["top_k"],
        capacity=tokens, documents=documents, max_chunks=tokens,
        router_norm=routing["router_l2norm"], router_scale=routing["router_scale"], head_reduce=routing["head_reduce"],
        query_reduce=routing["query_reduce"], chunk_reduce=routing["chunk_reduce"],
    )  # fmt: skip
    mixers = [router if i in cfg["router_layers"] else DocumentAttention(**common) for i in range(cfg["layers"])]
    body = Stack(tuple(block(m, cfg["inter"], cfg["rms_norm_eps"]) for m in mixers))
    return LanguageModel(body, cfg["vocab"], tied=cfg["tie_word_embeddings"], eps=cfg["rms_norm_eps"])


def parameters(arrays: Arrays, model: LanguageModel) -> dict:
    at = lambda name: jnp.asarray(arrays[f"param_model.{name}.weight"])  # noqa: E731
    layers = {}
    for i, layer in enumerate(model.body.blocks):
        name = f"layers.{i}"
        memory: dict[str, Any] = {f"w_{p}": at(f"{name}.self_attn.{p}_proj").T for p in "qkvo"}
        if layer.blocks[0].memory.qk_norm:
            memory |= {f"{p}_norm": at(f"{name}.self_attn.{p}_norm") for p in "qk"}
        if isinstance(layer.blocks[0].memory, MSA):
            memory |= {f"w_r{p}": at(f"{name}.self_attn.router_{p}_proj.0").T for p in "qk"}
        mlp = {f"w_{p}": at(f"{name}.mlp.{p}_proj").T for p in ("gate", "up", "down")}
        layers[str(i)] = {
            "0": {"norm": at(f"{name}.input_layernorm"), "memory": memory},
            "1": {"norm": at(f"{name}.post_attention_layernorm"), "memory": mlp},
        }
    head = {} if model.tied else {"head": jnp.asarray(arrays["param_lm_head.weight"]).T}
    return {"embed": at("embed_tokens"), "body": layers, "norm": at("norm"), **head}


class Threaded:
    """A `call` for `thread`: every attention layer reads documents, then asks, then goes on; it records."""

    unrolled, remat = True, False

    def __init__(self, documents=None, begins=None, asks=None, follows=None):
        self.documents, self.begins, self.asks, self.follows = documents, begins, asks, follows
        self.hidden, self.attention, self.aux = [], [], []

    def __call__(self, memory, params, state, x):
        if isinstance(memory, Combinator):
            if isinstance(memory, Residual) and isinstance(memory.memory, DocumentAttention):
                self.hidden.append(x)
            return memory.thread(self, params, state, x)
        if not isinstance(memory, DocumentAttention):
            return (*memory.apply(params, state, x), {})
        y, aux = jnp.zeros_like(x), {}
        if self.documents is not None:
            y, state = memory.write(params, state, x, valid=self.documents, start=self.begins)
        for n, valid in enumerate((self.asks, self.follows)):
            if valid is not None:
                y_now, state, now = memory.apply_with_aux(params, state, x, valid=valid)
                y, aux = jnp.where(valid[..., None], y_now, y), aux or (now if n == 0 else {})
        self.attention.append(y)
        if aux:
            self.aux.append(aux)
        return y, state, aux


def _thread(model, params, state, embedded, **masks):
    """logits, new state, and the threaded record; `embedded` [b t d] stands for the ids."""
    call = Threaded(**masks)
    h, s, _ = call(model.body, params["body"], state["body"], embedded)
    call.hidden.append(_rms(h, params["norm"], model.eps))
    return call.hidden[-1] @ (params["embed"].T if model.tied else params["head"]), {"body": s}, call


def _rms(x, w, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * w.reshape(1, 1, -1)


def train(arrays: Arrays, cfg: dict, names: set[str]) -> Results:
    role, mask = jnp.asarray(arrays["in_train_doc_ids"]), jnp.asarray(arrays["in_train_attention_mask"]) > 0
    b, t = role.shape
    labels, answers = (jnp.asarray(arrays[f"in_train_{n}"]) for n in ("labels", "aux_labels"))
    routing, documents = cfg["train"], answers.shape[1]
    model = build(cfg, routing, t, documents, t)
    params = parameters(arrays, model)
    order = jnp.arange(t)[None]
    document = (role > 0) & mask
    head = (role == -2) & (order < cfg["template_len"]) & mask
    asks = (head | (role == 0)) & mask
    masks = dict(
        documents=document,
        begins=document & (role != jnp.pad(role, ((0, 0), (1, 0)))[:, :-1]),
        asks=asks,
        follows=mask & ~document & ~asks,
    )

    def one(params, embedded, masks):  # a sample and the store of its own documents
        masks = {k: v[None] for k, v in masks.items()}
        logits, _, call = _thread(model, params, model.init_state(1), embedded[None], **masks)
        hidden, attention, scores = call.hidden, call.attention, [a["doc_scores"][0, 0] for a in call.aux]
        return logits[0], [h[0] for h in hidden], [a[0] for a in attention], scores

    def losses(params, embedded, method):
        logits, hidden, attention, scores = jax.vmap(one, (None, 0, 0))(params, embedded, masks)
        target, counted = labels[:, 1:], labels[:, 1:] != -100
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), jnp.where(counted, target, 0)[..., None], -1)[
            ..., 0
        ]
        lm = -jnp.where(counted, log_p, 0).sum() / counted.sum(dtype=jnp.float32)
        late = [s for i, s in zip(cfg["router_layers"], scores, strict=True) if i >= routing["aux_layers_from"]]
        each = jnp.stack([router_loss(s, answers == 1, method=method, temperature=cfg["temperature"],
                                      gamma=routing["focal_gamma"]) for s in late])  # fmt: skip
        asked = jnp.broadcast_to((answers == 1).any(-1)[None], each.shape)
        aux = jnp.where(asked, each, 0).sum() / jnp.maximum(asked.sum(dtype=jnp.float32), 1)
        return routing["lm_loss_weight"] * lm + routing["aux_loss_weight"] * aux, (
            lm,
            aux,
            logits,
            hidden,
            attention,
            scores,
        )

    embedded = params["embed"][jnp.asarray(arrays["in_train_input_ids"])]
    (loss, (lm, aux, logits, hidden, attention, scores)), (g, g_embedded) = jax.value_and_grad(
        losses, (0, 1), has_aux=True
    )(params, embedded, "decoupled")
    out: Results = {f"out_train_hidden_{i}": h for i, h in enumerate(hidden)}
    out |= {f"out_train_attn_{i}": a for i, a in enumerate(attention)}
    for i, s in zip(cfg["router_layers"], scores, strict=True):
        out[f"out_train_doc_scores_{i}"] = jnp.pad(s, ((0, 0), (1, 0)), constant_values=-jnp.inf)
    out |= {
        "out_train_logits": logits,
        "out_train_lm_loss": lm,
        "out_train_aux_loss_decouple": aux,
        "out_train_loss": loss,
    }
    for method in ("infonce", "focal"):
        name = "infonce_focal" if method == "focal" else method
        out[f"out_train_aux_loss_{name}"] = losses(params, embedded, method)[1][1]
    out["grad_train_inputs_embeds"] = g_embedded
    for i in range(cfg["layers"]):
        memory = g["body"][str(i)]["0"]["memory"]
        for ours, theirs in _NAMES.items():
            if ours in memory and f"grad_train_model.layers.{i}.{theirs}.weight" in names:
                out[f"grad_train_model.layers.{i}.{theirs}.weight"] = memory[ours].T
        mlp = g["body"][str(i)]["1"]["memory"]
        for p in ("gate", "up", "down"):
            if (name := f"grad_train_model.layers.{i}.mlp.{p}_proj.weight") in names:
                out[name] = mlp[f"w_{p}"].T
    return out


_NAMES = {f"w_{p}": f"self_attn.{p}_proj" for p in "qkvo"} | {f"w_r{p}": f"self_attn.router_{p}_proj.0" for p in "qk"}


def infer(arrays: Arrays, cfg: dict, chunks: int) -> Results:
    tokens, lengths = (jnp.asarray(arrays[f"in_inf_{n}"]) for n in ("doc_tokens", "doc_lens"))
    query, mask, role = (jnp.asarray(arrays[f"in_inf_query_{n}"]) for n in ("ids", "attention_mask", "doc_ids"))
    template, append = jnp.asarray(arrays["in_inf_template_ids"])[None], jnp.asarray(arrays["in_inf_append_ids"])
    n, b = tokens.shape[0], query.shape[0]
    steps = cfg["inf"]["decode_steps"]
    window = template.shape[1] + query.shape[1] + steps + append.shape[1]
    model = build(cfg, cfg["inf"], tokens.size, n, window)
    params, out = parameters(arrays, model), {}

    # stage 1: the documents, one a row, and the template once
    there = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    _, state = model.write(params, model.init_state(n), tokens, valid=there)
    _, head = model.apply(params, model.restart(state, 1), template)
    for i in range(cfg["layers"]):
        mixer = head["body"][str(i)]["0"]["memory"]
        ring = mixer.ring if i in cfg["router_layers"] else mixer
        for name in ("k", "v"):
            out[f"out_inf_template_{name}_{i}"] = getattr(ring, name)[0, : template.shape[1]]
        if i in cfg["router_layers"]:
            for name in ("k", "v", "rk"):
                out[f"out_inf_bank_{name}_{i}"] = getattr(mixer.store, name)[:chunks]
            out["out_inf_bank_chunk_doc"] = mixer.store.chunk_doc[:chunks]
    axes = jax.tree.leaves(model.state_axes(), is_leaf=lambda a: type(a) is tuple)
    flat, tree = jax.tree.flatten(head)
    rows = tree.unflatten([jnp.repeat(a, b, 0) if "batch" in x else a for a, x in zip(flat, axes, strict=True)])

    # stage 2: the question routes, its tail and the first token of the answer follow
    asks, follows = (mask > 0) & (role == 0), (mask > 0) & (role != 0)
    logits, state, call = _thread(model, params, rows, params["embed"][query], asks=asks, follows=follows)
    out |= {f"out_inf_prefill_hidden_{i}": h for i, h in enumerate(call.hidden)} | {"out_inf_prefill_logits": logits}
    _routing(out, "inf", cfg, call.aux, n)

    # stage 3: greedy decoding, then a piece appended whose tokens see each other
    token, decoded = logits[:, -1].argmax(-1), []
    for _ in range(steps):
        decoded.append(token)
        now, state = model.step(params, state, token.astype(jnp.int32))
        out.setdefault("decode", []).append(now)
        token = now.argmax(-1)
    out["out_inf_decode_tokens"] = jnp.stack(decoded, 1)
    out["out_inf_decode_logits"] = jnp.stack(out.pop("decode"), 1)
    both_ways = _with_attention(model, causal=cfg["inf"].get("append_causal", False))
    out["out_inf_append_logits_noncausal"] = both_ways.apply(params, state, append)[0]

    # the serving code's other rule of routing
    raw = build(cfg, {**cfg["inf"], **cfg["infraw"]}, tokens.size, n, window)
    _, state = raw.write(params, raw.init_state(n), tokens, valid=there)
    _, head = raw.apply(params, raw.restart(state, 1), template)
    flat, tree = jax.tree.flatten(head)
    rows = tree.unflatten([jnp.repeat(a, b, 0) if "batch" in x else a for a, x in zip(flat, axes, strict=True)])
    _routing(
        out, "infraw", cfg, _thread(raw, params, rows, params["embed"][query], asks=asks, follows=follows)[2].aux, n
    )
    return out


def _routing(out: Results, name: str, cfg: dict, auxes: list[dict], documents: int) -> None:
    for i, aux in zip(cfg["router_layers"], auxes, strict=True):
        scores, chosen = aux["doc_scores"][:, 0, :documents], aux["documents"][:, 0]
        out[f"out_{name}_doc_scores_{i}"] = scores
        out[f"out_{name}_topk_docs_{i}"] = chosen
        out[f"out_{name}_topk_scores_{i}"] = jnp.take_along_axis(scores, chosen, 1)


def _with_attention(memory: Any, **fields: Any) -> Any:
    """The same model, every attention layer with other fields."""
    if isinstance(memory, DocumentAttention):
        return dataclasses.replace(memory, **fields)
    if isinstance(memory, Combinator):
        inner = {f.name: getattr(memory, f.name) for f in dataclasses.fields(memory)}
        change = {k: _with_attention(v, **fields) for k, v in inner.items() if not isinstance(v, str)}
        return dataclasses.replace(memory, **change)
    return tuple(_with_attention(m, **fields) for m in memory) if isinstance(memory, tuple) else memory


def system(arrays: Arrays, cfg: dict) -> Results:
    """Everything in the file, compiled as one program."""
    lengths, names = np.asarray(arrays["in_inf_doc_lens"]), set(arrays)
    chunks = int((-(-lengths // cfg["inf"]["pooling_size"])).sum())
    given = {name: jnp.asarray(a) for name, a in arrays.items() if name.startswith(("in_", "param_"))}
    both = jax.jit(lambda a: train(a, cfg, names) | infer(a, cfg, chunks), compiler_options=QUICK_COMPILE)
    return both(given)


# The reference is float32 code.
SYSTEMS = {"msa": system}
TOLERANCES = {"msa": {"out_*": 1e-5, "grad_*": 1e-5}}
