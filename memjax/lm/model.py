"""A decoder language model whose mixers are memories, itself a memory over token ids.

x [b, t] int32 -> logits [b, t, vocab] float32. State: that of the body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from memjax.blocks import FeedForward as FeedForward
from memjax.blocks import block as block
from memjax.combinators import Combinator
from memjax.layers import gate, rms_norm
from memjax.memory import How, Memory, Param, constant, dense, normal


@dataclass(frozen=True)
class LanguageModel(Combinator):
    """Embedding, body, norm, output matrix.

    dtype: the compute dtype, since ids have none to give. tied: the output matrix is the embedding.
    embed_std: standard deviation of the embedding's initial rows (None: dim**-0.5). logit_scale multiplies the logits.
    """

    body: Memory
    vocab: int
    dtype: str = "float32"
    tied: bool = True
    embed_std: float | None = None
    logit_scale: float = 1.0
    eps: float = 1e-6

    takes_ids: ClassVar[bool] = True
    streams: ClassVar[bool] = False  # those of the body begin and end in it

    @property
    def reads_ids(self) -> int:
        return self.vocab

    def param_specs(self):
        std = self.dim**-0.5 if self.embed_std is None else self.embed_std
        head = {} if self.tied else {"head": dense(self.dim, self.vocab, ("model", "vocab"), "embedding")}
        return {
            "embed": Param((self.vocab, self.dim), ("vocab", "model"), normal(std), "embedding"),
            "body": self.body.param_specs(),
            "norm": Param((self.dim,), ("model",), constant(1), "vector"),
            **head,
        }

    def state_specs(self, batch):
        return {"body": self.body.state_specs(batch)}

    def apply_with_aux(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return super().apply_with_aux(params, state, x, ids=_or(ids, x), valid=valid, start=start, how=how)

    def step(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return super().step(params, state, x, ids=_or(ids, x), valid=valid, start=start, how=how)

    def write(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return super().write(params, state, x, ids=_or(ids, x), valid=valid, start=start, how=how)

    def thread(self, call, params, state, x):
        embedded = params["embed"][x].astype(self.dtype)
        h, s, aux = call(self.body, params["body"], state["body"], embedded)
        head = params["embed"].T if self.tied else params["head"]
        return gate(self.last_norm(params["norm"], h), head) * self.logit_scale, {"body": s}, {"body": aux}

    def last_norm(self, params, h):
        """What stands before the output matrix; params["norm"] is its own."""
        return rms_norm(h, params, self.eps)


def _or(ids, x):
    return x if ids is None else ids
