"""MesaNet: every readout solves the least-squares problem of all that was read, instead of taking a step towards it.

The state keeps the correlations of the keys with each other beside those with the values; a query is first divided by
the former, so that keys which resemble each other don't blur what is recalled.

Paper: von Oswald et al., MesaNet: sequence modeling by locally optimal test-time training, arXiv 2506.05233 (2025).

State:  H_kk [b h k k] and H_kv [b h k v] float32, the correlations; conv, the last rows of q, k before the convolution.
Update: H_kk,t = e^{g_t} H_kk,t-1 + beta_t k_t k_t^T;  H_kv,t = e^{g_t} H_kv,t-1 + beta_t k_t v_t^T
        o_t = H_kv,t^T q*_t;  (H_kk,t + diag(Lambda)) q*_t = q_t
        g_t = logsigmoid(x_t W_a + b_a);  beta_t = sigmoid(x_t W_b + b_b);  Lambda = softplus(lambda_params) + 0.25

Differs from the paper: the gradient is that of the exact solution (the implicit function theorem), however many steps
were taken; conjugate gradients begin at zero in decoding too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from memjax.layers import gate, heads, l2_norm, linear, wide
from memjax.memory import How, Param, Slot, at_least, constant, dense, specs
from memjax.recurrence import Recurrence, conv_weight, convolved, gated_output
from memjax.tensors import depthwise, matrix, same
from pallas_kernels import chunks, dispatch
from pallas_kernels.chunk_states import Chunks, Write, chunk_states
from pallas_kernels.compat import match_varying
from pallas_kernels.short_conv import IMPLEMENTATIONS

GUARD = 1e-30
"""Added to what conjugate gradients divide by. Steps end to have an effect where |residual|^2 is as small."""

dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class MesaNetState(NamedTuple):
    """What was read so far."""

    H_kk: Float[Array, "b h k k"]  # float32, keys with keys
    H_kv: Float[Array, "b h k v"]  # float32, keys with values
    conv: Float[Array, "b w c"]  # float32, the last conv_size - 1 rows of q, k before the convolution


@dataclass(frozen=True)
class MesaNet(Recurrence):
    """MesaNet over x [b, t, dim].

    heads, head_dim: of queries, keys and values. conv_size: width of the causal convolution on q and k.
    lambda_lower_bound: least regularisation of a key channel, in [0, 1); it begins at 1. steps: of conjugate gradients;
    fewer are cheaper and less exact. None solves the equations of each token directly, which is faster for heads up to
    16 and slower beyond, and has a matrix [head_dim, head_dim] for each of up to 256 tokens at the same time.
    use_gate: the output is multiplied by silu(x W_g).
    """

    dim: int
    heads: int = 16
    head_dim: int = 128
    conv_size: int = 4
    lambda_lower_bound: float = 0.25
    steps: int | None = 30
    use_gate: bool = False
    norm_eps: float = 1e-5

    implementations: ClassVar[tuple[str, ...]] = IMPLEMENTATIONS
    own: ClassVar[tuple[str, ...]] = ("w_k", "w_v", "w_a", "b_a", "w_b", "b_b")

    def __post_init__(self):
        at_least(self, 1, "dim", "heads", "head_dim", "steps")
        at_least(self, 2, "conv_size")
        if not 0 <= self.lambda_lower_bound < 1:
            raise ValueError(f"MesaNet: lambda_lower_bound is {self.lambda_lower_bound}, needs 0 <= it < 1")

    @property
    def inner(self) -> int:
        """Channels of q, of k and of v."""
        return self.heads * self.head_dim

    def param_specs(self):
        d, h, hk = self.dim, self.heads, self.inner
        lam = math.log(math.expm1(1 - self.lambda_lower_bound))  # Lambda = 1
        return {
            "w_q": dense(d, hk),
            "w_k": dense(d, hk),
            "w_v": dense(d, hk),
            "w_a": dense(d, h, kind="gate"),
            "b_a": Param((h,), ("heads",), constant(0), "gate"),
            "w_b": dense(d, h, kind="gate"),
            "b_b": Param((h,), ("heads",), constant(0), "gate"),
            **({"w_g": dense(d, hk)} if self.use_gate else {}),
            "w_o": dense(hk, d, ("heads", "model")),
            "lambda_params": Param((hk,), ("heads",), constant(lam), "gate"),
            "conv": conv_weight(self.conv_size, 2 * hk),
            "norm": Param((self.head_dim,), ("value",), constant(1), "vector"),
        }

    def state_specs(self, batch):
        shape = (batch, self.heads, self.head_dim, self.head_dim)
        return specs(
            MesaNetState,
            H_kk=Slot(shape, ("batch", "heads", "key", None)),
            H_kv=Slot(shape, ("batch", "heads", "key", "value")),
            conv=Slot((batch, self.conv_size - 1, 2 * self.inner), ("batch", None, None)),
        )

    def tensors(self):
        return {
            **{f"w_{n}": matrix(f"{n}_proj.weight") for n in ("q", "k", "v", "a", "b", "o")},
            **({"w_g": matrix("g_proj.weight")} if self.use_gate else {}),
            "b_a": same("a_proj.bias"),
            "b_b": same("b_proj.bias"),
            "lambda_params": same("lambda_params"),
            "conv": depthwise(("q_conv1d.weight", self.inner), ("k_conv1d.weight", self.inner)),
            "norm": same("o_norm.weight"),
        }

    def recall(self, params, state, x, *, valid=None, start=None, how: How = How()):
        masks: dict[str, Any] = {"valid": valid, "start": start}
        # q, k = silu(conv(x W)) of length 1, v = x W
        (q, k), conv = convolved(params, ("w_q", "w_k"), state.conv, x, **masks, how=how)
        q, k, v = (heads(a, self.heads) for a in (q, k, linear(x, params["w_v"])))
        # beta = sigmoid(x W_b + b_b), g = logsigmoid(x W_a + b_a), Lambda = softplus(lambda_params) + 0.25, in float32
        beta = jax.nn.sigmoid(gate(x, params["w_b"], params["b_b"]))
        log_decay = jax.nn.log_sigmoid(gate(x, params["w_a"], params["b_a"]))
        Lambda = jax.nn.softplus(wide(params["lambda_params"])) + self.lambda_lower_bound
        # o = H_kv^T (H_kk + diag(Lambda))^-1 q
        o, H_kk, H_kv = mesa(
            l2_norm(q),
            l2_norm(k),
            v,
            beta,
            log_decay,
            Lambda.reshape(self.heads, -1),
            state.H_kk,
            state.H_kv,
            **masks,
            steps=self.steps,
            chunk_size=1 if how.implementation == "reference" else 32,
        )
        return o, MesaNetState(H_kk, H_kv, conv)

    def output(self, params, o, x):
        # y = W_o RMSNorm(o), times silu(x W_g) if there is a gate
        z = jax.nn.silu(linear(x, params["w_g"])) if self.use_gate else None
        return gated_output(params, o, self.norm_eps, z)


def mesa(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    beta: Float[Array, "b t h"],
    log_decay: Float[Array, "b t h"],
    Lambda: Float[Array, "h k"],
    H_kk: Float[Array, "b h k k"],
    H_kv: Float[Array, "b h k v"],
    *,
    valid: Bool[Array, "b t"] | None = None,
    start: Bool[Array, "b t"] | None = None,
    steps: int | None = 30,
    guard: float = GUARD,
    chunk_size: int = 32,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k k"], Float[Array, "b h k v"]]:
    """o_t = H_kv,t^T (H_kk,t + diag(Lambda))^-1 q_t, and the states behind it; computes in the dtype of the states.

    steps, guard: of conjugate gradients; steps None solves directly. chunk_size: a power of two.
    """
    n, c = k.shape[-1], chunks.chunk_length(q.shape[1], chunk_size)
    solve = _direct if steps is None else functools.partial(_conjugate_gradients, steps, guard)

    def span(H, now, start):
        q, k, v, beta, Lambda, g = now
        q, k, v, beta, Lambda = (chunks.split(a.astype(H.dtype), c) for a in (q, k, v, beta[..., None], Lambda))
        decays: Any = chunks.decays(chunks.factors(g, start, c, H.dtype))
        write = Write(decays.leave * beta * k, jnp.concatenate([k, v], -1))
        states = chunk_states(Chunks(decays.through, write, None), H)
        H_kk, H_kv = jnp.split(states.entering, [n], -1)
        D = chunks.decay_matrix(decays, c, H.dtype) * beta.mT
        Lambda = jnp.where(Lambda > 0, Lambda, jnp.ones_like(Lambda))  # of what fills the last chunk
        x = solve(Equations(H_kk, decays.enter, k, D, Lambda), q)
        return states.final, chunks.merge(dot(decays.enter * x, H_kv) + dot(dot(x, k.mT) * D, v))

    H = jnp.concatenate([H_kk, H_kv], -1)
    H = dispatch.initial(H, H.shape, H.dtype, start)
    q, k, v, beta, log_decay = dispatch.keep(valid, q, k, v, beta, log_decay)
    o, H = chunks.scan_spans(span, H, (q, k, v, beta, jnp.broadcast_to(Lambda, q.shape), log_decay), start, c)
    H_kk, H_kv = jnp.split(H, [n], -1)
    return o.astype(v.dtype), H_kk, H_kv


class Equations(NamedTuple):
    """(enter_r H + sum_i D[r, i] k_i k_i^T + diag(Lambda_r)) x_r = q_r for the rows r of chunks."""

    H: Float[Array, "n b h k k"]  # what enters the chunk
    enter: Float[Array, "n b h c 1"]  # its decay up to each row
    k: Float[Array, "n b h c k"]
    D: Float[Array, "n b h c c"]  # decays between rows, times beta_i
    Lambda: Float[Array, "n b h c k"]


def _product(A: Equations, x: Array) -> Array:
    """The left side for all rows, without a matrix for any."""
    return dot(A.enter * x, A.H.mT) + dot(dot(x, A.k.mT) * A.D, A.k) + A.Lambda * x


def _direct(A: Equations, q: Array) -> Array:
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    matrices = A.enter[..., None] * A.H[..., None, :, :] + einsum("nbhri,nbhik,nbhil->nbhrkl", A.D, A.k, A.k)
    eye = jnp.eye(q.shape[-1], dtype=q.dtype)[None, None, None, None]
    return jnp.linalg.solve(matrices + A.Lambda[..., None] * eye, q[..., None])[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conjugate_gradients(steps: int, guard: float, A: Equations, q: Array) -> Array:
    """x after so many steps from zero. The gradient is that of the solution: y = A^-T dx, dq = y, dA = -y x^T."""

    def squared(a: Array) -> Array:
        return jnp.sum(a * a, -1, keepdims=True)

    def step(_, held):
        x, r, p, size = held
        along = _product(A, p)
        by = size / (jnp.sum(p * along, -1, keepdims=True) + guard)
        x, r = x + by * p, r - by * along
        return x, r, r + squared(r) / (size + guard) * p, squared(r)

    held = match_varying((jnp.zeros_like(q), q, q, squared(q)), A)
    return lax.fori_loop(0, steps, step, held)[0]


def _forward(steps: int, guard: float, A: Equations, q: Array):
    x = _conjugate_gradients(steps, guard, A, q)
    return x, (A, x)


def _backward(steps: int, guard: float, kept: tuple[Equations, Array], dx: Array):
    A, x = kept
    y: Any = _conjugate_gradients(steps, guard, A._replace(H=A.H.mT), dx)
    return jax.vjp(lambda A: _product(A, x), A)[1](-y)[0], y


_conjugate_gradients.defvjp(_forward, _backward)
