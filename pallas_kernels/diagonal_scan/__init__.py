"""The elementwise linear recurrence, real and complex."""

import jax
from jax import Array
from jaxtyping import Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.diagonal_scan import reference, xla

FORMS = {"reference": reference.diagonal_scan, "xla": xla.diagonal_scan}
IMPLEMENTATIONS = tuple(FORMS)

Tokens = Float[Array, "b t *rest"]
State = Float[Array, " b *rest"]


def diagonal_scan(
    x: Tokens | tuple[Tokens, Tokens],
    log_decay: Tokens,
    phase: Tokens | None = None,
    *,
    initial_state: State | tuple[State, State] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    implementation: str | None = None,
) -> tuple[Tokens | tuple[Tokens, Tokens], State | tuple[State, State]]:
    """h_t = a_t h_{t-1} + x_t, element by element, with a = exp(log_decay) or exp(log_decay + i phase).

    Args:
      x: [b t ...], any axes after the time, or none. With `phase` a pair (real, imag) of such arrays; then so are the
        states and h, because not every device has complex numbers.
      log_decay: [b t ...] like x, natural log of the factor on the state, <= 0. -inf clears it, like `start`.
      phase: [b t ...] like x, in radians. None: everything is real.
      initial_state: [b ...], zeros by default.
      valid: [b t], False where a token changes nothing, whatever stands in its inputs (NaN too); its h is 0.
      start: [b t], True where the state is cleared before the token, even if that is not valid, so that packed
        documents don't see each other.
      implementation: "reference" (a scan over tokens, the definition), "xla" (any device), or None: the fastest for
        the shape and for what is asked for. "xla" and None have reverse-mode derivatives only.

    Returns:
      h [b t ...] in the dtype of x, and the state after the last token [b ...]. The state is float32, or float64 if any
      array given is, and everything is accumulated in that dtype. A sequence may be cut anywhere: the final state of
      one part is the initial state of the next. Every array is differentiable, initial_state too.

    Raises:
      ValueError: shapes that don't fit, arrays that hold no floats, a single array where phase needs a pair or a pair
        without phase, masks that are not bool, an unknown implementation.

    References:
      Martin and Cundy, Parallelizing linear recurrent neural nets over sequence length, arXiv 1709.04057; Orvieto et
      al., Resurrecting recurrent neural networks for long sequences (complex), arXiv 2303.06349; De et al., Griffin,
      arXiv 2402.19427; Qin et al., HGRN, arXiv 2311.04823.
    """
    op = "diagonal_scan"
    parts = _parts(op, "x", x, phase)
    if parts[0].ndim < 2 or 0 in parts[0].shape:
        raise ValueError(f"{op}: x has shape {list(parts[0].shape)}, needs [b t ...], each at least 1")
    shape = parts[0].shape
    b, t, *rest = shape
    state = _parts(op, "initial_state", initial_state, phase)
    for name, array in (("x", parts[-1]), ("log_decay", log_decay), ("phase", phase)):
        dispatch.check_shape(op, name, array, shape)
    for part in state:
        dispatch.check_shape(op, "initial_state", part, (b, *rest))
    dispatch.check_masks(op, (b, t), valid=valid, start=start)
    dispatch.check_float(op, log_decay=log_decay, phase=phase)
    for part, begin in zip(parts, state, strict=True):
        dispatch.check_float(op, x=part, initial_state=begin)

    dtype = dispatch.accumulator(*parts, log_decay, phase, *state)
    state = tuple(dispatch.initial(part, (b, *rest), dtype, start) for part in state)
    inputs = dispatch.keep(valid, *parts), *dispatch.keep(valid, log_decay, phase)
    if phase is None:
        inputs, state = (inputs[0][0], *inputs[1:]), state[0]
    h, state = dispatch.run(
        op, implementation, FORMS, (*inputs, state, start), t=t, size=jax.tree.leaves(state)[0].size
    )
    return jax.tree.map(lambda a: dispatch.keep(valid, a.astype(parts[0].dtype))[0], h), state


def _parts(op: str, name: str, given: Array | tuple[Array, Array] | None, phase: Array | None) -> tuple:
    """The one array of a real argument, the two of a complex one, None for each that is not given."""
    if phase is None:
        if isinstance(given, tuple | list):
            raise ValueError(f"{op}: {name} is a tuple of {len(given)}, needs one array where no phase is given")
        return (given,)
    if given is None:
        return None, None
    if not isinstance(given, tuple | list) or len(given) != 2:
        got = f"a tuple of {len(given)}" if isinstance(given, tuple | list) else f"an array {list(given.shape)}"
        raise ValueError(f"{op}: {name} is {got}, needs a pair (real, imag) beside phase")
    return given
