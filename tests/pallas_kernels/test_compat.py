"""What the scans rely on under shard_map."""

import jax
import jax.numpy as jnp

from pallas_kernels.compat import match_varying, varying_axes


def test_match_varying():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4])
    seen = {}

    def f(a, b):
        zeros = jnp.zeros((1, 1))
        tree = match_varying({"zeros": zeros, "b": b}, a)
        seen.update(before=varying_axes(zeros), zeros=varying_axes(tree["zeros"]), b=varying_axes(tree["b"]))
        return tree["zeros"] + a

    spec = jax.P("x", None), jax.P(None, "y")
    jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=jax.P("x", "y")))(jnp.ones((2, 1)), jnp.ones((1, 2)))
    assert seen == {"before": set(), "zeros": {"x", "y"}, "b": {"x", "y"}}
    assert varying_axes(jnp.ones(2)) == set()
