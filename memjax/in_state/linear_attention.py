"""Linear attention: exp(q.k) of softmax attention becomes a product of features, so that one matrix sums up the past.

The state is the sum of phi(k) v^T; a running sum z of phi(k) may serve as denominator. Writes only ever add: nothing is
forgotten, and recall falls as soon as there are more associations than features.

Paper: Katharopoulos, Vyas, Pappas, Fleuret, Transformers are RNNs: fast autoregressive transformers with linear
attention, arXiv 2006.16236 (2020).

State:  S [b h k v] float32, the sum of phi(k) v^T, k counting features; z [b h k] float32, that of phi(k).
Update: S_t = S_{t-1} + phi(k_t) v_t^T;  z_t = z_{t-1} + phi(k_t);  o_t = s S_t^T phi(q_t), s = k**-0.5
        normalize: o_t / (s phi(q_t).z_t + 1e-10)
Maps:   elementwise_product (A x + a) * (B x + b); elu elu(x) + 1; relu; identity;
        hedgehog softmax(2 L x + 2 l, -2 L x - 2 l); t2r relu(L x);
        dpfp r * roll(r, j) for j = 1..nu side by side, r = (relu(x), relu(-x))

Differs from the paper: it has elu and normalize, and no norm on the heads. The other maps, the norm and the scale,
which cancels where the output is normalised, are those of flash-linear-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.heads import GroupedQueries
from memjax.layers import gate, heads, linear, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import gated_output
from memjax.tensors import matrix, same
from pallas_kernels.linear_attention import IMPLEMENTATIONS, linear_attention

# The linear maps of each feature map: our letter, the name in a checkpoint, whether there is a bias (the small letter).
MAPS: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "elementwise_product": (("A", "layer1", True), ("B", "layer2", True)),
    "elu": (),
    "relu": (),
    "identity": (),
    "hedgehog": (("L", "layer", True),),
    "t2r": (("L", "layer", False),),
    "dpfp": (),
}
SIGNED = ("elementwise_product", "identity")


class LinearAttentionState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the sum of phi(k) v^T
    z: Float[Array, "b h k"] | tuple[()] = ()  # float32, the sum of phi(k); () where nothing is normalised


@dataclass(frozen=True)
class LinearAttention(GroupedQueries):
    """Linear attention over x [b, t, dim].

    heads, kv_heads, expand_k, expand_v: those of `GroupedQueries`. feature_map: one of MAPS, applied to q and k of each
    head; what it learns is common to the heads. nu: rolls of dpfp. normalize: the output is an average of the past
    values, weighted by products of features, which then must not be negative; where all are 0 (possible with relu, t2r
    and dpfp) it is 0. norm_q, norm_k: features are divided by their sum + 1e-4.
    """

    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    feature_map: str = "elementwise_product"
    nu: int = 4
    normalize: bool = False
    norm_q: bool = False
    norm_k: bool = False

    use_short_conv: ClassVar[bool] = False
    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v")

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "nu")
        if self.feature_map not in MAPS:
            raise ValueError(f"LinearAttention: feature_map is {self.feature_map!r}, needs one of {', '.join(MAPS)}")
        if self.normalize and self.feature_map in SIGNED:
            raise ValueError(
                f"LinearAttention: normalize is True, needs a feature map that is never negative: the sum of "
                f"{self.feature_map!r} may cross zero"
            )

    @property
    def features(self) -> int:
        """Features of a key head: rows of the state."""
        return self.k * {"hedgehog": 2, "dpfp": 2 * self.nu}.get(self.feature_map, 1)

    @property
    def S_shape(self) -> tuple[int, int, int]:
        return self.heads, self.features, self.v

    def param_specs(self):
        k = self.k
        square = Param((k, k), ("key", None), lambda key, shape: jnp.eye(*shape, dtype=jnp.float32))
        w = square if self.feature_map == "hedgehog" else dense(k, k, ("key", None))
        bias = Param((k,), (None,), constant(0), "vector")
        maps = {f"{letter}_{n}": w for n in "qk" for letter, _, _ in MAPS[self.feature_map]}
        biases = {f"{letter.lower()}_{n}": bias for n in "qk" for letter, _, biased in MAPS[self.feature_map] if biased}
        return {**super().param_specs(), **maps, **biases}

    def state_specs(self, batch):
        z = Slot((batch, self.heads, self.features), ("batch", "heads", "key"))
        return specs(LinearAttentionState, **self.slots(batch), **({"z": z} if self.normalize else {}))

    def tensors(self):
        maps = {}
        for n in "qk":
            for letter, layer, biased in MAPS[self.feature_map]:
                maps[f"{letter}_{n}"] = matrix(f"feature_map_{n}.{layer}.weight")
                maps |= {f"{letter.lower()}_{n}": same(f"feature_map_{n}.{layer}.bias")} if biased else {}
        return {**super().tensors(), **maps, "norm": same("norm.weight")}

    def phi(self, params: dict, n: str, x: Float[Array, "b t h d"]) -> Float[Array, "b t h k"]:
        """The features of x, which is the q or the k (`n`) of each head."""
        match self.feature_map:
            case "elementwise_product":
                ax, bx = (linear(x, params[f"{w}_{n}"], params[f"{w.lower()}_{n}"]) for w in "AB")
                return ax * bx
            case "elu":
                return jax.nn.elu(x) + 1
            case "relu":
                return jax.nn.relu(x)
            case "hedgehog":
                y = 2 * gate(x, params[f"L_{n}"], params[f"l_{n}"])
                return jax.nn.softmax(jnp.concatenate([y, -y], -1), -1).astype(x.dtype)
            case "t2r":
                return jax.nn.relu(linear(x, params[f"L_{n}"]))
            case "dpfp":
                r = jax.nn.relu(jnp.concatenate([x, -x], -1))
                return jnp.concatenate([r * jnp.roll(r, j, -1) for j in range(1, self.nu + 1)], -1)
        return x

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # phi(q), phi(k) and v of each head
        q = self.phi(params, "q", heads(linear(x, params["w_q"]), self.heads))
        k = self.phi(params, "k", heads(linear(x, params["w_k"]), self.hkv))
        v = heads(linear(x, params["w_v"]), self.hkv)
        q, k = _sum_one(q) if self.norm_q else q, _sum_one(k) if self.norm_k else k
        q = q * self.features**-0.5
        k, v = (jnp.repeat(a, self.heads // self.hkv, 2) for a in (k, v))
        # S_t = S_{t-1} + phi(k) v^T, o = s S^T phi(q)
        if not self.normalize:
            o, S = linear_attention(q, k, v, initial_state=state.S, **masks, implementation=how.implementation)
            return o, LinearAttentionState(S)
        # z is one more column of S, that of a value which is always 1; kept wide, since it divides
        v = wide(v)
        v, S = (jnp.concatenate(a, -1) for a in ((v, jnp.ones_like(v[..., :1])), (state.S, state.z[..., None])))
        o, S = linear_attention(q, k, v, initial_state=S, **masks, implementation=how.implementation)
        o = o[..., :-1] / (o[..., -1:] + 1e-10)
        return o.astype(x.dtype), LinearAttentionState(S[..., :-1], S[..., -1])

    def output(self, params, o, x):
        # y = W_o RMSNorm(o)
        return gated_output(params, o, self.norm_eps)


def _sum_one(x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
    x32 = wide(x)
    return (x32 / (x32.sum(-1, keepdims=True) + 1e-4)).astype(x.dtype)
