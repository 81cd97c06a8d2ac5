"""DeltaNet: linear attention that writes only the error of what its key recalled.

A token reads what the state holds under its key and moves it towards its value, by a learned rate: one step of gradient
descent on |S^T k - v|^2 / 2. A key that is written again replaces its value, but nothing fades by itself.

Paper: Yang, Wang, Zhang, Shen, Kim, Parallelizing linear transformers with the delta rule over sequence length,
arXiv 2406.06484 (2024).

State:  S [b h k v] float32, the associations of each head; conv, the last rows before the convolution.
Update: u_t = beta_t (v_t - S_{t-1}^T k_t);  S_t = S_{t-1} + k_t u_t^T;  o_t = k**-0.5 S_t^T q_t
        q, k = norm(act(conv(x W))),  v = silu(conv(x W_v)),  beta_t = sigmoid(x_t W_b)

Differs from the paper: a key whose channels sum to 0 is left as it is where they are to be divided by their sum, which
has no value there. The doubled beta and the output gate are those of flash-linear-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from memjax.heads import ExpandedHeads
from memjax.layers import gate, heads, l2_norm, linear, wide
from memjax.memory import How, at_least, dense, specs
from memjax.recurrence import convolved, gated_output
from memjax.tensors import matrix, same
from pallas_kernels.delta_rule import IMPLEMENTATIONS, delta_rule


def sum_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x / sum(x), computed in float32; x itself where the sum is 0, as it is at a token that is not valid."""
    x32 = wide(x)
    total = jnp.sum(x32, -1, keepdims=True)
    return (x32 / jnp.where(total == 0, jnp.ones_like(total), total)).astype(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {"silu": jax.nn.silu, "relu": jax.nn.relu, "elu": lambda x: jax.nn.elu(x) + 1, "identity": lambda x: x}
)
NORMS: Mapping[str, Callable[[Array], Array]] = MappingProxyType({"l2": l2_norm, "sum": sum_norm})


class DeltaNetState(NamedTuple):
    """What was read so far."""

    S: Float[Array, "b h k v"]  # float32, the associations
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k, v before the convolution


@dataclass(frozen=True)
class DeltaNet(ExpandedHeads):
    """DeltaNet over x [b, t, dim].

    Keys have dim * expand_k channels over all `heads`, values dim * expand_v. conv_size: width of the causal
    convolution on q, k and v. qk_activation: of q and k after it, "silu", "relu", "elu" (elu + 1) or "identity"; v
    always gets silu. qk_norm: "l2", length 1, or "sum", divided by the sum over the channels; with "sum" the state is
    only sure to stay bounded under an activation that is never negative.
    use_beta: False writes every error whole. allow_neg_eigval: beta is doubled, so that a write can flip an
    association. use_gate: the output is multiplied by silu(x W_g).
    """

    heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int = 4
    qk_activation: str = "silu"
    qk_norm: str = "l2"
    use_beta: bool = True
    allow_neg_eigval: bool = False
    use_gate: bool = False
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 2, "conv_size")
        for name, known in (("qk_activation", ACTIVATIONS), ("qk_norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"DeltaNet: {name} is {getattr(self, name)!r}, needs one of {', '.join(known)}")

    @property
    def own(self) -> tuple[str, ...]:
        return ("w_k", "w_v", "w_b") if self.use_beta else ("w_k", "w_v")

    def param_specs(self):
        return {
            **super().param_specs(),  # w_q, w_k, w_v, w_o, conv, norm
            **({"w_b": dense(self.dim, self.heads, kind="gate")} if self.use_beta else {}),
            **({"w_g": dense(self.dim, self.heads * self.v)} if self.use_gate else {}),
        }

    def state_specs(self, batch):
        return specs(DeltaNetState, **self.slots(batch))

    def tensors(self):
        return {
            **super().tensors(),
            **({"w_b": matrix("b_proj.weight")} if self.use_beta else {}),
            **({"w_g": matrix("g_proj.weight")} if self.use_gate else {}),
            "norm": same("o_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k = act(conv(x W)), v = silu(conv(x W)): silu inside the convolution where all three get it
        act, names = self.qk_activation, ("w_q", "w_k", "w_v")
        inside = "silu" if act == "silu" else None
        (q, k, v), conv = convolved(params, names, state.conv, x, activation=inside, **masks, how=how)
        if inside is None:
            q, k, v = ACTIVATIONS[act](q), ACTIVATIONS[act](k), jax.nn.silu(v)
        q, k, v = (heads(a, self.heads) for a in (q, k, v))
        q, k = NORMS[self.qk_norm](q), NORMS[self.qk_norm](k)
        # beta = sigmoid(x W_b), from the unconvolved x and in float32
        if self.use_beta:
            beta = jax.nn.sigmoid(gate(x, params["w_b"]))
        else:
            beta = jnp.ones((*x.shape[:2], self.heads), wide(x).dtype)
        beta = beta * (2 if self.allow_neg_eigval else 1)
        # S_t = S_{t-1} + k u^T, o = k**-0.5 S^T q
        q = q * self.k**-0.5
        o, S = delta_rule(q, k, v, beta, initial_state=state.S, **masks, implementation=how.implementation)
        return o, DeltaNetState(S, conv)

    def output(self, params, o, x):
        # y = W_o (RMSNorm(o) * silu(x W_g))
        z = jax.nn.silu(linear(x, params["w_g"])) if self.use_gate else None
        return gated_output(params, o, self.norm_eps, z)
