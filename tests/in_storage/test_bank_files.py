"""The bank on disk: what is written is what is read, in all three places, and damage is an error of one line."""

import copy
import hashlib
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from memjax.errors import BankError
from memjax.in_storage import bank as banks
from memjax.in_storage import bank_arrays, bank_disk, bank_manifest
from memjax.in_storage.bank_files import (
    BankWriter,
    Block,
    Change,
    DiskArray,
    append_documents,
    delete_documents,
    open_bank,
)

LAYERS, H, D, VOCAB = 2, 2, 8, 300
ABOUT = {
    "layers": LAYERS,
    "kv_heads": H,
    "head_dim": D,
    "vocab": VOCAB,
    "model_hash": "model a",
    "model_config": {"class": "memjax.x.Y", "widths": (1, 2), 3: None},
    "tokenizer_hash": "tokenizer a",
}


def block(lengths, seed=0, path="notes/a.txt"):
    rng = np.random.default_rng(seed)
    rk, k, v = rng.standard_normal((3, LAYERS, sum(lengths), H, D)).astype(np.float32)
    rk /= np.linalg.norm(rk, axis=-1, keepdims=True)
    ids = [rng.integers(0, VOCAB, 4 * n - 1) for n in lengths]
    lines = np.cumsum(lengths)
    return Block(rk, k, v, lengths, ids, [path] * len(lengths), (lines - lengths + 1).tolist(), lines.tolist())


BLOCKS = [block([3, 1], 0), block([7], 1, "b.txt"), block([2, 5, 4], 2)]
LENGTHS = [3, 1, 7, 2, 5, 4]


