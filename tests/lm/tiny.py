"""A model that is compiled in a moment, builds a bank and asks it. It is untrained: its answers mean nothing."""

import jax

from memjax import Stack
from memjax.data import ByteTokenizer
from memjax.in_storage.msa import MSA
from memjax.lm import LanguageModel, block
from memjax.lm.files import ReadingSettings

TOKENIZER = ByteTokenizer()
READING = ReadingSettings(document_tokens=64, passages=2, answer_tokens=4)
FIELDS = dict(
    dim=8, heads=2, kv_heads=2, head_dim=4, window=384, template=0, query_start=4, rotary=False,
    pool=16, top_k=3, capacity=16, documents=8, max_chunks=12,
)  # fmt: skip


def model(**changes):
    return LanguageModel(Stack((block(MSA(**{**FIELDS, **changes}), 8),)), TOKENIZER.vocab_size)


def params(memory, seed=0):
    return memory.init(jax.random.key(seed))
