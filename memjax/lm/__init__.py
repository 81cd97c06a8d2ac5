"""A decoder language model whose mixers are memories, and generation."""

from memjax.lm.model import FeedForward as FeedForward
from memjax.lm.model import LanguageModel as LanguageModel
from memjax.lm.model import block as block
