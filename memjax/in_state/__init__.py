"""The memory is a bounded state, rewritten at every token: it fades, and does not grow with the input."""

from memjax.in_state.gated_delta_net import GatedDeltaNet as GatedDeltaNet
from memjax.in_state.gla import GatedLinearAttention as GatedLinearAttention
