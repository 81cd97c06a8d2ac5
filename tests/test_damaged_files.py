"""Whatever stands in a file, reading it gives what was written or an error of ours: no other, no hang, no full memory.

Each file is damaged as an accident does it, and also as an author does it who knows the format, with all checksums put
right again ("sealed"): then what is read may differ, but it must be a value or an error of ours all the same.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import resource
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memjax.errors import BankError, MemjaxError
from memjax.in_storage.bank_change import Change
from memjax.in_storage.bank_files import append_documents, delete_documents, open_bank, unfinished, verify
from memjax.in_storage.bank_manifest import base_of, read_manifest, seal, write_note
from memjax.lm.files import load_model, save_model
from memjax.lm.weights import load_pretrained
from memjax.lm.weights.tensorfile import TensorFile
from memjax.memory import to_config
from tests.damage import Damage, damaged_bytes, damaged_json, damaged_tensors
from tests.in_storage.test_bank_files import block, write
from tests.lm import tiny
from tests.lm.published import arrays, write_folder, write_shards
from tests.train import test_checkpoint as checkpoints

SECONDS = 20  # of processor time for one file
ROOM = 1 << 20  # bytes that a run of Python takes here and there


class Subject(NamedTuple):
    """A file, what reads it, and what puts the checksums right that speak of it."""

    file: str
    read: Callable[[Path], Any]
    damaged: Callable[[bytes], st.SearchStrategy[bytes]]
    sealed: Callable[[Path, Path], None] | None
    examples: int  # of 10,000


# ---------------------------------------------------------------------------------------------- banks

SEGMENT = "bank/segment-00000000"


def bank_value(folder: Path) -> Any:
    opened = open_bank(folder / "bank", location="host")
    ids = [opened.token_ids(i).tolist() for i in opened.living().tolist()]
    return ids, [digest(a) for a in opened.bank], [str(column) for column in opened.documents]


def value_and_report(folder: Path) -> Any:
    """Also: `verify` raises nothing, and finds what keeps the bank from being read."""
    problems = verify(folder / "bank").problems
    assert all(line.startswith(str(folder / "bank")) and "\n" not in line for line in problems)
    try:
        return bank_value(folder)
    except MemjaxError:
        assert problems
        raise


def resumed(folder: Path) -> int:
    """What the next change takes from a note: whatever that is, the bank is as it was, and so is what is beside it."""
    with contextlib.ExitStack() as stack:
        copy = folder.with_name("copy")
        stack.callback(shutil.rmtree, copy)
        shutil.copytree(folder, copy)
        found = unfinished(copy / "bank")
        with Change(copy / "bank") as change:
            done = change.resume("plan")
        assert (copy / "home" / "letter.txt").read_text() == "dear"
        assert bank_value(copy) == bank_value(folder)
    if not found:
        raise BankError(f"{folder}: the note is ignored")  # which is what refusing it comes to
    return done


def seal_manifest(file: Path, _: Path) -> None:
    file.write_text(json.dumps(seal(json.loads(file.read_bytes()))))


def seal_table(file: Path, folder: Path) -> None:
    manifest = json.loads((folder / "bank/manifest.json").read_bytes())
    manifest["segments"][0]["table_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "bank/manifest.json").write_text(json.dumps(seal(manifest)))


def make_bank(folder: Path) -> None:
    bank = write(folder / "bank")
    append_documents(bank, [block([3, 3], 7, "z.txt")])
    delete_documents(bank, [1])
    (folder / "home").mkdir()
    (folder / "home" / "letter.txt").write_text("dear")


def make_unfinished(folder: Path) -> None:
    make_bank(folder)
    shutil.copytree(folder / "bank/segment-00000001", folder / "bank/segment-00000002")
    manifest = read_manifest(folder / "bank")
    entry = {**manifest["segments"][1], "name": "segment-00000002"}
    write_note(folder / "bank", base_of(manifest), "plan", 2, [entry])
    assert unfinished(folder / "bank") == 2


# ---------------------------------------------------------------------------------------------- models


def model_value(folder: Path) -> Any:
    loaded = load_model(folder / "model")
    return to_config(loaded.model), digest(loaded.params), loaded.tokenizer.hash, loaded.hash


def seal_model(file: Path, folder: Path) -> None:
    config = json.loads((folder / "model/config.json").read_bytes())
    text = json.dumps(config["memory"], sort_keys=True, separators=(",", ":")).encode() + b"\n"
    params = (folder / "model/params.safetensors").read_bytes()
    config |= {"hash": hashlib.sha256(text + params).hexdigest(), "params_bytes": len(params)}
    (folder / "model/config.json").write_text(json.dumps(config))


def make_model(folder: Path) -> None:
    model = tiny.model()
    save_model(folder / "model", model, tiny.params(model), tiny.TOKENIZER, reading=tiny.READING)


def tensors_value(folder: Path) -> Any:
    file = TensorFile(folder / "published/model.safetensors")
    return {name: digest(a) for name, a in file.items()}, file.metadata


def published_value(folder: Path) -> Any:
    model, params = load_pretrained(folder / "published")
    return to_config(model), digest(params)


def sharded_value(folder: Path) -> Any:
    model, params = load_pretrained(folder / "sharded")
    return to_config(model), digest(params)


def make_published(folder: Path) -> None:
    write_folder(folder / "published", "gla")
    write_shards(folder / "sharded", "gla", arrays("gla"))


# ---------------------------------------------------------------------------------------------- checkpoints

CHECKPOINT = "run/step_00000003"


def checkpoint_value(folder: Path) -> Any:
    data = checkpoints.Position(0)
    found = checkpoints._restore(folder / "run", data_iterator=data)
    return found.step, digest(found.params), digest(found.opt_state), digest(jax.random.key_data(found.key)), data.at


def seal_checkpoint(file: Path, _: Path) -> None:
    import zlib

    manifest = json.loads(file.read_bytes())
    manifest.pop("crc32", None)
    manifest["crc32"] = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    file.write_text(json.dumps(manifest))


def seal_file_of_checkpoint(file: Path, folder: Path) -> None:
    import zlib

    manifest = json.loads((folder / CHECKPOINT / "checkpoint.json").read_bytes())
    name, data = file.relative_to(folder / CHECKPOINT).as_posix(), file.read_bytes()
    manifest["files"][name] = [len(data), zlib.crc32(data)]
    (folder / CHECKPOINT / "checkpoint.json").write_text(json.dumps(manifest))
    seal_checkpoint(folder / CHECKPOINT / "checkpoint.json", folder)


def make_checkpoint(folder: Path) -> None:
    checkpoints._save(folder / "run", 3)


# ---------------------------------------------------------------------------------------------- all of them


def digest(tree: Any) -> list[str]:
    leaves = [np.asarray(a) for a in jax.tree.leaves(tree)]
    return [f"{a.dtype}{a.shape}{hashlib.sha256(a.tobytes()).hexdigest()}" for a in leaves]


MADE = {
    make_bank: [
        Subject("bank/manifest.json", bank_value, damaged_json, seal_manifest, 3000),
        Subject(f"{SEGMENT}/table.json", bank_value, damaged_json, seal_table, 1500),
        Subject(f"{SEGMENT}/k/zarr.json", value_and_report, damaged_json, None, 600),
        Subject(f"{SEGMENT}/ids/zarr.json", value_and_report, damaged_json, None, 400),
        Subject(f"{SEGMENT}/rk/c/0/0/0/0", value_and_report, damaged_bytes, None, 200),
        Subject(f"{SEGMENT}/ids/c/0", value_and_report, damaged_bytes, None, 200),
    ],
    make_unfinished: [Subject("bank/unfinished.json", resumed, damaged_json, seal_manifest, 600)],
    make_model: [
        Subject("model/config.json", model_value, damaged_json, seal_model, 600),
        Subject("model/params.safetensors", model_value, damaged_tensors, seal_model, 500),
        Subject("model/tokenizer.json", model_value, damaged_json, None, 100),
    ],
    make_published: [
        Subject("published/model.safetensors", tensors_value, damaged_tensors, None, 1200),
        Subject("published/model.safetensors", published_value, damaged_tensors, None, 100),
        Subject("published/config.json", published_value, damaged_json, None, 200),
        Subject("sharded/model.safetensors.index.json", sharded_value, damaged_json, None, 100),
    ],
    make_checkpoint: [
        Subject(f"{CHECKPOINT}/checkpoint.json", checkpoint_value, damaged_json, seal_checkpoint, 600),
        Subject(f"{CHECKPOINT}/params/_METADATA", checkpoint_value, damaged_json, seal_file_of_checkpoint, 100),
    ],
}
SUBJECTS = [(make, subject) for make, subjects in MADE.items() for subject in subjects]
NOT_WHAT_WAS_WRITTEN = ("published/config.json", "published/model.safetensors", "sharded/model.safetensors.index.json")
assert sum(subject.examples for _, subject in SUBJECTS) == 10_000


class Hangs(BaseException):
    """What nobody catches."""


@contextlib.contextmanager
def watched(room: float) -> Iterator[None]:
    """Hangs after so much processor time; AssertionError for more memory than `room`."""

    def stop(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert peak <= room, f"took {peak:,} bytes of memory, {room:,.0f} were expected"


def attack(folder: Path, subject: Subject, examples: int) -> dict[str, int]:
    """Damage the file so many times; how often it was refused and read."""
    file = folder / subject.file
    data, kept = file.read_bytes(), {p: p.read_bytes() for p in folder.rglob("*.json")}
    want = subject.read(folder)
    tracemalloc.start()
    assert subject.read(folder) == want
    usual = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    counts = {"refused": 0, "read": 0}

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(damage=subject.damaged(data).map(Damage), forged=st.booleans())
    def run(damage: bytes, forged: bool) -> None:
        file.write_bytes(damage)
        forged = forged and subject.sealed is not None
        if forged and subject.sealed:
            with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
                subject.sealed(file, folder)
        try:
            with watched(2 * usual + 10 * len(damage) + ROOM):
                found = subject.read(folder)
        except MemjaxError as error:
            text = str(error)
            assert "\n" not in text and len(text) < 1000 and str(folder) in text, text
            counts["refused"] += 1
        else:
            assert forged or subject.file in NOT_WHAT_WAS_WRITTEN or found == want
            counts["read"] += 1
        finally:
            file.write_bytes(data)
            for path, text in kept.items():
                path.write_bytes(text)

    run()
    return counts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders, each made once."""
    found: dict[Any, Path] = {}

    def folder(make: Callable[[Path], None]) -> Path:
        if make not in found:
            found[make] = tmp_path_factory.mktemp(make.__name__) / "here"
            found[make].mkdir()
            make(found[make])
        return found[make]

    return folder


NAMES = [f"{subject.file} {subject.read.__name__}" for _, subject in SUBJECTS]


@pytest.mark.parametrize("share", [40, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make, subject", SUBJECTS, ids=NAMES)
def test_a_damaged_file_is_read_or_refused(made, as_user, monkeypatch, make, subject, share):
    monkeypatch.setattr("os.fsync", lambda _: None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = attack(made(make), subject, max(6, subject.examples // share))
    assert counts["refused"]
    gc.collect()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < 1 << 29, f"{grown:,} bytes that Python does not know of"