def write(path, blocks=BLOCKS, **about):
    with BankWriter(path, **ABOUT, **about) as writer:
        for b in blocks:
            writer.append(b)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bank that no test may change."""
    return write(tmp_path_factory.mktemp("bank") / "corpus.bank")


@pytest.fixture
def bank(made, tmp_path):
    """A copy for a test to damage."""
    return shutil.copytree(made, tmp_path / "corpus.bank")


def in_memory(blocks=BLOCKS):
    bank = banks.empty(LAYERS, H, D)
    for b in blocks:
        bank = banks.append(bank, b.k, b.v, b.rk, np.array(b.doc_len))
    return bank


def answers(bank):
    """What two layers find and read, as float64."""
    rng = np.random.default_rng(5)
    queries, routes = jnp.asarray(rng.standard_normal((3, 4, H, D)), jnp.float32), jnp.ones((3, 4), bool)
    out = []
    for layer in range(LAYERS):
        scores, documents = banks.route(bank, layer, queries, routes, top_k=3)
        out += [scores, documents, *banks.read(bank, layer, documents, 9)]
    return [np.asarray(a, np.float64) for a in out]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600 and "tensorstore_spec" not in text, text
    return text


def segment(bank):
    return next(bank.glob("segment-*"))


def use_all(path, **hashes):
    """Open, and read everything."""
    opened = open_bank(path, location="host", **hashes)
    for n in np.flatnonzero(opened.bank.doc_len):
        opened.token_ids(int(n))
    return opened


# ---------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("location", ["disk", "host", "device"])
def test_round_trip(made, location):
    opened = open_bank(made, location=location, model_hash="model a", tokenizer_hash="tokenizer a")
    assert_same(answers(opened.bank), answers(in_memory()))
    kinds = {"disk": DiskArray, "host": np.ndarray, "device": jax.Array}
    assert all(isinstance(a, kinds[location]) for a in opened.bank[:3])
    assert opened.bank.k.dtype == jnp.bfloat16 and banks.nbytes(opened.bank) == banks.nbytes(in_memory())
    assert opened.manifest["model"]["config"] == {"class": "memjax.x.Y", "widths": [1, 2], "3": None}
    table = opened.documents
    assert table.path == ["notes/a.txt"] * 2 + ["b.txt"] + ["notes/a.txt"] * 3
    assert table.chunks.tolist() == LENGTHS and table.tokens.tolist() == [4 * n - 1 for n in LENGTHS]
    assert table.first_line.tolist() == [1, 4, 1, 1, 3, 8] and table.last_line.tolist() == [3, 4, 7, 2, 7, 11]
    for n, ids in enumerate(i for b in BLOCKS for i in b.ids):
        np.testing.assert_array_equal(opened.token_ids(n), ids)


def test_keys_on_the_device_and_the_rest_on_disk(made):
    bank = open_bank(made).bank
    assert_same(answers(bank._replace(rk=jnp.asarray(bank.rk[:]))), answers(in_memory()))
    with pytest.raises(BankError, match="for files see bank_files"):
        banks.delete(bank, 0)


def test_streams_over_many_shards(tmp_path, monkeypatch):
    """Blocks that end anywhere in a shard: the same bank, and a buffer never holds more than a shard and a block."""
    for sizes, small in (
        (bank_arrays.SHARD, {"rk": 8, "k": 8, "v": 8, "ids": 16}),
        (bank_arrays.INNER, {"rk": 4, "k": 2, "v": 2, "ids": 4}),
    ):
        for name, size in small.items():
            monkeypatch.setitem(sizes, name, size)
    path = write(tmp_path / "b", BLOCKS)
    assert len([p for p in (segment(path) / "k" / "c").rglob("*") if p.is_file()]) == LAYERS * 3
    assert_same(answers(open_bank(path).bank), answers(in_memory()))
    assert_same(answers(use_all(path).bank), answers(in_memory()))


def test_float32_and_large_vocabularies(tmp_path):
    path = write(tmp_path / "b", BLOCKS[:1], dtype="float32")
    np.testing.assert_array_equal(open_bank(path).bank.k[:], BLOCKS[0].k)
    big = BLOCKS[0]._replace(ids=[np.full(11, 99_999), np.full(3, 65_536)])
    with BankWriter(tmp_path / "c", **{**ABOUT, "vocab": 100_000}) as writer:
        writer.append(big)
    assert open_bank(tmp_path / "c").token_ids(1).tolist() == [65_536] * 3


def test_zarr3_metadata_is_what_other_readers_need(made):
    """A reader that knows only the zarr3 files sees the same numbers, all-zero chunks included."""
    store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{segment(made)}/v/"}}
    found = ts.open(store, read=True, open=True).result()
    assert found.codec.to_json()["codecs"][0]["configuration"]["codecs"][-1]["name"] == "crc32c"
    np.testing.assert_array_equal(np.asarray(found.read().result()), in_memory().v)


def test_zeros_are_data(tmp_path):
    """By default zarr3 leaves out chunks that are all zero, and such a gap would now be an error."""
    zeros = BLOCKS[0]._replace(**{name: np.zeros_like(BLOCKS[0].k) for name in ("rk", "k", "v")})
    opened = use_all(write(tmp_path / "b", [zeros]))
    assert not opened.bank.k.astype(np.float32).any()


# ---------------------------------------------------------------------------------------------- damage


def shard(bank, name="k"):
    return max((segment(bank) / name / "c").rglob("*"), key=lambda p: p.is_file() and len(p.parts))


@pytest.mark.parametrize("name", ["rk", "k", "v", "ids"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "metadata deleted"])
def test_a_missing_or_short_file_is_seen_at_opening(bank, name, damage):
    file = segment(bank) / name / "zarr.json" if "metadata" in damage else shard(bank, name)
    if "deleted" in damage:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if damage == "emptied" else -5])
    with pytest.raises(BankError) as error:
        open_bank(bank)
    assert str(file) in one_line(error)


@pytest.mark.parametrize("name", ["rk", "k", "v", "ids"])
@pytest.mark.parametrize("at", [3, -3])  # in a chunk, in the index of the shard
def test_a_flipped_bit_is_seen_at_reading(bank, name, at):
    file = shard(bank, name)
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)
    opened = open_bank(bank)  # opening reads no chunks
    with pytest.raises(BankError, match="checksum mismatch") as error:
        getattr(opened.bank, name)[:] if name != "ids" else opened.token_ids(0)
    assert str(file) in one_line(error)
    if name == "rk":
        with pytest.raises(BankError, match="checksum mismatch"):
            answers(opened.bank)
    with pytest.raises(BankError, match="checksum mismatch"):
        use_all(bank)


def test_damage_stays_in_its_chunk(tmp_path):
    path = write(tmp_path / "b", [block([40, 40])])
    file = shard(path)
    data = bytearray(file.read_bytes())
    data[3] ^= 4
    file.write_bytes(data)
    bank = open_bank(path).bank
    layer = int(file.relative_to(segment(path)).parts[2])
    assert np.isfinite(bank.k[layer, 32:].astype(np.float32)).all()
    with pytest.raises(BankError, match="checksum mismatch"):
        bank.k[layer, :32]


def test_a_file_lost_while_open_is_no_zero(bank):
    opened = open_bank(bank)
    file = shard(bank)
    file.unlink()
    with pytest.raises(BankError, match="missing") as error:
        opened.bank.k[:]
    assert str(file) in one_line(error)


def test_bank_of_another_model_tokenizer_or_version(bank):
    with pytest.raises(BankError, match="field 'model.hash' is 'model a', needs 'model b'") as error:
        open_bank(bank, model_hash="model b")
    assert "manifest.json" in one_line(error)
    with pytest.raises(BankError, match="field 'tokenizer.hash' is 'tokenizer a', needs 'b'"):
        open_bank(bank, tokenizer_hash="b")
    rewrite(bank, lambda m: m.update(version=1))
    with pytest.raises(BankError, match="field 'version' is 1, needs 2"):
        open_bank(bank)


def test_no_bank_at_all(tmp_path, bank):
    for path in (tmp_path / "nothing", tmp_path, segment(bank)):
        with pytest.raises(BankError, match="manifest.json") as error:
            open_bank(path)
        one_line(error)


def test_unknown_location(made, as_user):
    with pytest.raises(ValueError, match="location is 'moon'"):
        open_bank(made, location="moon")


def rewrite(bank, change, seal=True):
    """Edit the manifest, with a right checksum: what an editor who knows the format could do."""
    file = bank / "manifest.json"
    manifest = json.loads(file.read_bytes())
    change(manifest)
    file.write_text(json.dumps(bank_manifest.seal(manifest) if seal else manifest))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("segments[0].name", lambda m: m["segments"][0].update(name="/etc")),
        ("segments[0].name", lambda m: m["segments"][0].update(name="../corpus.bank/" + m["segments"][0]["name"])),
        ("segments", lambda m: m["segments"].append(m["segments"][0])),
        ("segments", lambda m: m.update(segments=[])),
        ("chunks", lambda m: m["segments"][0].update(chunks=10**6)),
        ("segments[0].chunks", lambda m: m["segments"][0].update(chunks=-1)),
        ("chunks", lambda m: m["segments"][0].update(chunks=21)),
        ("tokens", lambda m: m["segments"][0].update(tokens=81)),
        ("file", lambda m: m["segments"][0].update(documents=5)),
        ("deleted[0]", lambda m: m.update(deleted=[6])),
        ("deleted", lambda m: m.update(deleted=[1, 1])),
        ("layers", lambda m: m.update(layers=True)),
        ("sizes", lambda m: m.update(layers=3)),
        ("sizes", lambda m: m.update(head_dim=65535, kv_heads=65535)),  # 400 GB, if somebody believed it
        ("sizes", lambda m: m.update(dtype="float32")),
        ("dtype", lambda m: m.update(dtype="float64")),
        ("table_sha256", lambda m: m["segments"][0].update(table_sha256="0" * 64)),
        ("", lambda m: m.update(extra=1)),
        ("model", lambda m: m.update(model="a")),
        ("vocab", lambda m: m.update(vocab=None)),
        ("document_tokens", lambda m: m.update(document_tokens=-1)),
    ],
)
def test_edited_manifests_are_refused_by_field(bank, field, change):
    rewrite(bank, change)
    with pytest.raises(BankError) as error:
        open_bank(bank)
    assert f"'{field}'" in one_line(error)


def test_an_unsealed_edit_is_refused(bank):
    rewrite(bank, lambda m: m["model"].update(hash="model b"), seal=False)
    with pytest.raises(BankError, match="'checksum'"):
        open_bank(bank, model_hash="model b")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("files", lambda t: t.update(files=["/etc/passwd", "b.txt"])),
        ("files", lambda t: t.update(files=["notes/../../a.txt", "b.txt"])),
        ("files", lambda t: t.update(files=["C:\\a.txt", "b.txt"])),
        ("files", lambda t: t.update(files=["a.txt"])),
        ("file_sha256", lambda t: t.update(file_sha256=[""])),
        ("file_sha256", lambda t: t.update(file_sha256=[None, None])),
        ("appended", lambda t: t.update(appended=[0, 2])),
        ("chunks", lambda t: t.update(chunks=[1, 3, 7, 2, 5, 5])),
        ("chunks", lambda t: t.update(chunks=[4, 0, 7, 2, 5, 4])),
        ("tokens", lambda t: t.update(tokens=[10**30] * 6)),
        ("first_line", lambda t: t.update(first_line=[[1]] * 6)),
        ("last_line", lambda t: t.update(last_line=[1.5] * 6)),
        ("sha256", lambda t: t.update(sha256=[None] * 6)),
        ("last_line", lambda t: t.update(last_line=["1" * 10**6] + [1] * 5)),
        ("first_line", lambda t: t.update(first_line=[True] * 6)),
        ("files", lambda t: t.update(files=["\ud800", "b.txt"])),
        ("sizes", lambda t: t["sizes"].update({"k/c/0/0/0/0": 5})),
        ("sizes", lambda t: t.update(sizes={})),
        ("sizes", lambda t: t["sizes"].update({"../x": t["sizes"].pop("k/zarr.json")})),
        ("tokens", lambda t: t.pop("tokens")),
    ],
)
def test_edited_tables_are_refused_by_field(bank, field, change):
    file = segment(bank) / "table.json"
    table = json.loads(file.read_bytes())
    change(table)
    data = json.dumps(table).encode()
    file.write_bytes(data)
    with pytest.raises(BankError, match="table_sha256"):
        open_bank(bank)
    rewrite(bank, lambda m: m["segments"][0].update(table_sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(BankError) as error:
        open_bank(bank)
    assert f"'{field}'" in one_line(error) and "table.json" in str(error.value)


def test_text_that_was_swapped_is_refused(bank):
    """Two documents of one length with each other's number of tokens would still sum up; their text would not match."""
    file = segment(bank) / "table.json"
    table = json.loads(file.read_bytes())
    table["tokens"][0], table["tokens"][1] = table["tokens"][1], table["tokens"][0]
    data = json.dumps(table).encode()
    file.write_bytes(data)
    rewrite(bank, lambda m: m["segments"][0].update(table_sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(BankError, match="'sha256' of document 0"):
        open_bank(bank).token_ids(0)


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("../x") | st.just(10**25),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(data=st.data(), seal=st.booleans(), drop=st.booleans())
def test_mutated_manifests_never_raise_anything_else(made, tmp_path_factory, data, seal, drop):
    manifest = json.loads((made / "manifest.json").read_bytes())
    mutant = copy.deepcopy(manifest)
    *path, last = data.draw(st.sampled_from([p for p in places(manifest) if p]))
    inner = mutant
    for key in path:
        inner = inner[key]
    if drop:
        del inner[last]
    else:
        inner[last] = data.draw(JSON)
    text = json.dumps(bank_manifest.seal(mutant) if seal else mutant)
    attempt(made, tmp_path_factory.mktemp("mutant"), text.encode(), harmless=seal)


@settings(max_examples=100)
@given(at=st.integers(0, 10_000), new=st.binary(max_size=3), cut=st.booleans())
def test_mangled_manifests_never_raise_anything_else(made, tmp_path_factory, at, new, cut):
    text = (made / "manifest.json").read_bytes()
    at %= len(text)
    text = text[:at] + new + (b"" if cut else text[at + len(new) :])
    attempt(made, tmp_path_factory.mktemp("mutant"), text, harmless=text == (made / "manifest.json").read_bytes())


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"{}", b"[]", b"\xff", b"1" * 5000, b'{"format": NaN}'])
def test_odd_manifests_never_raise_anything_else(made, tmp_path, text):
    attempt(made, tmp_path, text, harmless=False)


