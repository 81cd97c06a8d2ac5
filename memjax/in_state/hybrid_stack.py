"""Hybrid stack: many layers of a linear recurrence, and now and then one of full attention.

The recurrence models language at a constant cost per token, the few full layers recall what its state has lost. Loss is
flat in their ratio, recall is not: three to six linear layers to a full one are a good choice.

Paper: A systematic analysis of hybrid linear attention, arXiv 2507.06457 (2025).

State:  that of every layer: a recurrence's own, a full layer's ring of keys and values.
Update: h += mixer_i(norm(h));  h += SwiGLU(norm(h))
        mixer_i is full where (i + 1) % N == 0 ("every_n"), or where (i + 1) % (r + 1) == 0 ("r_to_1"); linear elsewhere

Differs from the paper: nothing. The paper says "3:1", the notes on its released models read that as every third layer;
both are here.
"""

from __future__ import annotations

from dataclasses import dataclass

from memjax.blocks import Layout, block, repeated
from memjax.combinators import Stack
from memjax.memory import Memory, at_least

LEAST = {"every_n": 1, "r_to_1": 0}  # placement -> the smallest ratio


@dataclass(frozen=True)
class HybridStack(Layout):
    """`layers` decoder layers, x + mixer(norm(x)) and x + FeedForward(norm(x)) with `hidden` channels.

    linear, full: the mixers. ratio: how rare full layers are; None: pure, without any, so that `full` may be None too.
    placement: what the ratio counts. "r_to_1": linear layers before a full one. "every_n": layers of which the last is
    full. Layers behind the last full one are linear. Linear layers in a row, and the periods, are compiled once.
    """

    linear: Memory
    full: Memory | None
    layers: int
    hidden: int
    ratio: int | None = 3
    placement: str = "r_to_1"
    eps: float = 1e-6

    def __post_init__(self):
        at_least(self, 1, "layers", "hidden")
        if self.placement not in LEAST:
            raise ValueError(f"HybridStack: placement is {self.placement!r}, needs one of {tuple(LEAST)}")
        self._same_width()
        if self.ratio is None:
            return
        at_least(self, LEAST[self.placement], "ratio")
        if self.full is None:
            raise ValueError(f"HybridStack: full is None, needs a memory where ratio is {self.ratio}")
        if self.period > self.layers:
            raise ValueError(
                f"HybridStack: ratio is {self.ratio}, needs a period (here {self.period}) of at most {self.layers} "
                "layers, or None"
            )

    @property
    def period(self) -> int:
        """Layers from one full layer to the next; 0: there is none."""
        return 0 if self.ratio is None else self.ratio + (self.placement == "r_to_1")

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The numbers of the full layers, from 0."""
        return tuple(range(self.period - 1, self.layers, self.period)) if self.period else ()

    @property
    def body(self) -> Memory:
        linear, n = block(self.linear, self.hidden, self.eps), self.period
        if self.full is None or n == 0:
            return repeated(linear, self.layers)
        full = block(self.full, self.hidden, self.eps)
        period = Stack((repeated(linear, n - 1), full)) if n > 1 else full
        periods, rest = divmod(self.layers, n)
        hybrid = repeated(period, periods)
        return Stack((hybrid, repeated(linear, rest))) if rest else hybrid
