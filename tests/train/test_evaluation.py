"""Scores of small trainings: rows read in pieces, and models that read with a longer window."""

from dataclasses import replace

import jax
import numpy as np

from memjax.in_context.sliding_window_attention import SlidingWindowAttention
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.lm.small import small_model
from memjax.tasks import Setting
from memjax.tasks.induction import InductionHeads
from memjax.tasks.selective_copying import Copying
from memjax.train.evaluation import measure, read

ATTENTION = SlidingWindowAttention(16, heads=2, window=32)
DELTA = GatedDeltaNet(16, heads=1, head_dim=8, expand_v=1.0)
COPY = Copying(8, 2, 3, selective=False)


def test_reading_in_pieces_is_reading():
    model = small_model((DELTA, ATTENTION), 17, conv=4)
    params = model.init(jax.random.key(0))
    inputs, _, _ = InductionHeads(30).batch(jax.random.key(1), 2)
    whole = read(params, inputs, None, model=model, piece=30)
    logits, _ = jax.jit(model.apply)(params, model.init_state(2), inputs)
    np.testing.assert_array_equal(whole, logits.argmax(-1))
    for piece in (7, 15):
        np.testing.assert_array_equal(read(params, inputs, None, model=model, piece=piece), whole)
    assert len(set(np.asarray(whole).ravel().tolist())) > 3


def test_a_reader_may_have_a_longer_window():
    model = small_model(ATTENTION, COPY.vocab, layers=1)
    setting = Setting((COPY,), {"T=8": COPY, "T=60": Copying(60, 2, 3, selective=False)}, "here", steps=60, batch=32)
    reader = small_model(SlidingWindowAttention(16, heads=2, window=64), COPY.vocab, layers=1)
    short = measure(model, setting, rows=64)
    long = measure(model, setting, reader=reader, rows=64)
    assert list(long.scores) == ["T=8", "T=60"] and long.scores["T=8"] == short.scores["T=8"]
    against = measure(model, setting, reader=replace(model, logit_scale=-1.0), rows=64)
    assert against.scores["T=8"] != short.scores["T=8"] and against.losses == short.losses
    assert long.steps == 60 and len(long.losses) == 3 and long.losses == short.losses
    assert long.parameters == model.param_bytes() // 4 and long.state_bytes == model.state_bytes(1)
