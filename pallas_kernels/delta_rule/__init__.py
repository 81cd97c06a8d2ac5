"""The delta rule, with or without a decay per head."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.delta_rule import reference, xla

IMPLEMENTATIONS = ("reference", "xla")


def delta_rule(
    q: Float[Array, "b t hk k"],
    k: Float[Array, "b t hk k"],
    v: Float[Array, "b t h v"],
    beta: Float[Array, "b t h"],
    log_decay: Float[Array, "b t h"] | None = None,
    *,
    initial_state: Float[Array, "b h k v"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Decay, read with k, write the error, read with q:

        Sbar = e^{log_decay_t} S_{t-1};  u_t = beta_t (v_t - Sbar^T k_t);  S_t = Sbar + k_t u_t^T;  o_t = S_t^T q_t

    Args:
      q, k: [b t hk k]. The caller scales q and normalises k: the recurrence diverges where beta |k|^2 > 2.
      v: [b t h v], h a multiple of hk: value head j uses key head j // (h / hk).
      beta: [b t h], the rate of the write, 0 to 1, or to 2 where negative eigenvalues are wanted.
      log_decay: [b t h], natural log of the factor on the state before the read, finite and <= 0. None: no decay
        (DeltaNet).
      initial_state: [b h k v], zeros by default.
      start: [b t], True where the state is cleared before the token, so that packed documents don't see each other.
      chunk_size: tokens per chunk of the chunked forms, a power of two.
      implementation: "reference" (a scan over tokens), "xla" (chunks, any device) or None: "reference" for at most
        16 tokens, "xla" for more.

    Padding is the caller's: beta = 0 (or k = 0) and log_decay = 0 at a token leave the state exactly as it is.

    Returns:
      o [b t h v] in the dtype of v, and the state after the last token [b h k v]. The state is float32, or float64 if
      any array given is, and everything is accumulated in that dtype. A sequence may be cut anywhere: the final state
      of one part is the initial state of the next.

    Raises:
      ValueError: shapes that don't fit, `start` that is not bool, a chunk_size that is no power of two, an
        implementation that is not available.

    References:
      Yang et al., Parallelizing linear transformers with the delta rule over sequence length, arXiv 2406.06484; Yang et
      al., Gated delta networks, arXiv 2412.06464.
    """
    op = "delta_rule"
    dispatch.check_rank(op, "q", q, "b t hk k")
    dispatch.check_rank(op, "v", v, "b t h v")
    (b, t, hk, d), (h, e) = q.shape, v.shape[2:]
    if h % hk:
        raise ValueError(f"{op}: v has {h} heads, needs a multiple of the {hk} heads of k")
    dispatch.check_shape(op, "k", k, (b, t, hk, d))
    dispatch.check_shape(op, "v", v, (b, t, h, e))
    dispatch.check_shape(op, "beta", beta, (b, t, h))
    dispatch.check_shape(op, "log_decay", log_decay, (b, t, h))
    dispatch.check_shape(op, "initial_state", initial_state, (b, h, d, e))
    dispatch.check_shape(op, "start", start, (b, t))
    dispatch.check_bool(op, "start", start)
    dispatch.check_chunk_size(op, chunk_size)
    name = dispatch.choose(op, implementation, IMPLEMENTATIONS, "reference" if t <= dispatch.SHORT else "xla")

    dtype = dispatch.accumulator(q, k, v, beta, log_decay, initial_state)
    state = jnp.zeros((b, h, d, e), dtype) if initial_state is None else initial_state.astype(dtype)
    if name == "reference":
        o, state = reference.delta_rule(q, k, v, beta, log_decay, state, start)
    else:
        o, state = xla.delta_rule(q, k, v, beta, log_decay, state, start, chunk_size)
    return o.astype(v.dtype), state
