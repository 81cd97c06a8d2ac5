"""The delta rule: no decay, one per head or one per key channel; several updates a token; erase and write gates."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.delta_rule import reference, xla
from pallas_kernels.triangular import PRECISIONS, Precision

FORMS = {"reference": reference.delta_rule, "xla": xla.delta_rule}
IMPLEMENTATIONS = tuple(FORMS)


def delta_rule(
    q: Float[Array, "b t hk k"],
    k: Float[Array, "b t*{num_householder} hk k"],
    v: Float[Array, "b t*{num_householder} h v"],
    beta: Float[Array, "b t*{num_householder} h"] | None = None,
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    *,
    erase: Float[Array, "b t*{num_householder} h k"] | None = None,
    write: Float[Array, "b t*{num_householder} h v"] | None = None,
    num_householder: int = 1,
    initial_state: Float[Array, "b h k v"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    inverse_precision: Precision = "float32",
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Decay, read with k, write the error, read with q:

        Sbar = diag(e^{log_decay_t}) S_{t-1};  u_t = beta_t (v_t - Sbar^T k_t);
        S_t = Sbar + k_t u_t^T;  o_t = S_t^T q_t

    With n = num_householder > 1 a token decays once and is written n times, u_t and S_t for each of its n rows of k, v
    and beta, before it is read. With erase and write in place of beta, both per channel:

        u_t = write_t * v_t - Sbar^T (erase_t * k_t)

    Args:
      q: [b t hk k], scaled by the caller.
      k: [b t*n hk k], row t*n + j is update j of token t. The caller normalises it: the recurrence diverges where
        beta |k|^2 > 2.
      v: [b t*n h v], h a multiple of hk: value head j uses key head j // (h / hk).
      beta: [b t*n h], the rate of the update, 0 to 1, or to 2 where negative eigenvalues are wanted.
      log_decay: natural log of the factor on the state before the first read of a token, <= 0. None: no
        decay (DeltaNet). [b t h]: one per head (Gated DeltaNet). [b t h k]: one per key channel (KDA).
      erase: [b t*n h k], how much of what is read with each channel of k is taken away, 0 to 1 (Gated DeltaNet-2).
      write: [b t*n h v], how much of each channel of v is written, 0 to 1. Given together with erase and without beta.
      num_householder: n, updates a token (DeltaProduct).
      initial_state: [b h k v], zeros by default.
      valid: [b t], False where a token changes nothing, whatever stands in its inputs (NaN too); its o is 0.
      start: [b t], True where the state is cleared before the token, even if that is not valid, so that packed
        documents don't see each other.
      chunk_size: rows of k per chunk of the chunked forms, a power of two. None: 16 to 64, as wide as a key or a
        value.
      inverse_precision: of the products that invert a triangular matrix in the chunked forms, "float32" (that of the
        state, which may be float64), "bf16x3" or "bf16"; `triangular.unit_lower_inverse` says what it costs.
      implementation: "reference" (a scan over rows, the definition), "xla" (chunks, any device), or None: the fastest
        for the shape and for what is asked for. "xla" and None have reverse-mode derivatives only.

    Returns:
      o [b t h v] in the dtype of v, and the state after the last token [b h k v]. The state is float32, or float64 if
      any array given is, and everything is accumulated in that dtype. A sequence may be cut anywhere: the final state
      of one part is the initial state of the next. Every array is differentiable, initial_state too.

    Raises:
      ValueError: shapes that don't fit, arrays that hold no floats, masks that are not bool, beta beside erase or
        write, one of these alone, none of the three, num_householder < 1, a chunk_size that is no power of two, an
        unknown inverse_precision or implementation.

    References:
      Yang et al., Parallelizing linear transformers with the delta rule over sequence length, arXiv 2406.06484; Yang et
      al., Gated delta networks, arXiv 2412.06464; Kimi Linear (KDA), arXiv 2510.26692; Siems et al., DeltaProduct,
      arXiv 2502.10297; Gated DeltaNet-2, arXiv 2605.22791.
    """
    op, n = "delta_rule", num_householder
    if n < 1:
        raise ValueError(f"{op}: num_householder is {n}, needs at least 1")
    dispatch.check_rank(op, "q", q, "b t hk k")
    dispatch.check_rank(op, "v", v, f"b t{f'*{n}' if n > 1 else ''} h v")
    (b, t, hk, d), (h, e) = q.shape, v.shape[2:]
    if h % hk:
        raise ValueError(f"{op}: v has {h} heads, needs a multiple of the {hk} heads of k")
    rates = {"beta": beta, "erase": erase, "write": write}
    given = " and ".join(name for name, a in rates.items() if a is not None)
    if given not in ("beta", "erase and write"):
        raise ValueError(f"{op}: got {given or 'none of beta, erase and write'}, needs beta, or erase and write")
    dispatch.check_shape(op, "k", k, (b, t * n, hk, d))
    dispatch.check_shape(op, "v", v, (b, t * n, h, e))
    dispatch.check_shape(op, "beta", beta, (b, t * n, h))
    dispatch.check_shape(op, "erase", erase, (b, t * n, h, d))
    dispatch.check_shape(op, "write", write, (b, t * n, h, e))
    dispatch.check_shape(op, "log_decay", log_decay, (b, t, h), (b, t, h, d))
    dispatch.check_shape(op, "initial_state", initial_state, (b, h, d, e))
    dispatch.check_masks(op, (b, t), valid=valid, start=start)
    dispatch.check_float(op, q=q, k=k, v=v, **rates, log_decay=log_decay, initial_state=initial_state)
    chunk_size = dispatch.chunk_size_for(op, chunk_size, d, e)
    dispatch.check_choice(op, "inverse_precision", inverse_precision, PRECISIONS)

    dtype = dispatch.accumulator(q, k, v, beta, erase, write, log_decay, initial_state)
    state = dispatch.initial(initial_state, (b, h, d, e), dtype, start)
    erase, write = (erase, write) if beta is None else (beta, beta)
    if valid is not None:
        q, log_decay = dispatch.keep(valid, q, log_decay)
        k, v, erase, write = dispatch.keep(jnp.repeat(valid, n, 1), k, v, erase, write)
    if n > 1:  # a token as n rows: it begins and decays with the first and is read after the last
        q = _on_row(n - 1, n, q)
        log_decay, start = jax.tree.map(functools.partial(_on_row, 0, n), (log_decay, start))
    o, state = dispatch.run(
        op,
        implementation,
        FORMS,
        (q, k, v, erase, write, log_decay, state, start),
        t=t * n,
        size=state.size,
        variant=dispatch.variant_of(log_decay),
        chunk_size=chunk_size,
        inverse_precision=inverse_precision,
    )
    return o[:, n - 1 :: n].astype(v.dtype), state


def _on_row(j: int, n: int, x: Array) -> Array:
    """[b t ...] to [b t*n ...]: what belongs to a token on row j of its n rows, zeros on the others."""
    rows = jnp.pad(x[:, :, None], [(0, 0), (0, 0), (j, n - 1 - j)] + [(0, 0)] * (x.ndim - 2))
    return rows.reshape(x.shape[0], -1, *x.shape[2:])
