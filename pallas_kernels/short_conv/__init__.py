"""Causal depthwise convolution over the last few tokens, and the row reader beneath it."""

from typing import Literal

from jax import Array
from jaxtyping import Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.short_conv import reference, xla
from pallas_kernels.short_conv.rows import taps as taps

FORMS = {"reference": reference.short_conv, "xla": xla.short_conv}
IMPLEMENTATIONS = tuple(FORMS)


def short_conv(
    x: Float[Array, "b t c"],
    weight: Float[Array, "w c"],
    cache: Float[Array, "b w-1 c"],
    *,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    bias: Float[Array, " c"] | None = None,
    activation: Literal["silu"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b w-1 c"]]:
    """y_t = activation(bias + sum_j weight_j * x_{t-(w-1)+j}), channel by channel.

    Args:
      x: [b t c].
      weight: [w c], the last row belongs to the current token.
      cache: [b w-1 c], the last rows of x before this call, oldest first; zeros where the document has none. Rows
        are rounded to its dtype, inside the call too, so that cutting a sequence changes nothing.
      valid: [b t], False where a token is skipped: it is no row of any other token and doesn't enter the cache,
        whatever its x is (NaN too), and its y is 0. With it rows are gathered, without it they are slices.
      start: [b t], True where a document begins: rows before it read as 0, even if the token itself is not valid.
      bias: [c].
      activation: "silu" or None.
      implementation: "reference" (a scan over tokens, the definition), "xla" (any device), or None: the fastest for
        the shape and for what is asked for. "xla" and None have reverse-mode derivatives only, which keep the arguments
        and nothing else.

    Returns:
      y [b t c] in the dtype of x, summed in float32 (float64 if any array is), and the new cache.

    Raises:
      ValueError: shapes that don't fit, arrays that hold no floats, masks that are not bool, an unknown activation or
        implementation.
    """
    op = "short_conv"
    dispatch.check_rank(op, "x", x, "b t c")
    dispatch.check_rank(op, "weight", weight, "w c")
    (b, t, c), w = x.shape, weight.shape[0]
    dispatch.check_shape(op, "weight", weight, (w, c))
    dispatch.check_shape(op, "cache", cache, (b, w - 1, c))
    dispatch.check_shape(op, "bias", bias, (c,))
    dispatch.check_masks(op, (b, t), valid=valid, start=start)
    dispatch.check_float(op, x=x, weight=weight, cache=cache, bias=bias)
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: activation is {activation!r}, needs None or 'silu'")

    args = (x, weight, cache, valid, start, bias)
    size = max(cache.size, 1)
    return dispatch.run(op, implementation, FORMS, args, t=t, size=size, short=1, activation=activation)
