import json
import os
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.data import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, DecodeStream, Tokenizer, load_tokenizer, train_bpe
from memjax.errors import TokenizerError

TEXTS = ["def f(x):\n    return x + 2024  # naïve 😀\n", "The quick brown fox, 31415 times.\r\n\tOver the dog.\n"] * 3
BYTES = ByteTokenizer()
BPE = train_bpe(TEXTS, vocab_size=300)


def metaspace_tokenizer():
    """A tokenizer in the manner of Llama 2: a leading space that only the whole text loses, and bytes as a fallback."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "▁": 257, "a": 258, "▁a": 259}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return BPETokenizer(tokenizer)


METASPACE = metaspace_tokenizer()
both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
every = pytest.mark.parametrize("tokenizer", [BYTES, BPE, METASPACE], ids=["bytes", "bpe", "metaspace"])


@both
@given(text=st.text())
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text


@both
@pytest.mark.parametrize(
    "text", ["", "\0\x01\x7f\x85", "👩‍👩‍👧‍👦 naïve\ufffd", "a\r\nb\u2028c\n\n", " ".join(SPECIAL_TOKENS)]
)
def test_round_trip_of_odd_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(tokenizer.encode(text).tolist()) & set(tokenizer.special.values())


@both
def test_protocol_and_special_tokens(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert list(tokenizer.special.items()) == [(name, i) for i, name in enumerate(SPECIAL_TOKENS)]
    assert tokenizer.special["<pad>"] == 0
    a = tokenizer.encode("a").tolist()
    assert tokenizer.decode([tokenizer.special["<bos>"], *a, 0, 0]) == "a"
    assert max(max(ids) for ids in tokenizer.encode_batch(TEXTS)) < tokenizer.vocab_size


@both
def test_batch_equals_one_by_one(tokenizer):
    texts = ["", *TEXTS, "x"]
    batch = tokenizer.encode_batch(texts)
    assert len(batch) == len(texts)
    for ids, text in zip(batch, texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_batches_larger_than_one_part():
    from memjax.data.tokenizer import _parts

    texts = ["abc", "", "defgh", "i", "jklmnopqrstu", "v"]
    parts = list(_parts(texts, characters=6))
    assert sum(parts, []) == texts and len(parts) == 3


@both
def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        assert loaded.hash == tokenizer.hash and loaded.vocab_size == tokenizer.vocab_size
        assert loaded.encode("<pad> é 12").tolist() == tokenizer.encode("<pad> é 12").tolist()
    assert os.listdir(tmp_path) == ["tokenizer.json"]


@every
def test_pickled(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash
    assert copy.encode("a <pad>").tolist() == tokenizer.encode("a <pad>").tolist()


def test_hash_tells_tokenizers_apart():
    assert len({BYTES.hash, BPE.hash, METASPACE.hash, ByteTokenizer(SPECIAL_TOKENS[:3]).hash}) == 4
    assert train_bpe(iter(TEXTS), vocab_size=300).hash == BPE.hash
    reordered = json.dumps(dict(reversed(json.loads(BPE.to_json()).items())), indent=1)
    assert BPETokenizer.from_json(reordered).hash == BPE.hash


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    BYTES.save(path)
    before = path.read_bytes()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*No space left"):
        BPE.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["tokenizer.json"]


@both
def test_truncated_file_is_named_with_the_reason(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    whole = tokenizer.to_json().encode()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*truncated"):
            load_tokenizer(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe{}", "decode byte 0xff"),
        (b"[]", "JSON object, got list"),
        (b'{"model": 3}', "not a tokenizer.json"),
        (b"[" * 100_000, "not JSON"),
        (b'{"class": "ByteTokenizer", "version": 2}', "version"),
        (b'{"class": "ByteTokenizer", "version": 1, "special_tokens": "<pad>"}', "special_tokens"),
        (b'{"class": "ByteTokenizer", "version": 1, "special_tokens": ["a", "a"]}', "distinct"),
    ],
)
def test_undecodable_file_is_named_with_the_reason(content, reason, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"some\.json: .*{reason}"):
        load_tokenizer(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere\.json.*No such file"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*No such file"):
        load_tokenizer(tmp_path)


def test_loaded_padding_and_truncation_are_off(tmp_path):
    from tokenizers import Tokenizer as Library

    foreign = Library.from_str(BPE.to_json())
    foreign.enable_padding(length=50)
    foreign.enable_truncation(max_length=4)
    foreign.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    np.testing.assert_array_equal(loaded.encode_batch([TEXTS[0], "a"])[0], BPE.encode(TEXTS[0]))
    assert len(loaded.encode("a")) == 1


def test_digits_stand_alone():
    numbers = ["1234567"] * 50
    split, joined = train_bpe(numbers, 300), train_bpe(numbers, 300, split_digits=False)
    assert len(split.encode("1234567")) == 7 and len(joined.encode("1234567")) < 7


@pytest.mark.parametrize("ids", [[-1], [10_000], [5, 10_000, 6]])
@every
def test_ids_outside_the_vocabulary_are_refused(tokenizer, ids):
    with pytest.raises(TokenizerError, match=rf"\[0, {tokenizer.vocab_size}\).*got (-1|10000)"):
        tokenizer.decode(ids)


@both
def test_ids_of_another_form_are_refused(tokenizer):
    assert tokenizer.decode([]) == tokenizer.decode(np.zeros(0)) == ""
    for ids in ([[1, 2]], [1.5], 3):
        with pytest.raises(ValueError, match="1-D sequence of integers"):
            tokenizer.decode(ids)


@both
def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_bad_training_arguments():
    with pytest.raises(ValueError, match="vocab_size must be at least 256 bytes"):
        train_bpe(TEXTS, vocab_size=262)
    with pytest.raises(ValueError, match="special_tokens must be distinct"):
        train_bpe(TEXTS, special_tokens=("<pad>", "<pad>"))
    with pytest.raises(TypeError, match="got one string"):
        train_bpe("one text")
    assert train_bpe(TEXTS, vocab_size=263).vocab_size == 263


@both
@given(data=st.data())
def test_streamed_ids_equal_whole_decoding(tokenizer, data):
    """Any ids, as an untrained model gives them: broken characters, special tokens, and all."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream = DecodeStream(tokenizer)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert stream.finish() == ""


@every
@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_streamed_text_shows_no_broken_character(tokenizer, text):
    stream = DecodeStream(tokenizer)
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))


def test_stream_holds_back_until_a_character_is_whole():
    stream = DecodeStream(BYTES)
    assert [stream.push(i) for i in BYTES.encode("a😀b")] == ["a", "", "", "", "😀", "b"]
    stream.push(int(BYTES.encode("😀")[0]))
    assert stream.finish() == "\ufffd"
    assert [stream.push(i) for i in BYTES.encode("c")] == ["c"]


def test_nothing_touches_the_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    train_bpe(TEXTS, 300).save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("a")) == "a"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_training_is_quiet_and_works(tmp_path):
    script = tmp_path / "fork.py"
    script.write_text(
        "import os\n"
        "from memjax.data import train_bpe\n"
        "tokenizer = train_bpe(['some text'] * 100, 300)\n"
        "tokenizer.encode_batch(['some text'] * 100)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(len(tokenizer.encode_batch(['a'] * 7)))\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tokenizers" not in done.stderr.lower()
