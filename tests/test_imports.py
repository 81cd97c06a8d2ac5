"""What an import brings with it, which way imports point, and that the tests run as strictly as conftest.py says."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from memjax import arrays

ROOT = Path(__file__).parents[1]

# The layers of the library: a file imports from its own row and the rows above it, never from a row below. A name
# stands for the module or the whole package; "memjax" alone is memjax/__init__.py, the shop window.
LAYERS = [
    {"pallas_kernels"},
    {"memjax.errors", "memjax.arrays", "memjax.record"},
    {"memjax.memory", "memjax.layers", "memjax.recurrence", "memjax.heads", "memjax.state_space", "memjax.tensors"},
    {"memjax.combinators", "memjax.blocks", "memjax.parallel"},
    {"memjax.in_state", "memjax.in_context", "memjax.in_storage", "memjax.in_weights"},
    {"memjax.catalog", "memjax.laws"},
    {"memjax"},
    {"memjax.bench", "memjax.data", "memjax.lm", "memjax.nnx", "memjax.plots", "memjax.tasks", "memjax.train"},
    {"memjax.serve"},
    {"memjax.cli", "memjax.__main__"},
    {"experiments"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# The only files in the four folders that are not an architecture: what all architectures of a folder are made of.
FOLDERS = ("memjax.in_state", "memjax.in_context", "memjax.in_storage", "memjax.in_weights")
CONTRACTS = {"memjax.in_context.cache", "memjax.in_weights.forgetting"}
CONTRACTS |= {f"memjax.in_storage.{path.stem}" for path in (ROOT / "memjax/in_storage").glob("bank*.py")}

# Slow to import, or in need of configuration, or nothing that a user of the contract asked for.
NOT_UNASKED = "beartype chex equinox flax grain hypothesis matplotlib"
NOT_UNASKED += " optax orbax rich safetensors starlette tensorstore tokenizers tyro uvicorn"


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(p): p for top in ("memjax", "pallas_kernels", "experiments") for p in sorted((ROOT / top).rglob("*.py"))
}


def imports_of(module):
    """Modules that a source file imports, anywhere in it; `from package import module` counts as the module."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
            base = above[: len(above) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= (names & FILES.keys()) | ({source} if names - FILES.keys() else set())
    return found


IMPORTS = {module: imports_of(module) for module in FILES}
OURS = {module: imported & FILES.keys() for module, imported in IMPORTS.items()}


def rank(module):
    place = ".".join(module.split(".")[: 2 if module.startswith("memjax") else 1])
    assert place in RANK, f"{module} has no place in the layout: see LAYERS"
    return RANK[place]


def is_architecture(module):
    return module.startswith(tuple(f"{folder}." for folder in FOLDERS)) and module not in CONTRACTS


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    own = rank(module)
    upward = {other for other in OURS[module] if rank(other) > own}
    assert not upward, f"{module} imports {sorted(upward)}, which stand above it"


@pytest.mark.parametrize("module", [m for m in FILES if is_architecture(m)])
def test_no_architecture_imports_another(module):
    others = {other for other in OURS[module] if is_architecture(other)}
    assert not others, f"{module} imports {sorted(others)}: what two share goes down to layers, memory or an op"


def test_no_cycles():
    order = list(graphlib.TopologicalSorter(OURS).static_order())
    assert set(order) == set(FILES)


def test_flax_is_imported_in_one_file():
    users = {module for module, imported in IMPORTS.items() if any(i.split(".")[0] == "flax" for i in imported)}
    assert users <= {"memjax.nnx"}


def loaded_by(statement):
    """Top-level packages in a fresh interpreter after a statement."""
    code = f"{statement}; import sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    return set(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split())


def test_memjax_loads_nothing_unasked():
    loaded = loaded_by("import memjax")
    assert "jax" in loaded
    assert not loaded & set(NOT_UNASKED.split())


def test_pallas_kernels_stands_alone():
    loaded = loaded_by("import pallas_kernels")
    assert "pallas_kernels" in loaded
    assert not loaded & {"memjax", *NOT_UNASKED.split()}


def test_the_tests_run_on_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_the_tests_are_strict():
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)
    with pytest.raises(jaxtyping.TypeCheckError):
        arrays.from_lengths(jnp.ones((2, 2), jnp.int32), 4)
