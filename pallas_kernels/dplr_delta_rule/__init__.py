"""The delta rule whose transition is diagonal plus rank one, with free vectors for what is read and what is removed."""

from jax import Array
from jaxtyping import Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.dplr_delta_rule import reference, xla
from pallas_kernels.triangular import PRECISIONS, Precision

FORMS = {"reference": reference.dplr_delta_rule, "xla": xla.dplr_delta_rule}
IMPLEMENTATIONS = tuple(FORMS)


def dplr_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    a: Float[Array, "b t h k"],
    b: Float[Array, "b t h k"],
    log_decay: Float[Array, "b t h k"],
    *,
    initial_state: Float[Array, "b h k v"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    inverse_precision: Precision = "float32",
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Read the old state with a, decay, add what was read along b and the new value along k, read with q:

        S_t = diag(e^{log_decay_t}) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T;  o_t = S_t^T q_t

    RWKV-7 has a = -kk and b = kk * rate for a key kk of length 1. The delta rule with decay g is a = e^g k, b = -beta k
    and beta k in place of k; a = 0 or b = 0 is linear attention with a decay per channel.

    Args:
      q, k: [b t h k]. The caller scales q; nothing is normalised here.
      v: [b t h v].
      a, b: [b t h k]. The recurrence diverges where diag(e^{log_decay}) + b a^T has an eigenvalue beyond 1.
      log_decay: [b t h k], natural log of the factor on each channel of the state, <= 0. The read with a is
        of the state before it.
      initial_state: [b h k v], zeros by default.
      valid: [b t], False where a token changes nothing, whatever stands in its inputs (NaN too); its o is 0.
      start: [b t], True where the state is cleared before the token, even if that is not valid, so that packed
        documents don't see each other.
      chunk_size: tokens per chunk of the chunked forms, a power of two. None: 16 to 64, as wide as a key or a value.
      inverse_precision: of the products that invert a triangular matrix in the chunked forms, "float32" (that of the
        state, which may be float64), "bf16x3" or "bf16"; `triangular.unit_lower_inverse` says what it costs.
      implementation: "reference" (a scan over tokens, the definition), "xla" (chunks, any device), or None: the
        fastest for the shape and for what is asked for. "xla" and None have reverse-mode derivatives only.

    Returns:
      o [b t h v] in the dtype of v, and the state after the last token [b h k v]. The state is float32, or float64 if
      any array given is, and everything is accumulated in that dtype. A sequence may be cut anywhere: the final state
      of one part is the initial state of the next. Every array is differentiable, initial_state too.

    Raises:
      ValueError: shapes that don't fit, arrays that hold no floats, masks that are not bool, a chunk_size that is no
        power of two, an unknown inverse_precision or implementation.

    References:
      Peng et al., RWKV-7 "Goose" with expressive dynamic state evolution, arXiv 2503.14456.
    """
    op = "dplr_delta_rule"
    dispatch.check_rank(op, "q", q, "b t h k")
    dispatch.check_rank(op, "v", v, "b t h v")
    (batch, t, h, d), e = q.shape, v.shape[-1]
    for name, array in (("k", k), ("a", a), ("b", b), ("log_decay", log_decay)):
        dispatch.check_shape(op, name, array, (batch, t, h, d))
    dispatch.check_shape(op, "v", v, (batch, t, h, e))
    dispatch.check_shape(op, "initial_state", initial_state, (batch, h, d, e))
    dispatch.check_masks(op, (batch, t), valid=valid, start=start)
    dispatch.check_float(op, q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, initial_state=initial_state)
    chunk_size = dispatch.chunk_size_for(op, chunk_size, d, e)
    dispatch.check_choice(op, "inverse_precision", inverse_precision, PRECISIONS)

    dtype = dispatch.accumulator(q, k, v, a, b, log_decay, initial_state)
    state = dispatch.initial(initial_state, (batch, h, d, e), dtype, start)
    o, state = dispatch.run(
        op,
        implementation,
        FORMS,
        (*dispatch.keep(valid, q, k, v, a, b, log_decay), state, start),
        t=t,
        size=state.size,
        chunk_size=chunk_size,
        inverse_precision=inverse_precision,
    )
    return o.astype(v.dtype), state
