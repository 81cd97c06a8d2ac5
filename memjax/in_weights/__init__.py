"""The memory is parameters that are looked up or edited: it does not grow with the input."""

from memjax.in_weights.stem import STEM as STEM
