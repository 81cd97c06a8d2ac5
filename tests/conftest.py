"""The environment of the tests: stricter than a user's, and the same on every machine.

Silent promotion, silent broadcasting and wrong shapes are errors here, so that they can't hide in the library. (That
warnings are errors, and which tests run by default, stands in pyproject.toml.)
"""

import gc
import itertools
import os
from pathlib import Path

# Tests don't depend on the accelerator that happens to be there. JAX reads this when it is imported, hence before it.
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# A bfloat16 array that meets a float32 one becomes float32 without a word; in a library that promises the dtype of x
# that is always a mistake.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# [b, t] + [t] broadcasts to something that may even have the right shape.
jax.config.update("jax_numpy_rank_promotion", "raise")

# A compilation cache shared between runs would let a test pass on a program that another jax or another flag compiled.
jax.config.update("jax_enable_compilation_cache", False)

# Annotations are checked at every call: beartype sees the types, jaxtyping that one letter means one size. It works
# on modules that are imported later, hence before any import of the two packages.
jaxtyping.install_import_hook(["memjax", "pallas_kernels"], "beartype.beartype")

from pallas_kernels.compat import QUICK_COMPILE  # noqa: E402

# Eight devices, because the sharded law needs more than one and two would not tell an axis from its neighbour. Most of
# the time of small tests is compilation, so XLA leaves out the passes that change speed and not results; goldens,
# notebooks and experiments in .ci/run do without these flags. XLA reads them with the first device.
flags = {"xla_force_host_platform_device_count": 8, **QUICK_COMPILE}
given = [f"--{name}={str(value).lower()}" for name, value in flags.items()]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *given]).strip()
assert jax.device_count() == 8

# The same examples in every run, so that a red test is red for everyone. No deadline: the first example compiles.
# `pytest --hypothesis-profile=default` searches anew.
hypothesis.settings.register_profile("memjax", derandomize=True, deadline=None)
hypothesis.settings.load_profile("memjax")


@pytest.fixture
def as_user(monkeypatch):
    """Call the library as a user does, without the type checker: for tests of the library's own error messages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def standard_promotion():
    """JAX's own dtype promotion: for tests that take an optax step, whose bias correction raises a float to an int."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# ---------------------------------------------------------------------------------------------- room for programs

# Linux grants a process 65,530 areas of memory, and each compiled program keeps some: a worker with more ends in an
# abort inside XLA. Programs that are thrown away and needed again are compiled again.
AREAS, EVERY = 40_000, 20
_tests = itertools.count(1)


def pytest_runtest_logfinish():
    """Throw all compiled programs away where a process holds many; looked at every few tests."""
    areas = Path("/proc/self/maps")
    if next(_tests) % EVERY == 0 and areas.exists() and areas.read_bytes().count(b"\n") > AREAS:
        jax.clear_caches()
        gc.collect()


# ---------------------------------------------------------------------------------------------- what the laws said

_verdicts: list[tuple[str, str, str]] = []


def pytest_runtest_logreport(report):
    """Collect what tests/test_laws.py records; with xdist, on the process that the workers report to."""
    _verdicts.extend(value for name, value in report.user_properties if name == "law" and report.when == "call")


def pytest_sessionfinish(session):
    """Keep the verdicts for tests/laws_table.py."""
    if _verdicts and not hasattr(session.config, "workerinput"):
        from tests import laws_table

        laws_table.keep(_verdicts)
