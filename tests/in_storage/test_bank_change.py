"""A change of a bank that dies at any file operation: the bank is the old one or the new one, and the same call run
again ends in the same bytes as a call that nobody disturbed."""

import errno
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from memjax.errors import BankError
from memjax.in_storage import bank_arrays, bank_change, bank_disk
from memjax.in_storage.bank_files import (
    BankWriter,
    Change,
    Source,
    append_documents,
    compact,
    delete_documents,
    open_bank,
    unfinished,
)
from memjax.in_storage.bank_manifest import base_of, read_manifest, write_note
from tests.in_storage.test_bank_files import ABOUT, BLOCKS, LENGTHS, answers, assert_same, block, tree, use_all, write

MORE = [block([6], 3, "c.txt"), block([2, 2], 4, "c.txt"), block([7], 5, "d.txt")]


class Killed(BaseException):
    """What no code of ours may catch and live."""


class Deaths:
    """Stops the process before, or in the middle of, its n-th file operation; a dead process does nothing more."""

    def __init__(self, monkeypatch, n, error=Killed, once=False):
        self.count, self.n, self.error, self.once = 0, n, error, once
        for module, name in [
            *((bank_disk, f) for f in ("make_directory", "write_file", "rename", "remove")),
            *((bank_arrays, f) for f in ("make_directory", "write_rows")),
        ]:
            monkeypatch.setattr(module, name, self.guarded(getattr(module, name), name))

    def guarded(self, real, name):
        def operation(*args):
            self.count += 1
            if self.count == self.n or (self.count > self.n and not self.once):
                if name == "write_file" and self.count == self.n:  # the half of it
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                if name == "remove" and self.count == self.n and args[0].is_dir():
                    for file in sorted(p for p in args[0].rglob("*") if p.is_file())[::2]:
                        file.unlink()
                raise self.error(f"operation {self.count}, {name} {args[0]}")
            return real(*args)

        return operation


def build(path):
    """With a plan, in segments: goes on where another stopped."""
    plan = BankWriter(path, **ABOUT, plan="these blocks", overwrite=False)
    done = plan.done
    with plan as writer:
        for b in BLOCKS:
            if done:
                done -= len(b.doc_len)
            else:
                writer.append(b, {"b.txt": Source("b.txt", "1" * 64)})


def resumed_append(path):
    with Change(path) as change:
        done = change.resume("more blocks")
        if not done and "c.txt" in open_bank(path).documents.path:
            return  # was finished
        for b in MORE:
            if done:
                done -= len(b.doc_len)
            else:
                change.append(b)
        change.delete([1])
        change.refer(Source("e.txt"), 1, 2, open_bank(path).documents.sha256[1])
        change.finish()


def overwrite(path):
    write(path, MORE, overwrite=True)