def attempt(made, mutant, text, harmless):
    """Open the bank with another manifest; what is no error must still be a bank of the same numbers."""
    (mutant / "manifest.json").write_bytes(text)
    (mutant / segment(made).name).symlink_to(segment(made))
    try:
        opened = open_bank(mutant)
    except BankError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        same = json.loads(text) == json.loads((made / "manifest.json").read_bytes())
        assert harmless or same
        if (
            opened.manifest["dtype"] == "bfloat16"
            and opened.manifest["kv_heads"] * opened.manifest["head_dim"] == H * D
        ):
            assert opened.documents.chunks.tolist() == LENGTHS


# ---------------------------------------------------------------------------------------------- writers


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    for kind in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(kind):
            with BankWriter(tmp_path / "b", **ABOUT) as writer:
                writer.append(BLOCKS[0])
                raise kind
        assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_bank_and_the_next_one_works(tmp_path):
    program = (
        "import os, sys; sys.path.insert(0, '.')\n"
        "from tests.in_storage.test_bank_files import *\n"
        f"writer = BankWriter({str(tmp_path / 'b')!r}, **ABOUT).__enter__()\n"
        "writer.append(BLOCKS[0])\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    with pytest.raises(BankError, match="b: unfinished; the command that began it") as error:
        open_bank(tmp_path / "b")
    one_line(error)
    with pytest.raises(BankError, match="unfinished"):
        delete_documents(tmp_path / "b", [0])
    assert_same(answers(open_bank(write(tmp_path / "b")).bank), answers(in_memory()))
    assert tree(tmp_path / "b") == tree(write(tmp_path / "c"))


@pytest.mark.parametrize("step", ["replace_file", "sync_directory", "make_directory"])
def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, step):
    def fail(*_):
        raise BankError("disk full")

    monkeypatch.setattr(bank_disk, step, fail)
    with pytest.raises(BankError, match="disk full"):
        write(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_depend_on_nothing_but_the_documents(made, tmp_path):
    assert tree(write(tmp_path / "again")) == tree(made)
    assert tree(write(tmp_path / "other", BLOCKS[:2])) != tree(made)


def tree(path):
    """Every file below a folder with its bytes."""
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_target_exists(bank):
    with pytest.raises(BankError, match="exists; overwrite=True"):
        write(bank)
    write(bank, BLOCKS[:1], overwrite=True)
    assert open_bank(bank).documents.chunks.tolist() == [3, 1]
    assert [p.name for p in bank.parent.iterdir()] == ["corpus.bank"]
    with pytest.raises(RuntimeError):
        with BankWriter(bank, **ABOUT, overwrite=True):
            raise RuntimeError
    assert open_bank(bank).documents.chunks.tolist() == [3, 1]


def test_a_folder_that_is_no_bank_is_never_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(BankError, match="is no bank"):
        write(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_bad_blocks(tmp_path, as_user):
    good = BLOCKS[0]
    bad = {
        "k is": good._replace(k=good.k[:, 1:]),
        "path has 1 entries": good._replace(path=["a"]),
        "has ids 0..300, needs 0..299": good._replace(ids=[np.array([0, 300, 1]), good.ids[1]]),
        "1 <= chunks <= ids": good._replace(ids=[good.ids[0], np.zeros(0, int)]),
        "needs a path below": good._replace(path=["/a.txt", "b"]),
        "NaN": good._replace(v=np.full_like(good.v, np.nan)),
    }
    for message, broken in bad.items():
        with pytest.raises(BankError, match=message):
            write(tmp_path / "b", [broken])
    with pytest.raises(BankError, match="no document was written"):
        write(tmp_path / "b", [])
    with pytest.raises(BankError, match="'layers' is 0"):
        BankWriter(tmp_path / "b", **{**ABOUT, "layers": 0})
    with pytest.raises(BankError, match="plain JSON"):
        BankWriter(tmp_path / "b", **{**ABOUT, "model_config": {"x": float("nan")}})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- append and delete


@pytest.mark.parametrize("location", ["disk", "host", "device"])
def test_append_and_delete(tmp_path, location):
    path = write(tmp_path / "b", BLOCKS[:1])
    append_documents(path, BLOCKS[1:], model_hash="model a", tokenizer_hash="tokenizer a")
    assert_same(answers(open_bank(path, location=location).bank), answers(in_memory()))
    assert delete_documents(path, [2]) == 1
    opened = open_bank(path, location=location)
    assert_same(answers(opened.bank), answers(banks.delete(in_memory(), 2)))
    assert opened.bank.chunk_doc.tolist() == banks.delete(in_memory(), 2).chunk_doc.tolist()
    with pytest.raises(BankError, match="document 2 is deleted"):
        opened.token_ids(2)
    np.testing.assert_array_equal(opened.token_ids(4), BLOCKS[2].ids[1])
    assert delete_documents(path, [2]) == 0
    for document in (6, -1):
        with pytest.raises(BankError, match=f"no document {document}; the bank has 6"):
            delete_documents(path, [document])


def test_an_open_bank_stays_as_it_was(bank):
    opened, want = open_bank(bank), answers(in_memory())
    append_documents(bank, [block([3, 3], 7)])
    delete_documents(bank, [0])
    assert_same(answers(opened.bank), want)


def test_a_failed_append_leaves_the_bank(bank):
    before = (bank / "manifest.json").read_bytes(), sorted(p.name for p in bank.iterdir())

    def blocks():
        yield block([3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        append_documents(bank, blocks())
    with pytest.raises(BankError, match="model.hash"):
        append_documents(bank, [block([3])], model_hash="model b")
    with pytest.raises(BankError, match="no document was written"):
        append_documents(bank, [])
    assert before == ((bank / "manifest.json").read_bytes(), sorted(p.name for p in bank.iterdir()))


def test_two_writers_at_once(bank):
    with Change(bank):
        with pytest.raises(BankError, match="another process is changing this bank"):
            delete_documents(bank, [0])
        with pytest.raises(BankError, match="another process is changing this bank"):
            write(bank, overwrite=True)
        assert use_all(bank).bank.doc_len.all()  # readers take no lock
    delete_documents(bank, [0])
    with pytest.raises(BankError, match="No such file"):
        delete_documents(bank / "nothing", [0])
