"""STEM: a feed-forward block whose up-projection is a table row, looked up by the token.

A third of the block's multiplications goes away, and what the model knows about a token stands in rows of its own:
they can lie in host memory, since the ids are known in advance, and swapping two of them swaps what is known.

Paper: STEM: scaling transformers with embedding modules, arXiv 2601.10639 (2026).

State:  none.
Update: y_t = W_down (silu(W_gate x_t) * E[i_t]), with i_t the id of the token at t

Differs from the paper: nothing. x is the block's normalised input and y excludes the residual: both are `Residual`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from memjax.layers import linear
from memjax.memory import How, Initializer, Memory, Param, at_least, normal


@dataclass(frozen=True)
class STEM(Memory):
    """STEM over x [b, t, dim] and ids [b, t], of a vocabulary of `vocab`.

    hidden: width of the table's rows (None: 8/3 dim, rounded up to a multiple of `multiple_of`, as in Llama).
    """

    dim: int
    vocab: int
    hidden: int | None = None
    multiple_of: int = 256

    def __post_init__(self):
        at_least(self, 1, "dim", "vocab", "hidden", "multiple_of")

    @property
    def reads_ids(self) -> int:
        return self.vocab

    @property
    def width(self) -> int:
        """Width of a row of the table."""
        if self.hidden is not None:
            return self.hidden
        return self.multiple_of * math.ceil(int(8 * self.dim / 3) / self.multiple_of)

    def param_specs(self):
        d, f = self.dim, self.width
        return {
            "table": Param((self.vocab, f), ("vocab", "mlp"), normal((2 / (self.vocab + f)) ** 0.5), "embedding"),
            "w_gate": Param((d, f), ("model", "mlp"), _truncated_normal(d**-0.5)),
            "w_down": Param((f, d), ("mlp", "model"), _truncated_normal(f**-0.5)),
        }

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        # gathered, then cast: the other way round every row of the table would be read
        row = params["table"][ids].astype(x.dtype)
        return linear(jax.nn.silu(linear(x, params["w_gate"])) * row, params["w_down"]), state

    def swap_rows(self, params: dict, i: int | Array, j: int | Array) -> dict:
        """Parameters in which tokens i and j have exchanged their rows; the same call again restores them.

        i, j: ids, int or int [n] (n pairs, no id twice). What the model knows of one is then recalled for the other,
        if every STEM layer of the model is edited so; sequences without i and j are computed exactly as before.
        """
        i, j = jnp.atleast_1d(jnp.asarray(i)), jnp.atleast_1d(jnp.asarray(j))
        rows = params["table"][jnp.concatenate([j, i])]
        return {**params, "table": params["table"].at[jnp.concatenate([i, j])].set(rows)}


def _truncated_normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)
