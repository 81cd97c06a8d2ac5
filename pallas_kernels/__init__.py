"""Recurrences of sequence memories as functions on arrays: forward, backward, packed documents, states in and out.

    h, state = diagonal_scan(x, log_decay, initial_state=state, start=start)
    o, state = linear_attention(q, k, v, log_decay, initial_state=state, start=start)
    o, state = delta_rule(q, k, v, beta, log_decay, initial_state=state, start=start)
    o, state = dplr_delta_rule(q, k, v, a, b, log_decay, initial_state=state, start=start)
    o, state = taylor_attention(q, k, v, initial_state=state, start=start)
    y, cache = short_conv(x, weight, cache, valid=valid, start=start)

Every op takes `implementation`: None picks one and always works, a name is obeyed or raises. The package knows nothing
of layers or models and can be used alone.
"""

from pallas_kernels.delta_rule import delta_rule as delta_rule
from pallas_kernels.diagonal_scan import diagonal_scan as diagonal_scan
from pallas_kernels.dplr_delta_rule import dplr_delta_rule as dplr_delta_rule
from pallas_kernels.linear_attention import linear_attention as linear_attention
from pallas_kernels.scan import scan_tokens as scan_tokens
from pallas_kernels.short_conv import short_conv as short_conv
from pallas_kernels.short_conv import taps as taps
from pallas_kernels.taylor_attention import taylor_attention as taylor_attention
from pallas_kernels.taylor_attention import taylor_features as taylor_features
