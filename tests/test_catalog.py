"""The map of the field: every row names a class that is where it says, builds, and is documented."""

import importlib
import re
from pathlib import Path

import jax
import pytest

import memjax
from memjax.catalog import CATALOG, PLACES
from memjax.memory import Memory

ROOT = Path(memjax.__file__).parent
GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("name", CATALOG)
def test_entry(name):
    entry = CATALOG[name]
    assert issubclass(entry.cls, Memory) and entry.path == f"{entry.cls.__module__}.{entry.cls.__name__}"
    assert entry.place in PLACES
    small = entry.build_small()
    assert small.dim == 16 and small.param_specs()
    assert small.state_bytes(2) == sum(a.nbytes for a in jax.tree.leaves(small.init_state(2)))
    assert entry.summary and entry.when and not entry.summary.endswith(".") and not entry.when.endswith(".")
    assert str(entry.year) in entry.paper or re.search(rf"arXiv {entry.year % 100}", entry.paper)
    assert all((GOLDENS / f"{g}.npz").is_file() for g in entry.goldens)


def test_every_architecture_is_in_it():
    """A Memory in one of the four folders that is in no row is not in the library."""
    known = {entry.cls.__module__ for entry in CATALOG.values()}
    modules = [
        importlib.import_module(f"memjax.{place}.{p.stem}") for place in PLACES for p in (ROOT / place).glob("*.py")
    ]
    own = {m.__name__: [c for c in vars(m).values() if getattr(c, "__module__", "") == m.__name__] for m in modules}
    files = {name for name, found in own.items() if any(isinstance(c, type) and issubclass(c, Memory) for c in found)}
    assert files == known


def test_tables_cannot_be_written_to():
    with pytest.raises(TypeError):
        CATALOG["mine"] = CATALOG["gla"]  # type: ignore[index]
