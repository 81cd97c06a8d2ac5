"""The numbers of the reference implementations, and the judge that compares them."""

from pathlib import Path

import numpy as np
import pytest

from memjax.catalog import CATALOG
from tests import golden

STEM = Path(__file__).parent / "goldens" / "stem_a.npz"


@pytest.fixture
def altered(tmp_path):
    """stem_a.npz with some arrays replaced, added or (None) left out."""

    def save(name="stem_b.npz", **arrays):
        path = tmp_path / name
        np.savez(path, **{k: a for k, a in {**np.load(STEM), **arrays}.items() if a is not None})
        return path

    return save


def failures(path):
    return {row.array: row.note for row in golden.judge(path) if not row.ok}


def test_every_file_is_judged_by_law_14():
    """In tests/test_laws.py, by the name of the file in the catalog."""
    assert {path.stem for path in STEM.parent.rglob("*.npz") if path.parent.name != "tasks"} == {
        name for entry in CATALOG.values() for name in entry.goldens
    }


def test_a_wrong_number_fails(altered, capsys):
    path = altered(out_y=np.load(STEM)["out_y"] * (1 + 1e-4))
    assert failures(path) == {"out_y": ""}
    assert golden.main([str(path)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "out_y" in line)
    assert line.split()[:3] == ["stem_b", "out_y", "1.0e-04"] and "FAIL" in line


def test_a_wrong_gradient_fails(altered):
    grad = np.load(STEM)["grad_table"].copy()
    grad[0] += 1e-3
    assert failures(altered(grad_table=grad)) == {"grad_table": ""}


def test_an_array_that_is_not_computed_is_missing(altered, capsys):
    path = altered(grad_param_beta=np.ones(3))
    assert failures(path) == {"grad_param_beta": "MISSING"}
    assert golden.main([str(path)]) == 1
    assert "FAIL  MISSING" in capsys.readouterr().out


def test_another_shape_fails(altered):
    assert failures(altered(out_y=np.load(STEM)["out_y"][:, 1:])) == {"out_y": "shape (2, 21, 16), not (2, 20, 16)"}


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_must_agree(wrong):
    ref = np.array([1.0, np.inf, -np.inf, np.nan])
    assert golden.error(ref, ref) == 0
    for i in range(4):
        x = ref.copy()
        x[i] = wrong
        assert golden.error(x, ref) == (0 if np.array_equal(x, ref, equal_nan=True) else np.inf)


def test_the_error_is_relative_to_the_reference():
    assert golden.error(np.array([3.0, 4.4]), np.array([3.0, 4.0])) == pytest.approx(0.4 / 5)
    assert golden.error(np.array([0.0, 0.1]), np.zeros(2)) == pytest.approx(0.1 / np.sqrt(2))
    assert golden.error(np.array([1.0, np.inf]), np.array([2.0, np.inf])) == pytest.approx(0.5)


def test_the_tolerances():
    double, single = "reference in float64, rounded to float32", "plain float32 code"
    cases = [("out_y", 1e-6), ("grad_q", 1e-5), ("grad_g", 2e-4), ("grad_param_gk_proj.0.weight", 2e-4)]
    cases += [("grad_param_A_log", 2e-4), ("grad_param_g_proj.weight", 1e-5), ("out_logits_bf16", 0.1)]
    assert [(name, golden.tolerance(name, double)) for name, _ in cases] == cases
    assert golden.tolerance("out_y", single) == 1e-5
    assert golden.tolerance("out_y", double, {"out_*": 1e-3, "*": 1.0}) == 1e-3


def test_indices_must_be_identical(altered, monkeypatch):
    layer = golden.ADAPTERS["stem"]
    monkeypatch.setitem(golden.ADAPTERS, "stem", lambda a, cfg: layer(a, cfg) | {"out_ids": a["in_ids"]})
    ids = np.load(STEM)["in_ids"]
    assert failures(altered(out_ids=ids)) == {}
    assert failures(altered(out_ids=np.where(ids == ids[0, 0], 0, ids))) == {"out_ids": ""}


def test_of_several_implementations_the_worst_is_judged(monkeypatch):
    layer = golden.ADAPTERS["stem"]
    both = lambda a, cfg: {n: {"good": x, "bad": 1.01 * x} for n, x in layer(a, cfg).items()}  # noqa: E731
    monkeypatch.setitem(golden.ADAPTERS, "stem", both)
    assert set(failures(STEM).values()) == {"bad"}


def test_noise_of_float32_is_told_from_an_error(altered, monkeypatch):
    monkeypatch.setattr(golden, "VALUES", 3e-8)  # float32 rounds to 6e-8, so no sum in it is that exact
    (row,) = (row for row in golden.judge(STEM) if row.array == "out_y")
    assert row.ok and row.error < 1e-12 and "in float64; float32: " in row.note
    assert failures(altered(out_y=np.load(STEM)["out_y"] * (1 + 1e-7)))  # near enough to be tried, and still wrong


@pytest.mark.parametrize("name", ["nothing_a.npz", "stem.d.npz", "stem_layer_a.npz"])
def test_an_unknown_system(name, altered, capsys):
    path = altered(name)
    with pytest.raises(golden.GoldenError, match="no adapter"):
        golden.judge(path)
    assert golden.main([str(path), str(STEM)]) == 2
    out, err = capsys.readouterr()
    assert f"{path}: no adapter for a system of this name; there are " in err and "gla_layer" in err
    assert "stem_a" in out and "1 files not judged" in out  # the other file is judged all the same


def test_the_longest_name_wins():
    assert golden.system_of(Path("gated_delta_net_layer_b.npz")) == "gated_delta_net_layer"
    assert golden.system_of(Path("gated_delta_net_b.npz")) == "gated_delta_net"
    assert golden.system_of(Path("gla_c.npz")) == "gla"


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "flipped", "array"])
def test_an_unreadable_file(damage, tmp_path, capsys):
    path, whole = tmp_path / "stem_b.npz", STEM.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        path.write_text("not an archive")
    elif damage == "flipped":
        path.write_bytes(whole[:2000] + bytes(255 - b for b in whole[2000:2400]) + whole[2400:])
    elif damage == "array":
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    assert golden.main([str(path)]) == 2
    assert f"{path}: can't be read as .npz: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"in_ids": None}, "has no 'in_ids'"),
        ({"cfg_json": np.array("{")}, "cfg_json is no JSON"),
        ({"cfg_json": np.array('{"dim": 16, "ffn_dim": 48, "vocab_size": 31, "residual": true}')}, "residual = True"),
        ({n: None for n in np.load(STEM) if n.startswith(("out_", "grad_"))}, "no golden file"),
    ],
    ids=["no input", "no JSON", "another system", "no outputs"],
)
def test_a_file_that_does_not_fit_its_adapter(arrays, message, altered, capsys):
    path = altered(**arrays)
    assert golden.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error
