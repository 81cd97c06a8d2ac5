"""Linear attention by the second-order Taylor expansion of exp, normalised: an approximation of softmax attention."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.scan import only
from pallas_kernels.taylor_attention import reference, xla
from pallas_kernels.taylor_attention.features import feature_count as feature_count
from pallas_kernels.taylor_attention.features import taylor_features as taylor_features

FORMS = {"reference": reference.taylor_attention, "xla": xla.taylor_attention}
IMPLEMENTATIONS = tuple(FORMS)


def taylor_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h v"],
    *,
    eps: float = 1e-12,
    compressed: bool = False,
    initial_state: Float[Array, "b h f v+1"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h f v+1"]]:
    """S_t = S_{t-1} + phi(k_t) v_t^T;  z_t = z_{t-1} + phi(k_t);  o_t = S_t^T phi(q_t) / (phi(q_t).z_t + eps).

    phi is `taylor_features`: phi(q).phi(k) = 1 + s + s^2/2 with s = q.k / sqrt(d), never below 1/2.

    Args:
      q, k: [b t h d], as they are projected.
      v: [b t h v].
      eps: added to the denominator.
      compressed: the features without repetition, d (d + 1) / 2 instead of d^2 of second order: the same o from a state
        of little more than half the size.
      initial_state: [b h f v+1], f features by the columns of S and z as one more; zeros by default.
      valid: [b t], False where a token is skipped: it changes nothing, whatever its q, k and v are, and its o is 0.
      start: [b t], True where the state is cleared before the token, even one that is not valid, so that packed
        documents don't see each other.
      chunk_size: tokens per chunk of the chunked form, a power of two.
      implementation: "reference" (a scan over tokens, the definition), "xla" (chunks, any device), or None: the
        fastest for the shape. "xla" and None have reverse-mode derivatives only.

    Returns:
      o [b t h v] in the dtype of v, and the state after the last token [b h f v+1]. The state is float32, or float64 if
      any array given is, and everything is accumulated in that dtype. A sequence may be cut anywhere: the final state
      of one part is the initial state of the next.

    Raises:
      ValueError: shapes that don't fit, arrays that hold no floats, masks that are not bool, a chunk_size that is no
        power of two, an implementation that is not available.

    References:
      Arora et al., Simple linear attention language models balance the recall-throughput tradeoff, arXiv 2402.18668.
    """
    op = "taylor_attention"
    dispatch.check_rank(op, "q", q, "b t h d")
    dispatch.check_rank(op, "v", v, "b t h v")
    (b, t, h, d), e = q.shape, v.shape[-1]
    shape = (b, h, feature_count(d, compressed), e + 1)
    dispatch.check_shape(op, "k", k, (b, t, h, d))
    dispatch.check_shape(op, "v", v, (b, t, h, e))
    dispatch.check_shape(op, "initial_state", initial_state, shape)
    dispatch.check_masks(op, (b, t), valid=valid, start=start)
    dispatch.check_float(op, q=q, k=k, v=v, initial_state=initial_state)
    dispatch.check_chunk_size(op, chunk_size)

    dtype = dispatch.accumulator(q, k, v, initial_state)
    state = dispatch.initial(initial_state, shape, dtype, start)
    both = jnp.concatenate([v.astype(dtype), jnp.ones((b, t, h, 1), dtype)], -1)  # z is what the value 1 adds up to
    args = (*dispatch.keep(valid, q, k, both), state, start)
    settings = {"compressed": compressed, "chunk_size": chunk_size}
    o, state = dispatch.run(op, implementation, FORMS, args, t=t, size=state.size, **settings)
    return only(valid, o[..., :-1] / (o[..., -1:] + eps)).astype(v.dtype), state
