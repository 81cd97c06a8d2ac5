"""A model's step as a program: run in a process without memjax, it says and keeps what `model.step` does."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from memjax.catalog import CATALOG
from memjax.combinators import Repeat, Residual, Stack
from memjax.errors import CheckpointError, ConfigError
from memjax.lm import export
from memjax.lm.export import export_init_state, export_step, save_export
from memjax.lm.model import LanguageModel, block
from memjax.memory import How, Memory, Slot, named

V, B, T = 20, 3, 6


def small(name: str) -> Memory:
    return CATALOG[name].build_small()


# States as named tuples, in a tuple of layers, in dicts; a ring of keys and values; a convolution.
MODEL = LanguageModel(
    Stack((Repeat(block(small("gated_delta_net"), 24), 2), Residual(small("sliding_window_attention")))), V
)

# The import of memjax fails, and what the module's docstring tells is run as it stands there.
PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("memjax", "pallas_kernels", "flax"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
import numpy as np

given = np.load("given.npz")
token, valid = given["tokens"][0], given["valid"][0]
{}
said = [logits]
for token, valid in zip(given["tokens"][1:], given["valid"][1:]):
    before = state
    logits, state = step(params, state, token, valid)
    assert all(a.is_deleted() for a in before.values())  # donated: a decoded token copies no cache
    said.append(logits)
assert not any(name.partition(".")[0] in ("memjax", "pallas_kernels") for name in sys.modules)
np.savez("told.npz", logits=np.stack(said), **{{"state." + name: a for name, a in state.items()}})
print(jax.default_backend(), {{type(tree).__name__ for tree in (params, state)}})
"""


def run(folder, tokens, valid):
    """The docstring's program on model.export with these tokens [t b]: what it prints, logits [t b v], the state."""
    lines = textwrap.dedent(export.__doc__.partition("and this:\n\n")[2].partition("\n\nparams and state")[0])
    np.savez(folder / "given.npz", tokens=tokens, valid=valid)
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(lines)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = dict(np.load(folder / "told.npz"))
    return done.stdout.strip(), told.pop("logits"), {name.removeprefix("state."): a for name, a in told.items()}


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("export")
    save_export(path / "model.export", MODEL, params, B)
    return path


def test_a_process_without_memjax_says_the_same(folder, params):
    rng = np.random.default_rng(0)
    tokens, valid = rng.integers(0, V, (T, B), np.int32), np.ones((T, B), bool)
    valid[3:, 1] = False  # a row that rests keeps its state
    printed, logits, kept = run(folder, tokens, valid)
    assert printed == "cpu {'dict'}"

    step, state = jax.jit(MODEL.step), MODEL.init_state(B)
    for t in range(T):
        want, state = step(params, state, tokens[t], valid=valid[t])
        np.testing.assert_allclose(logits[t], want, atol=1e-5)
    assert kept.keys() == named(state).keys() and len(kept) > 4
    for name, want in named(state).items():
        assert kept[name].dtype == want.dtype
        np.testing.assert_allclose(kept[name], want, atol=1e-5)


def test_what_is_in_the_file(folder, params):
    with safe_open(folder / "model.export", "numpy") as file:
        header, names = file.metadata(), set(file.keys())
        programs = {name: file.get_tensor(name) for name in names if name.startswith("program.")}
        for name, a in named(params).items():
            np.testing.assert_array_equal(file.get_tensor(name), a)
    assert names == {*named(params), "program.init_state", "program.step"}
    assert (header["format"], header["platforms"], header["batch"]) == ("memjax-export", "cpu cuda tpu", "3")
    assert json.loads(header["state_axes"])["body.0.0.0.memory.S"][0] == "batch"
    for program in programs.values():
        assert jax.export.deserialize(bytearray(program)).platforms == ("cpu", "cuda", "tpu")


def test_other_parameters_fit_into_the_program(folder):
    with safe_open(folder / "model.export", "numpy") as file:
        step = jax.export.deserialize(bytearray(file.get_tensor("program.step"))).call
    other, token = MODEL.init(jax.random.key(1)), jnp.array([1, 2, 3], jnp.int32)
    logits, _ = step(named(other), named(MODEL.init_state(B)), token, jnp.ones(B, bool))
    want, _ = jax.jit(MODEL.step)(other, MODEL.init_state(B), token)
    np.testing.assert_allclose(logits, want, atol=1e-5)


def test_shapes_are_enough(params):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    program = export_step(MODEL, shapes, 1, platforms=["tpu"])
    assert jax.export.deserialize(bytearray(program)).platforms == ("tpu",)
    assert len(program) == len(export_step(MODEL, params, 1, platforms=["tpu"]))  # parameters are no constants in it


@dataclass(frozen=True)
class Counting(Memory):
    """A state that does not begin at zero."""

    dim: int

    def state_specs(self, batch):
        return {"left": Slot((batch,), ("batch",), jnp.int32, fill=7)}

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return x, {"left": state["left"] - x.shape[1]}


def test_the_empty_state_is_that_of_the_memory():
    model = LanguageModel(Counting(dim=8), V)
    init_state = jax.export.deserialize(bytearray(export_init_state(model, 2))).call
    state = init_state()
    assert list(state) == ["body.left"] and state["body.left"].tolist() == [7, 7]


@pytest.mark.parametrize("name", CATALOG)
def test_every_memory_is_exported_for_every_platform(name):
    memory = small(name)
    model = memory if memory.takes_ids else LanguageModel(Residual(memory), memory.reads_ids or V)
    assert export_step(model, jax.eval_shape(model.init, jax.random.key(0)), 2)


def test_an_older_export_is_replaced_and_nothing_else(folder, params, tmp_path):
    path = tmp_path / "sub" / "model.export"
    first = save_export(path, MODEL, params, 1, platforms=["cpu"])
    assert save_export(path, MODEL, params, 1) > first
    other = tmp_path / "letter.txt"
    other.write_text("dear reader")
    with pytest.raises(CheckpointError, match="letter.txt: exists and is no export"):
        save_export(other, MODEL, params, 1)
    assert other.read_text() == "dear reader"
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.export"]


class Kernels(Residual):
    """It says that its op has a kernel for GPUs."""

    implementations = ("reference", "xla", "pallas_gpu")


def test_what_is_refused(params, monkeypatch):
    refused = lambda match, error=ValueError: pytest.raises(error, match=match)  # noqa: E731
    with refused("SimpleGatedLinearAttention takes no token ids", ConfigError):
        export_step(small("simple_gla"), {}, 1)
    with refused("batch is 0, needs at least 1"):
        export_step(MODEL, params, 0)
    with refused(r"platforms are \('gpu',\), needs some of cpu, cuda, tpu"):
        export_step(MODEL, params, 1, platforms=["gpu"])
    with refused("platforms are"):
        export_step(MODEL, params, 1, platforms=[])
    with refused(r"export_step: params has no params\['body'\]"):
        export_step(MODEL, {}, 1)
    with refused("implementation is 'pallas_gpu', this model has reference, xla"):
        export_step(MODEL, params, 1, how=How(implementation="pallas_gpu"))
    model = LanguageModel(Kernels(small("gla")), V)
    with refused("implementation 'pallas_gpu' is none for cpu; name the platform cuda alone"):
        export_step(model, model.init(jax.random.key(0)), 1, how=How(implementation="pallas_gpu"))
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.delitem(sys.modules, "jax._src.export.serialization", raising=False)
    with refused(r"needs flatbuffers, pip install 'memjax\[export\]'", ConfigError):
        export_step(MODEL, params, 1)
