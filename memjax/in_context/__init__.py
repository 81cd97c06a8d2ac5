"""The memory is the exact keys and values of a window: eidetic, and bounded by a stated capacity."""

from memjax.in_context.canon import Canon as Canon
from memjax.in_context.sliding_window_attention import SlidingWindowAttention as SlidingWindowAttention
