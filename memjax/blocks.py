"""What decoders are built of: the SwiGLU layer, the block around a mixer, and stacks that a few fields describe.

This file imports no architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from memjax.combinators import Combinator, Repeat, Residual, Stack
from memjax.layers import linear
from memjax.memory import How, Memory, dense


@dataclass(frozen=True)
class FeedForward(Memory):
    """SwiGLU: y = W_down (silu(x W_gate) * (x W_up)); it keeps no state. Source: Shazeer 2020, arXiv 2002.05202."""

    dim: int
    hidden: int

    def param_specs(self):
        return {
            "w_gate": dense(self.dim, self.hidden, ("model", "mlp")),
            "w_up": dense(self.dim, self.hidden, ("model", "mlp")),
            "w_down": dense(self.hidden, self.dim, ("mlp", "model")),
        }

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        h = jax.nn.silu(linear(x, params["w_gate"])) * linear(x, params["w_up"])
        return linear(h, params["w_down"]), state


def block(mixer: Memory, hidden: int, eps: float = 1e-6) -> Memory:
    """A pre-norm decoder layer: x + mixer(norm(x)), then x + FeedForward(norm(x))."""
    return Stack((Residual(mixer, eps), Residual(FeedForward(mixer.dim, hidden), eps)))


def repeated(layer: Memory, n: int) -> Memory:
    """n layers of one kind, compiled once."""
    return layer if n == 1 else Repeat(layer, n)


@dataclass(frozen=True)
class Layout(Combinator):
    """Memories in a published order: the fields of a class say which, its `body` puts them together.

    Params, state and aux are those of the body; the configuration is that of the fields.
    """

    @property
    def body(self) -> Memory:
        """The stack."""
        raise NotImplementedError

    def param_specs(self):
        return self.body.param_specs()

    def state_specs(self, batch):
        return self.body.state_specs(batch)

    def thread(self, call, params, state, x):
        return call(self.body, params, state, x)
