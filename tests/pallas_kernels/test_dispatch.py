"""Which form None runs: by length, by what is asked for, by the platform lowered for; and that a name is obeyed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import measure_forms
from pallas_kernels import delta_rule, diagonal_scan, dispatch, dplr_delta_rule, linear_attention, short_conv
from tests.pallas_kernels.compare import compiled


# Forms whose results tell which one ran, and which have the same derivative.
def reference(x):
    return x + 1


def xla(x):
    return x + 2


def kernel(x):
    return x + 3


def kernel_for_few(x):
    if x.shape[0] > 4:
        raise NotImplementedError("more than 4 rows")
    return kernel(x)


def broken(x):
    raise TypeError("a mistake in the kernel")


BOTH = {"reference": reference, "xla": xla}


def run(x, forms, implementation=None, t=100):
    return dispatch.run("op", implementation, forms, (x,), t=t, size=1)


def ran(lowered):
    """The constants of the program: 1.0, 2.0 or 3.0 for each form that is in it."""
    return {n for n in (1, 2, 3) if f"dense<{n}.000000e+00>" in lowered.as_text()}


def lowered(forms, platform, f=run, x=None):
    x = jnp.zeros(4) if x is None else x
    return jax.jit(lambda x: f(x, forms)).trace(x).lower(lowering_platforms=(platform,))


@pytest.fixture
def reference_is_fastest(monkeypatch):
    rows = [
        {"t": 100, "size": 1, "milliseconds": {"reference": 1.0, "xla": 2.0}},
        {"t": 10000, "size": 1, "milliseconds": {"reference": 3.0, "xla": 2.0}},
    ]
    monkeypatch.setattr(dispatch, "MEASURED", {"op": rows})


def test_a_short_sequence_is_the_recurrence():
    assert run(0.0, BOTH, t=dispatch.SHORT) == 1
    assert compiled(lambda x: run(x, BOTH, t=dispatch.SHORT + 1))(0.0) == 2


@pytest.mark.usefixtures("reference_is_fastest")
def test_on_cpus_the_nearest_measured_shape_decides():
    for t, value in ((30, 1), (900, 1), (1100, 2), (10**6, 2)):
        assert compiled(lambda x, t=t: run(x, BOTH, t=t))(0.0) == value


@pytest.mark.usefixtures("reference_is_fastest")
def test_a_gradient_runs_the_chunks():
    value, gradient = compiled(jax.value_and_grad(lambda x: run(x, BOTH)))(0.0)
    assert (value, gradient) == (2, 1)


@pytest.mark.usefixtures("reference_is_fastest")
def test_the_platform_is_the_one_lowered_for():
    """On this machine, which has CPUs only."""
    forms = BOTH | {"pallas_tpu": kernel}
    assert ran(lowered(forms, "cpu")) == {1}
    assert ran(lowered(forms, "cuda")) == {2}
    assert ran(lowered(forms, "tpu")) == {3}
    gradient = jax.grad(lambda x, forms: (run(x, forms) ** 2).sum())
    assert ran(lowered(forms, "tpu", gradient)) >= {3}
    assert 3 not in ran(lowered(forms, "cuda", gradient))


def test_only_not_implemented_tries_the_next():
    forms = BOTH | {"pallas_tpu": kernel_for_few}
    assert ran(lowered(forms, "tpu")) == {3}
    assert ran(lowered(forms, "tpu", x=jnp.zeros(5))) == {2}
    with pytest.raises(TypeError, match="a mistake in the kernel"):
        lowered(BOTH | {"pallas_tpu": broken}, "tpu")


def test_a_name_never_falls_back():
    forms = BOTH | {"pallas_tpu": kernel_for_few}
    assert run(0.0, forms, "reference") == 1
    with pytest.raises(NotImplementedError, match="more than 4 rows"):
        run(jnp.zeros(5), forms, "pallas_tpu")
    with pytest.raises(ValueError, match="op: implementation is 'pallas_gpu', needs None or one of reference, xla"):
        run(jnp.zeros(5), forms, "pallas_gpu")


Q, RATE = jnp.ones((1, 40, 2, 3)), jnp.zeros((1, 40, 2))
CALLS = {
    "linear": functools.partial(linear_attention, Q, Q, Q),
    "linear-head": functools.partial(linear_attention, Q, Q, Q, RATE, start=RATE[..., 0] > 0),
    "delta": functools.partial(delta_rule, Q, Q, Q, RATE, RATE, chunk_size=4),
    "dplr": functools.partial(dplr_delta_rule, Q, Q, Q, Q, Q, 0 * Q, chunk_size=4),
    "diagonal-real": functools.partial(diagonal_scan, Q, 0 * Q),
    "diagonal-complex": functools.partial(diagonal_scan, (Q, Q), 0 * Q, Q),
    "short-conv": functools.partial(short_conv, RATE, jnp.ones((4, 2)), jnp.zeros((1, 3, 2))),
}


@pytest.mark.parametrize("implementation", [None, "reference", "xla"])
@pytest.mark.parametrize("op", CALLS.values(), ids=CALLS.keys())
def test_a_second_call_traces_nothing(op, implementation):
    """Outside jit too, where an op is called in a notebook."""
    op(implementation=implementation)
    with jax.no_tracing():
        op(implementation=implementation)


def test_noise_is_no_reason_to_leave_the_recurrence(monkeypatch):
    for milliseconds, form in ((2.0, "reference"), (1.0, "reference"), (0.9, "reference"), (0.8, "xla")):
        rows = [{"t": 100, "size": 1, "milliseconds": {"reference": 1.0, "xla": milliseconds}}]
        monkeypatch.setattr(dispatch, "MEASURED", {"op": rows})
        assert dispatch.fastest_on_cpu("op", 100, 1) == form
    assert dispatch.fastest_on_cpu("not measured", 100, 1) == "xla"


def test_every_form_that_is_asked_for_is_measured():
    assert dispatch.MEASURED.keys() == measure_forms.FORMS.keys()


def test_measured_rows_are_of_known_ops_and_forms():
    for rows in dispatch.MEASURED.values():
        for row in rows:
            assert row["milliseconds"].keys() == {"reference", "xla"}
            assert min(row["milliseconds"].values()) > 0
            assert np.isfinite([row["t"], row["size"]]).all()


def test_chunks_are_as_long_as_heads_are_wide():
    sizes = {(1, 64): 16, (16, 16): 16, (24, 64): 32, (64, 24): 32, (64, 128): 64, (256, 256): 64}
    assert {widths: dispatch.chunk_size_for("op", None, *widths) for widths in sizes} == sizes
    assert dispatch.chunk_size_for("op", 8, 64, 64) == 8
    with pytest.raises(ValueError, match="op: chunk_size is 24, needs a power of two"):
        dispatch.chunk_size_for("op", 24, 64, 64)
