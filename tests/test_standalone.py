"""pallas_kernels alone: its program in the README runs where jax, numpy and jaxtyping are all that is installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import readme

ROOT = Path(__file__).parents[1]
INSTALLED = "jax jaxlib numpy jaxtyping".split() + "ml_dtypes opt_einsum scipy wadler_lindig".split()  # what these need

# Nothing else is found. (_sysconfigdata...: a module of the standard library, named after the platform.)
HIDE = f"""
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        known = {{*{["pallas_kernels", *INSTALLED]}, *sys.stdlib_module_names}}
        if top in known or top.startswith("_sysconfigdata"):
            return super().find_spec(name, path, target)

sys.path.insert(0, {str(ROOT)!r})
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Installed]
"""


def alone(program):
    """Runs a program where nothing else is installed."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", HIDE + program], env=env, capture_output=True, text=True)


def programs():
    """The README's programs that use pallas_kernels and not memjax."""
    blocks = [b.text for b in readme.blocks(readme.README.read_text(encoding="utf-8")) if b.kind == "python"]
    return [text for text in blocks if "import pallas_kernels" in text or "from pallas_kernels import" in text]


@pytest.mark.parametrize("package", ["memjax", "flax", "optax", "orbax.checkpoint", "beartype"])
def test_others_are_not_there(package):
    done = alone(f"import {package}")
    assert done.returncode == 1 and f"No module named '{package.partition('.')[0]}'" in done.stderr


def test_the_readme_program_runs_alone():
    (program,) = programs()
    assert program.count("\n") <= 12
    done = alone(program)
    assert done.returncode == 0, done.stderr
    cut, leaked = map(float, re.findall(r": ([^;\n]+)", done.stdout))
    assert cut < 1e-5 and leaked == 0
