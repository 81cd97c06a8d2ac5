import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.data import generated, packed_documents, token_windows
from memjax.data.pipeline import best_fit
from memjax.errors import DataError

IDS = np.arange(101, dtype=np.int32)
DOCUMENTS = [np.full(n, n, np.int32) for n in (3, 9, 1, 4, 2, 7, 5, 0, 23, 6)]


def draw(rng):
    return {"x": rng.integers(0, 100, 3), "y": rng.normal(size=(2, 2)).astype(np.float32)}


def whole_batch(rng):
    return {"x": rng.integers(0, 100, (4, 3))}


PIPELINES = {
    "windows": lambda seed: token_windows(IDS, 10, batch=3, seed=seed),
    "packed": lambda seed: packed_documents(DOCUMENTS, 9, batch=3, seed=seed),
    "generated": lambda seed: generated(draw, seed=seed, batch=3),
    "generated batches": lambda seed: generated(whole_batch, seed=seed),
}
every = pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES.keys())


def take(dataset_or_iterator, n):
    return list(itertools.islice(iter(dataset_or_iterator), n))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name])


@every
@pytest.mark.parametrize("step", [0, 1, 7])
def test_resumed_equals_undisturbed(pipeline, step):
    undisturbed = take(pipeline(5), 12)  # over several epochs
    iterator = iter(pipeline(5))
    take(iterator, step)
    state = json.loads(json.dumps(iterator.get_state()))
    take(iterator, 3)  # what was read after the state was taken must not matter
    resumed = iter(pipeline(5))
    resumed.set_state(state)
    assert_same(take(resumed, 12 - step), undisturbed[step:])


@every
def test_the_seed_decides(pipeline):
    assert_same(take(pipeline(5), 4), take(pipeline(5), 4))
    with pytest.raises(AssertionError):
        assert_same(take(pipeline(5), 4), take(pipeline(6), 4))


def test_windows_in_order():
    first, second, third, _ = take(token_windows(IDS, 10, batch=4, seed=0, shuffle=False), 4)
    assert first["ids"].dtype == np.int32
    np.testing.assert_array_equal(first["ids"], np.arange(4)[:, None] * 10 + np.arange(11))
    assert second["ids"][:, 0].tolist() == [40, 50, 60, 70]
    assert third["ids"][:, 0].tolist() == [80, 90, 0, 10]  # the next epoch follows without a gap


def test_every_epoch_has_all_windows_in_its_own_order():
    epochs = [batch["ids"][:, 0].tolist() for batch in take(token_windows(IDS, 10, batch=10, seed=0), 3)]
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_windows_of_a_memory_mapped_file(tmp_path):
    np.save(tmp_path / "ids.npy", IDS.astype(np.uint16))
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    assert_same(take(token_windows(mapped, 10, batch=3, seed=5), 4), take(PIPELINES["windows"](5), 4))


def test_too_few_tokens_are_refused():
    with pytest.raises(DataError, match="one window of length 10 needs 11 tokens, got 10"):
        token_windows(IDS[:10], 10, batch=1, seed=0)
    assert take(token_windows(IDS[:11], 10, batch=1, seed=0), 1)[0]["ids"].shape == (1, 11)


def test_packed_rows_hold_every_piece_once():
    rows = packed_documents(DOCUMENTS, 9, batch=1, seed=0)
    count = sum(len(document) for document in DOCUMENTS) // 10  # the pieces happen to fill the rows
    pieces = []
    for batch in take(rows, count):
        ids, start, valid = (batch[name][0] for name in ("ids", "start", "valid"))
        assert ids.dtype == np.int32 and start.dtype == valid.dtype == bool and ids.shape == (10,)
        assert (ids[~valid] == 0).all() and not start[~valid].any() and start[0]
        assert (np.diff(valid.astype(int)) <= 0).all()
        pieces += [piece.tolist() for piece in np.split(ids[valid], np.flatnonzero(start[valid])[1:])]
    wanted = [d[i : i + 10].tolist() for d in DOCUMENTS for i in range(0, len(d), 10)]
    assert sorted(pieces) == sorted(wanted)


@given(data=st.data(), width=st.integers(1, 20))
def test_best_fit_is_a_packing(data, width):
    lengths = data.draw(st.lists(st.integers(1, width), max_size=40))
    rows = best_fit(lengths, width)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    room = [width - sum(lengths[i] for i in row) for row in rows]
    assert min(room, default=0) >= 0
    # A piece opens a row only where no earlier row has room: every two rows overflow one.
    assert all(width - a + width - b > width for a, b in itertools.combinations(room, 2))


def test_unusable_documents_are_refused():
    with pytest.raises(DataError, match="documents: got 2 documents and no token"):
        packed_documents([IDS[:0], IDS[:0]], 4, batch=1, seed=0)


def test_unusable_documents_are_named(as_user):
    with pytest.raises(DataError, match=r"documents\[1\]: needs 1-D integers, got shape \(2, 2\) of float64"):
        packed_documents([IDS, np.ones((2, 2))], 4, batch=1, seed=0)
    with pytest.raises(DataError, match=r"ids: needs 1-D integers, got shape \(2, 20\) of int64"):
        token_windows(np.ones((2, 20), np.int64), 4, batch=1, seed=0)


def test_generated_examples_depend_on_seed_and_place_only():
    one, three = (np.concatenate([b["x"] for b in take(generated(draw, seed=7, batch=n), 12 // n)]) for n in (1, 3))
    np.testing.assert_array_equal(one, three)
    np.testing.assert_array_equal(one[5], draw(np.random.default_rng([7, 5]))["x"])
    assert len({row.tobytes() for row in one}) == 12


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("length must be at least 1, got 0", lambda: token_windows(IDS, 0, batch=1, seed=0)),
        ("batch must be at least 1, got 0", lambda: packed_documents(DOCUMENTS, 4, batch=0, seed=0)),
        ("batch must be at least 1, got -2", lambda: generated(draw, seed=0, batch=-2)),
        (r"seed must be in \[0, 2\*\*32\), got -1", lambda: token_windows(IDS, 4, batch=1, seed=-1)),
        ("seed must not be negative, got -1", lambda: generated(draw, seed=-1)),
        ("workers must be at least 0, got -1", lambda: token_windows(IDS, 4, batch=1, seed=0, workers=-1)),
    ],
)
def test_bad_arguments_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


WORKERS = """
import itertools, json, sys
import jax
import numpy as np
from memjax.data import generated, token_windows

def draw(rng):
    return {"ids": rng.integers(0, 100, 3)}

def batches(iterator, n):
    return [batch["ids"].tolist() for batch in itertools.islice(iterator, n)]

if __name__ == "__main__":
    for make in (lambda workers: token_windows(np.arange(101), 10, batch=3, seed=5, workers=workers),
                 lambda workers: generated(draw, seed=5, batch=3, workers=workers)):
        wanted = batches(iter(make(0)), 9)
        iterator = iter(make(2))
        assert batches(iterator, 4) == wanted[:4]
        state = json.loads(json.dumps(iterator.get_state()))
        iterator.close()
        iterator = iter(make(2))
        iterator.set_state(state)
        assert batches(iterator, 5) == wanted[4:]
        iterator.close()
    print("same batches")
"""


@pytest.mark.slow
def test_worker_processes_in_a_plain_script(tmp_path):
    """Not under absl.app, as users run it: grain alone dies here with UnparsedFlagAccessError."""
    (tmp_path / "script.py").write_text(WORKERS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same batches"


def test_import_is_light():
    code = "import sys, memjax.data; print(*{'grain', 'tokenizers', 'absl', 'huggingface_hub'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == ""
