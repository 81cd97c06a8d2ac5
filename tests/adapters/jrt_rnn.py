"""JRT-RNN: the layer of prefix linear attention."""

from __future__ import annotations

from memjax.in_state.jrt_rnn import PrefixLinearAttention
from tests.adapters import Arrays, Results, expect, layer


def jrt_rnn(arrays: Arrays, cfg: dict) -> Results:
    memory = PrefixLinearAttention(
        dim=cfg["dim"],
        heads=cfg["heads"],
        feature_dim=cfg["feature_dim"],
        head_v_dim=cfg["head_v_dim"],
        enc_length=cfg["enc_length"],
        compressed=cfg["compressed"],
        eps=cfg["eps"],
    )
    expect("jrt_rnn", cfg, feature_map="taylor", feature_count=memory.state_specs(1).S.shape[2], mask=None)

    def sums(state) -> Results:
        return {"out_kv_state": state.S[..., :-1], "out_k_state": state.S[..., -1]}

    return layer(memory, arrays, sums)


SYSTEMS = {"jrt_rnn": jrt_rnn}