CHANGES = {
    "build": build,
    "append": resumed_append,
    "append at once": lambda path: append_documents(path, MORE),
    "delete": lambda path: delete_documents(path, [0, 2]),
    "compact": compact,
    "overwrite": overwrite,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A bank with a deleted document, in two segments."""
    path = write(tmp_path_factory.mktemp("start") / "bank", BLOCKS)
    append_documents(path, [block([3, 3], 7, "z.txt")])
    delete_documents(path, [4])
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small segments; and nobody waits for the disk, since the machine stays on."""
    monkeypatch.setattr(bank_change, "SEGMENT", 8)
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_every_file_operation(start, tmp_path, monkeypatch, name, every):
    change = CHANGES[name]

    def fresh(folder):
        path = tmp_path / folder / "bank"
        path.parent.mkdir()
        return path if name == "build" else shutil.copytree(start, path)

    want = fresh("undisturbed")
    before = None if name == "build" else tree(want)
    with monkeypatch.context() as patch:
        deaths = Deaths(patch, -1)
        deaths.once = True
        change(want)
    assert not {p.name for p in want.iterdir()} - {"manifest.json", *(p.name for p in want.glob("segment-*"))}
    assert deaths.count >= {"delete": 2, "build": 30}.get(name, 12)
    for n in {*range(1, deaths.count + 1, every), *range(max(1, deaths.count - 3), deaths.count + 1)}:
        path = fresh(f"{n}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Deaths(patch, n)
            change(path)
        if name != "build":  # whoever reads now has the old bank or the new one, whole
            documents = use_all(path).documents.sha256
            assert documents in (use_all(start).documents.sha256, use_all(want).documents.sha256)
        elif (path / "manifest.json").exists():
            use_all(path)
        finished = before is not None and manifest(path) != before["manifest.json"]
        finished = finished or (name == "build" and (path / "manifest.json").exists())
        if finished and name in ("build", "append at once", "overwrite"):  # the command would do it once more
            with Change(path):
                pass
        else:
            change(path)
        assert tree(path) == tree(want), f"after operation {n}"
        shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_failure_of_every_file_operation(start, tmp_path, monkeypatch, name):
    """One operation fails, as on a full disk, and the process lives: the bank is the old one or the new one."""
    n, failed = 0, True
    while failed:
        n += 1
        path = tmp_path / f"{n}" / "bank"
        path.parent.mkdir()
        if name != "build":
            shutil.copytree(start, path)
        with monkeypatch.context() as patch:
            deaths = Deaths(patch, n, lambda text: BankError(f"{text}: no space left"), once=True)
            failed = True
            try:
                CHANGES[name](path)
                failed = deaths.count >= n  # in `suppress`: cleaning up is not worth an error
            except BankError as error:
                assert "no space left" in str(error)
        if name != "build" or (path / "manifest.json").exists():
            use_all(path)
        if path.exists():
            if (path / "manifest.json").exists():
                with Change(path):
                    pass
            else:
                build(path)
            assert not [p for p in path.iterdir() if "partial" in p.name]
            if unfinished(path):  # kept, to go on with
                resumed_append(path)
            assert not (path / "unfinished.json").exists()
            named = {s["name"] for s in use_all(path).manifest["segments"]}
            assert named == {p.name for p in path.glob("segment-*")}
        shutil.rmtree(path.parent)
    assert n > 3


def manifest(path):
    return (path / "manifest.json").read_bytes()


# ---------------------------------------------------------------------------------------------- going on


def test_what_was_written_is_not_written_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        writes = Deaths(patch, 10**9)
        with BankWriter(tmp_path / "b", **ABOUT, plan="these blocks") as writer:
            for b in BLOCKS[:2]:
                writer.append(b)
            raise KeyboardInterrupt
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["segment-00000000", "unfinished.json"]
    with monkeypatch.context() as patch:
        again = Deaths(patch, 10**9)
        build(tmp_path / "b")
    assert again.count < writes.count * 2
    build(tmp_path / "c")
    assert tree(tmp_path / "b").keys() == tree(tmp_path / "c").keys()
    assert use_all(tmp_path / "b").documents.chunks.tolist() == LENGTHS


@pytest.mark.parametrize("plan", ["other blocks", ""])
def test_another_plan_begins_anew(tmp_path, plan):
    stop_in_the_middle(tmp_path / "b")
    with BankWriter(tmp_path / "b", **ABOUT, plan=plan) as writer:
        assert writer.done == 0
        writer.append(MORE[0])
    assert use_all(tmp_path / "b").documents.chunks.tolist() == [6]
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["manifest.json", "segment-00000000"]


def stop_in_the_middle(path):
    with pytest.raises(RuntimeError):
        with BankWriter(path, **ABOUT, plan="these blocks") as writer:
            for b in BLOCKS:
                writer.append(b)
            raise RuntimeError


@pytest.mark.parametrize("damage", ["table.json", "k/zarr.json"])
def test_damaged_progress_is_written_anew(tmp_path, damage):
    stop_in_the_middle(tmp_path / "b")
    file = tmp_path / "b" / "segment-00000001" / damage
    file.write_bytes(file.read_bytes()[:-1])
    build(tmp_path / "b")
    build(tmp_path / "c")
    assert tree(tmp_path / "b") == tree(tmp_path / "c")


def test_without_its_note_a_folder_is_no_bank(tmp_path):
    stop_in_the_middle(tmp_path / "b")
    file = tmp_path / "b" / "unfinished.json"
    file.write_bytes(file.read_bytes()[:-1])
    before = tree(tmp_path / "b")
    with pytest.raises(BankError, match="exists and is no bank; it is not overwritten"):
        build(tmp_path / "b")
    assert tree(tmp_path / "b") == before


@pytest.mark.parametrize("first, name", [(0, "segment-00000000"), (2, "segment-00000000"), (2, "segment-00000003")])
def test_a_note_that_would_remove_the_bank_is_ignored(start, tmp_path, first, name):
    path = shutil.copytree(start, tmp_path / "b")
    manifest = read_manifest(path)
    write_note(path, base_of(manifest), "a plan", first, [{**manifest["segments"][0], "name": name}])
    with Change(path) as change:
        assert change.resume("a plan") == 0
    assert tree(path) == tree(start)


def test_a_deletion_leaves_an_unfinished_append(start, tmp_path, monkeypatch):
    """And both come to be, whichever is finished first."""
    path = shutil.copytree(start, tmp_path / "b")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Deaths(patch, 22)
        resumed_append(path)
    assert [p.name for p in sorted(path.glob("segment-*"))][-1] == "segment-00000003"
    assert delete_documents(path, [0]) == 1
    with Change(path) as change:
        assert change.resume("more blocks") > 0
    resumed_append(path)
    want = shutil.copytree(start, tmp_path / "c")
    delete_documents(want, [0])
    resumed_append(want)
    assert tree(path) == tree(want)


def test_a_segment_never_gets_the_name_of_another(start, tmp_path):
    """So a reader of files that went never reads those of another bank."""
    path, names = shutil.copytree(start, tmp_path / "b"), set()
    opened = open_bank(path)
    for step in (overwrite, compact, overwrite, lambda p: append_documents(p, MORE), compact):
        now = {p.name for p in path.glob("segment-*")}
        step(path)
        new = {p.name for p in path.glob("segment-*")} - now
        assert not new & names
        names |= now | new
    with pytest.raises(BankError, match="missing: lost, or the bank was compacted since it was opened"):
        opened.bank.k[:]


def test_a_bank_of_another_version_is_there_until_it_is_replaced(start, tmp_path):
    path = tmp_path / "b"
    (path / "segment-00112233445566aa").mkdir(parents=True)
    old = b'{"format": "memjax-bank", "version": 1}'
    (path / "manifest.json").write_bytes(old)
    with pytest.raises(BankError, match="exists; overwrite=True replaces a bank"):
        write(path)
    with pytest.raises(RuntimeError), BankWriter(path, **ABOUT, overwrite=True) as writer:
        writer.append(BLOCKS[0])
        raise RuntimeError
    assert manifest(path) == old and [p.name for p in path.glob("seg*")] == ["segment-00112233445566aa"]
    write(path, overwrite=True)
    assert tree(path) == tree(write(tmp_path / "c"))
    assert_same(answers(open_bank(path).bank), answers(use_all(tmp_path / "c").bank))


# ---------------------------------------------------------------------------------------------- the system says no


def run_limited(code):
    program = f"import sys; sys.path.insert(0, '.')\nfrom tests.in_storage.test_bank_change import *\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("limit", [100, 600, 2000])  # too small for the manifest, for an array's metadata, for a shard
def test_a_full_disk(start, tmp_path, limit):
    path = shutil.copytree(start, tmp_path / "b")
    before = tree(path)
    done = run_limited(f"full_disk({str(path)!r}, {limit})")
    assert done.returncode == 0, done.stderr
    assert tree(path) == before and [p.name for p in tmp_path.iterdir()] == ["b"]


def full_disk(path, limit):
    """In a process of its own: no file may grow beyond the limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for change in (
        lambda: append_documents(path, [block([40])]),
        lambda: write(path, [block([40])], overwrite=True),
        lambda: write(f"{path}2", [block([40])]),
    ):
        with pytest.raises(BankError, match="File too large") as error:
            change()
        assert path in str(error.value) and "\n" not in str(error.value)


def test_a_read_only_folder(start, tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is given by hand."""

    def denied(self, *args, **kw):
        raise PermissionError(13, "Permission denied", str(self))

    path = shutil.copytree(start, tmp_path / "b")
    before = tree(path)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.mkdir", denied)
        with pytest.raises(BankError, match="/b/segment-00000002: Permission denied"):
            append_documents(path, MORE)
        with pytest.raises(BankError, match="/c: Permission denied"):
            write(tmp_path / "c")
    assert tree(path) == before


def test_a_bank_that_another_built_before_the_lock_stays(tmp_path, monkeypatch):
    path, lock = tmp_path / "b", bank_disk.lock

    def late(directory):
        monkeypatch.setattr(bank_disk, "lock", lock)
        write(path, BLOCKS)
        return lock(directory)

    monkeypatch.setattr(bank_disk, "lock", late)
    with pytest.raises(BankError, match="b: exists; overwrite=True replaces a bank"):
        write(path, MORE)
    assert len(use_all(path).documents.path) == len(LENGTHS)


@pytest.mark.parametrize("made_by_user", [True, False])
def test_a_first_build_that_fails_leaves_a_folder_that_the_next_takes(tmp_path, made_by_user):
    path = tmp_path / "b"
    if made_by_user:
        path.mkdir()
    with pytest.raises(BankError, match="no space left"), BankWriter(path, **ABOUT, plan="these blocks") as writer:
        writer.append(BLOCKS[0])
        (path / "model").mkdir()  # the copy of the model, before the manifest
        (path / "model" / "config.json").write_text("{}")
        raise BankError("no space left")
    assert not path.exists()
    build(path)
    use_all(path)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    path = write(tmp_path / "b")
    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(BankError, match="b: can't be locked: No locks available"):
        delete_documents(path, [0])


def test_a_compaction_that_is_refused_keeps_what_an_interrupted_change_has_done(tmp_path):
    path = write(tmp_path / "b")
    with pytest.raises(BankError), Change(path) as change:
        change.resume("more blocks")
        for b in MORE:
            change.append(b)
        raise BankError("stopped")
    waiting = unfinished(path)
    delete_documents(path, range(len(open_bank(path).documents.path)))
    with pytest.raises(BankError, match="every document is deleted"):
        compact(path)
    assert unfinished(path) == waiting > 0
