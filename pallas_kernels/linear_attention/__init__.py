"""Linear attention with no decay, a decay per head, or a decay per key channel."""

from jax import Array
from jaxtyping import Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import reference, xla

FORMS = {"reference": reference.linear_attention, "xla": xla.linear_attention}
IMPLEMENTATIONS = tuple(FORMS)


def linear_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    *,
    initial_state: Float[Array, "b h k v"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """S_t = diag(e^{log_decay_t}) S_{t-1} + k_t v_t^T;  o_t = S_t^T q_t.

    Args:
      q, k: [b t h k]. The caller scales q; nothing is normalised here.
      v: [b t h v].
      log_decay: natural log of the factor on the state before the write, <= 0. None: the state never
        decays (linear attention). [b t h]: one decay per head (retention, Mamba-2). [b t h k]: one per key channel
        (GLA).
      initial_state: [b h k v], zeros by default.
      valid: [b t], False where a token is skipped: it changes nothing, whatever its q, k, v and log_decay are, and its
        o is 0.
      start: [b t], True where the state is cleared before the token, even one that is not valid, so that packed
        documents don't see each other.
      chunk_size: tokens per chunk of the chunked forms, a power of two. None: 16 to 64, as wide as a key or a value.
      implementation: "reference" (a scan over tokens, the definition), "xla" (chunks, any device), or None: the
        fastest for the shape and for what is asked for. "xla" and None have reverse-mode derivatives only.

    Returns:
      o [b t h v] in the dtype of v, and the state after the last token [b h k v]. The state is float32, or float64 if
      any array given is, and everything is accumulated in that dtype. A sequence may be cut anywhere: the final state
      of one part is the initial state of the next.

    Raises:
      ValueError: shapes that don't fit, arrays that hold no floats, masks that are not bool, a chunk_size that is no
        power of two, an implementation that is not available.

    References:
      Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236; Yang et al., Gated linear attention transformers
      with hardware-efficient training, arXiv 2312.06635 (the chunked form).
    """
    op = "linear_attention"
    dispatch.check_rank(op, "q", q, "b t h k")
    dispatch.check_rank(op, "v", v, "b t h v")
    (b, t, h, d), e = q.shape, v.shape[-1]
    dispatch.check_shape(op, "k", k, (b, t, h, d))
    dispatch.check_shape(op, "v", v, (b, t, h, e))
    dispatch.check_shape(op, "log_decay", log_decay, (b, t, h), (b, t, h, d))
    dispatch.check_shape(op, "initial_state", initial_state, (b, h, d, e))
    dispatch.check_masks(op, (b, t), valid=valid, start=start)
    dispatch.check_float(op, q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)
    chunk_size = dispatch.chunk_size_for(op, chunk_size, d, e)

    dtype = dispatch.accumulator(q, k, v, log_decay, initial_state)
    state = dispatch.initial(initial_state, (b, h, d, e), dtype, start)
    q, k, v, log_decay = dispatch.keep(valid, q, k, v, log_decay)
    args = (q, k, v, log_decay, state, start)
    variant, size = dispatch.variant_of(log_decay), state.size
    o, state = dispatch.run(op, implementation, FORMS, args, t=t, size=size, variant=variant, chunk_size=chunk_size)
    return o.astype(v.dtype), state
