"""The commands as a user types them, in this process: what they print, and what they return."""

import io
import json
import re
import sys
from dataclasses import dataclass, replace

import jax
import jax.export
import pytest
from rich.text import Text
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from memjax.catalog import CATALOG, Part
from memjax.cli import listing, main
from memjax.cli.bank import marked_excerpt, without_blank_lines
from memjax.cli.console import console, printable, report_skipped, size
from memjax.cli.listing import at_dim, reflowed
from memjax.combinators import Residual
from memjax.data import Skipped
from memjax.in_state.gated_delta_net import GatedDeltaNet
from memjax.in_storage.bank_files import open_bank
from memjax.laws import NAMES
from memjax.lm.files import save_model
from memjax.lm.model import LanguageModel
from memjax.memory import How, Memory
from tests.lm import tiny
from tests.lm.published import write_folder

SMALL = ["--steps", "3", "--dim", "16", "--layers", "1", "--context", "16", "--batch", "2", "--tokenizer", "bytes"]
QUESTION = "Which number belongs to the red house?"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """memjax ARGUMENTS in an empty folder: code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")  # without a terminal some runners say 80, where the tables are cut

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two untrained models with one configuration."""
    folder, model = tmp_path_factory.mktemp("models"), tiny.model()
    for seed in (0, 1):
        save_model(folder / f"m{seed}", model, tiny.params(model, seed), tiny.TOKENIZER, reading=tiny.READING)
    return folder


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("The red house has number 1234567.\nIt stands alone.\n")
    (folder / "b.md").write_text("Nothing to see.\nWalk on.\n")
    (folder / "sub" / "c.txt").write_text("A third text,\nin a folder of its own.\n")
    return folder


def assert_refused(result, *parts):
    """Exit code 2 and one line on standard error, without a traceback."""
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


# ---------------------------------------------------------------------------------------------- list


def test_help_names_the_commands(run):
    for arguments in ((), ("--help",)):
        code, out, _ = run(*arguments)
        assert code == 0
        assert all(f"• {command}" in out for command in ("list", "train", "generate", "export", "bank"))


def test_wrong_arguments(run):
    assert run("bank", "ask")[0] == 2
    assert run("lists")[0] == 2


@pytest.fixture
def verdicts(monkeypatch):
    """What the laws said of two memories."""
    off = ["split", "step"]
    held = [law for law in NAMES if law not in off]
    table = {
        "gla": {"held": list(NAMES), "declared off": [], "not applicable": []},
        "msa": {"held": held[:-1], "declared off": off, "not applicable": held[-1:]},
    }
    monkeypatch.setattr(listing, "laws", lambda: table)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_list(run, verdicts, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert out.startswith("cpu x 8, jax ")
    assert "kernels: xla" in out.splitlines()[0]
    assert max(map(len, out.splitlines())) <= width and "…" not in out
    text = " ".join(out.split())
    for name, entry in CATALOG.items():
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [name])
        year, state, *_, goldens = line.split()[1:]
        assert (year, goldens) == (str(entry.year), str(len(entry.goldens) or "–"))
        assert state[0].isdigit()
        assert entry.summary in text and entry.paper in text
    assert out.index("in_state") < out.index("in_context") < out.index("in_storage") < out.index("in_weights")
    row = next(line for line in out.splitlines() if line.strip().startswith("gla "))
    assert row.split() == ["gla", "2023", "131", "KB", "14/14", "2"]
    assert "11/13" in next(line for line in out.splitlines() if line.strip().startswith("msa "))


def test_list_one(run, verdicts, monkeypatch):
    for name, entry in CATALOG.items():
        monkeypatch.setenv("COLUMNS", "80")
        code, out, _ = run("list", name)
        assert code == 0
        assert max(map(len, out.splitlines())) <= 80 and "…" not in out, name
        text = " ".join(out.split())
        about = sys.modules[entry.cls.__module__].__doc__.split("\n\n")
        for part in (
            entry.when,
            "state at dim 512",
            "parameters at dim 512",
            "laws",
            "in all",
            " ".join(about[0].split()),
        ):
            assert part in text, (name, part)
    out = run("list", "gla")[1]
    assert "S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T;  o_t = k**-0.5 S_t^T q_t" in out
    assert "14/14 hold" in out and "not applicable" not in out
    out = " ".join(run("list", "msa")[1].split())
    assert "laws 11/13 hold declared off split, step not applicable golden" in out


def test_the_laws_are_in_the_package():
    table = listing.laws()
    assert set(table) <= set(CATALOG)
    for row in table.values():
        assert sorted(law for names in row.values() for law in names) == sorted(NAMES)


def test_a_memory_of_memories_is_listed_at_the_width():
    outer = replace(CATALOG["gla"], path=f"{__name__}.Pair", small={"dim": 16, "pair": (Part("gla"), Part("canon"))})
    memory = at_dim(outer, 512)
    assert isinstance(memory, Pair)
    assert [type(m).__name__ for m in memory.pair] == ["GatedLinearAttention", "Canon"]
    assert {m.dim for m in memory.pair} == {512} and memory.dim == 512
    assert at_dim(replace(outer, small={"dim": 16}), 512) is None


@dataclass(frozen=True)
class Pair(Memory):
    """Two memories that are never used."""

    dim: int
    pair: tuple[Memory, ...]

    def apply(self, params, state, x, *, ids=None, valid=None, start=None, how: How = How()):
        return x, state


def test_reflowed(monkeypatch):
    monkeypatch.setattr(listing, "SOURCE", 36)  # where the lines of this source were broken
    text = "One sentence that\nis cut. Another.\n\nState:  S [b h k v] float32; conv,\n        the rows before.\n"
    text += "        ring   k\nUpdate: S = S + 1\n        y = S + S_{t-1} * S_{t-2} * S_{t-3}"
    assert reflowed(text, 40).splitlines() == [
        "One sentence that is cut. Another.",
        "",
        "State:  S [b h k v] float32; conv, the",
        "        rows before.",
        "        ring   k",
        "Update: S = S + 1",
        "        y = S + S_{t-1} * S_{t-2} *",
        "          S_{t-3}",
    ]


def test_list_of_an_unknown_name(run):
    assert_refused(run("list", "gated_delta"), "'gated_delta'", "did you mean gated_delta_net or ")
    assert_refused(run("list", "zzz"), "there are gated_delta_net")


def test_a_device_that_is_not_there(run):
    assert_refused(run("list", "--device", "tpu"), "--device tpu: jax already runs on cpu")
    assert run("list", "--device", "cpu")[0] == 0


# ---------------------------------------------------------------------------------------------- train, generate


@pytest.mark.slow
def test_train_interrupted_resumed_and_generate(run, corpus, tmp_path, monkeypatch):
    import memjax.train

    fit = memjax.train.fit

    def interrupted(*args, steps, **kw):
        fit(*args, steps=2, **kw)
        raise KeyboardInterrupt

    (corpus / "a.txt").write_text("round and round it goes. " * 20)
    command = ["train", "--data", corpus, "--directory", "run", *SMALL]
    generate = ["generate", "run", "round", "--tokens", 8, "--temperature", 0]

    monkeypatch.setattr(memjax.train, "fit", interrupted)
    code, out, err = run(*command)
    assert (code, err) == (130, "interrupted; step 2 is saved, the same command goes on from there\n")
    assert "3 files, " in out and "gla x 1, dim 16" in out
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(*generate)  # the newest checkpoint will do
    assert code == 0 and out.splitlines()[1].startswith("round")

    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert "resumed at step 2" in out and "train 3/3" in out and "sample" in out
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"loss.png", "metrics.jsonl", "model", "step_00000003", "tokenizer.json"} <= files
    assert run(*generate)[0] == 0
    assert_refused(run(*generate, "--top-p", 2), "top_p")
    assert_refused(run("generate", corpus, "x"), "neither a model (config.json) nor a run's checkpoints")

    (corpus / "b.md").write_text("another text")
    assert_refused(run(*command, "--steps", 7), "config.corpus")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A language model that has not learned anything."""
    folder = tmp_path_factory.mktemp("generate") / "model"
    memory = LanguageModel(Residual(GatedDeltaNet(8, 2, head_dim=4)), tiny.TOKENIZER.vocab_size, embed_std=1.0)
    save_model(folder, memory, tiny.params(memory), tiny.TOKENIZER)
    return folder


def test_generate_continues_many_prompts(run, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("red house\n\na longer prompt than the others\n")
    greedy = ("--tokens", 6, "--temperature", 0)
    code, out, err = run("generate", model, "--prompts", "prompts.txt", *greedy)
    assert (code, err) == (0, "")
    assert [f"[{i}/3]" in out for i in (1, 2, 3)] == [True] * 3
    rows = out.split("/3]\n")[1:]
    for prompt, row in zip(("red house", "", "a longer prompt than the others"), rows, strict=True):
        alone = run("generate", model, prompt, *greedy)[1].split("\n", 1)[1]
        assert row.startswith(alone.rsplit("\n", 2)[0] + "\n")


@pytest.mark.slow
def test_generate_goes_on_from_a_saved_state(run, model, tmp_path):
    greedy = ("--temperature", 0)
    written = lambda out: out.splitlines()[1]  # noqa: E731
    whole = written(run("generate", model, "red", "--tokens", 8, *greedy)[1])
    code, out, err = run("generate", model, "red", "--tokens", 3, "--save-state", "s", *greedy)
    assert (code, err) == (0, "") and "saved s, state 1 x " in out
    first, then = written(out), written(run("generate", model, "--state", "s", "--tokens", 5, *greedy)[1])
    assert first + then == whole

    code, out, _ = run("generate", model, "red", "--tokens", 0, "--save-state", "read")  # the prompt as a prefix
    assert code == 0 and written(out) == "red"
    (tmp_path / "prompts.txt").write_text(" a\n b\n")
    many = ("generate", model, "--prompts", "prompts.txt", "--tokens", 4, *greedy)
    code, out, _ = run(*many, "--state", "read", "--save-state", "both")
    assert code == 0 and "state 2 x " in out
    alone = written(run("generate", model, "red b", "--tokens", 4, *greedy)[1])
    assert "red" + out.split("[2/2]\n")[1].splitlines()[0] == alone
    assert run("generate", model, "--state", "both", "--tokens", 2, *greedy)[0] == 0  # its two rows go on

    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    assert_refused(run(*many, "--state", "both"), "--state both: has 2 rows, there are 3 prompts")
    assert_refused(run("generate", model, "--state", "nowhere"), "nowhere: ")
    (tmp_path / "notes").write_text("mine")
    assert_refused(run("generate", model, "a", "--tokens", 1, "--save-state", "notes"), "notes: exists and is no saved")


def test_generate_refuses(run, model, tmp_path):
    assert_refused(run("generate", model, "a", "--tokens", 0), "--tokens is 0, needs at least 1")
    assert_refused(run("generate", model, "--prompts", "nowhere"), "--prompts nowhere: No such file")
    (tmp_path / "empty").write_text("")
    assert_refused(run("generate", model, "--prompts", "empty"), "--prompts empty: is empty")
    assert_refused(run("generate", model, "a", "--prompts", "empty"), "there is a prompt on the command line too")


def test_generate_with_published_weights(run, tmp_path):
    folder = write_folder(tmp_path / "published", "gla", eos_token_id=2, bos_token_id=1)
    assert_refused(run("generate", folder, "a"), "published/tokenizer.json: the tokenizer can't be read")
    words = {word: i for i, word in enumerate("<unk> <s> </s> a b c d e f g h".split())}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    code, out, err = run("generate", folder, "a b", "--tokens", 5)
    assert (code, err) == (0, "") and out.splitlines()[1].startswith("a b")


def test_export(run, model, tmp_path):
    code, out, err = run("export", model, "--out", "m.export", "--batch", 2, "--platforms", "cpu", "tpu")
    assert (code, err) == (0, "")
    assert "wrote m.export, " in out and "for cpu, tpu" in out and "2 rows, state " in out
    file = load_file(tmp_path / "m.export")
    params = load_file(model / "params.safetensors")
    assert file.keys() == params.keys() | {"program.init_state", "program.step"}
    assert jax.export.deserialize(bytearray(file["program.step"])).platforms == ("cpu", "tpu")
    assert_refused(run("export", model, "--out", "m.export", "--batch", 0), "--batch is 0, needs at least 1")
    assert_refused(run("export", "nowhere", "--out", "m.export"), "nowhere: ")
    (tmp_path / "notes").write_text("mine")
    assert_refused(run("export", model, "--out", "notes"), "notes: exists and is no export")


def test_train_refuses(run, corpus):
    command = ["train", "--data", corpus, *SMALL]
    assert_refused(run(*command, "--mixer", "glaa"), "did you mean gla?")
    assert_refused(run(*command, "--config", '{"heads": 3}'), "GatedLinearAttention cannot be built", "heads = 3")
    assert_refused(run(*command, "--config", "{heads"), "--config: not JSON")
    assert_refused(run(*command, "--config", "nowhere.json"), "--config nowhere.json: No such file")
    assert_refused(run(*command, "--steps", 0), "--steps is 0")
    assert_refused(run(*command, "--context", 10_000), "needs more than --context 10000")
    assert_refused(run("train", "--data", "nowhere"), "nowhere: there is no such file or folder")


# ---------------------------------------------------------------------------------------------- bank


def test_build_ask_info(run, models, corpus, tmp_path):
    (corpus / "picture.bin").write_bytes(b"\x89\0\1")
    code, out, err = run("bank", "build", corpus, "--model", models / "m0")
    assert (code, err) == (0, "")
    assert "skipped 1 file:" in out and "picture.bin: binary: a NUL byte" in out
    assert "3 files, " in out and "texts.bank: 3 documents, " in out and "bank ask texts.bank" in out

    code, out, err = run("bank", "ask", "texts.bank", QUESTION, "--passages", 3)
    assert (code, err) == (0, "")
    assert re.search(r"\n(no word|first word after \d+\.\d\d s), \d+\.\d\d s in all, compilation included\n", out)
    answer, passages = out.split("read from\n")
    assert answer.splitlines()[2] == "answer"
    assert sorted(line.split()[1] for line in passages.splitlines() if "score" in line) == [
        "a.txt:1-2", "b.md:1-2", "sub/c.txt:1-2",
    ]  # fmt: skip
    assert "The red house has number 1234567. It stands alone." in passages
    scores = [float(line.split()[-1]) for line in passages.splitlines() if "score" in line]
    assert scores == sorted(scores, reverse=True)

    code, out, err = run("bank", "ask", "texts.bank", "stands alone", "--passages", 3, "--words")
    assert (code, err) == (0, "")
    best = {line.split()[1]: float(line.split()[-1]) for line in out.splitlines() if "score" in line}
    assert len(best) == 3 and all(score == pytest.approx(1 / 62, abs=2e-3) for score in list(best.values())[1:])
    by_words = [name for name in best if name.split(":")[0] == "a.txt"]
    assert best[by_words[0]] > 1 / 61  # alone found by both

    one = ("bank", "ask", "texts.bank", QUESTION, "--passages", 1)
    printed = [run(*one, "--location", place)[1] for place in ("disk", "host", "device")]
    answers = {text.split("answer\n")[1].rsplit("\n", 2)[0] for text in printed}
    assert len(answers) == 1

    code, out, _ = run("bank", "info", "texts.bank")
    assert code == 0
    assert "3 of 3 files" in out and "a copy is in the bank" in out and "sub/c.txt" in out and "segments: 1" in out


def test_questions_from_standard_input(run, models, corpus, monkeypatch):
    run("bank", "build", corpus, "--model", models / "m0", "--bank", "b")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\n{QUESTION * 12}\n  stands alone \n"))
    code, out, err = run("bank", "ask", "b", "--passages", 3)
    assert code == 2 and err == "error: question: has 458 tokens, the model's window is 384\n"
    _, first, refused, second = re.split(r"\n\? .*\n", out)
    assert refused == "" and "compilation included" in first and "compilation included" not in second
    alone = run("bank", "ask", "b", QUESTION, "--passages", 3)[1]
    cited = lambda text: re.findall(r"^  \d  (.*)$", text, re.MULTILINE)  # noqa: E731
    assert len(cited(first)) == 3 and cited(first) == cited(alone)


def test_blank_lines_of_an_answer_are_left_out():
    said = lambda *pieces: "".join(without_blank_lines(pieces))  # noqa: E731
    assert said("\n\n", " a\n", "\n", "", "  \n", "  b \n \n c", "\n\n") == "a\n  b \n c"
    assert said("\n", "\n") == "" and said("one ", "two") == "one two"
    assert list(without_blank_lines(["one", " two"])) == ["one", " two"]


def test_a_bank_without_a_model_named_is_read_by_the_packaged_one(run, corpus):
    code, out, err = run("bank", "build", corpus, "--bank", "b")
    assert (code, err) == (0, "") and out.endswith('next: memjax bank ask b "..."\n')
    code, out, _ = run("bank", "ask", "b", "where does it stand alone", "--passages", 1)
    assert code == 0 and "a.txt:1-2" in out
    assert run("bank", "append", "b", corpus / "a.txt")[0] == 0


def test_ask_with_another_model(run, models, corpus):
    run("bank", "build", corpus, "--model", models / "m0", "--bank", "b")
    assert_refused(run("bank", "ask", "b", QUESTION, "--model", models / "m1"), "b: was built with model")
    assert run("bank", "ask", "b", QUESTION, "--model", models / "m0")[0] == 0
    assert_refused(run("bank", "ask", "b", ""), "question: is empty")
    assert_refused(run("bank", "ask", "b", QUESTION * 12), "question: has 458 tokens, the model's window is 384")
    assert_refused(run("bank", "ask", "b", QUESTION, "--passages", 0), "--passages is 0")
    assert_refused(run("bank", "info", corpus), "manifest.json")
    assert_refused(run("bank", "build", corpus, "--model", models / "m1", "--bank", "b"), "b: was built with model")
    assert run("bank", "build", corpus, "--model", models / "m1", "--bank", "b", "--overwrite")[0] == 0
    assert run("bank", "ask", "b", QUESTION, "--model", models / "m1")[0] == 0


def test_a_bank_inside_its_folder_is_not_read_into_itself(run, models, corpus):
    for _ in range(2):
        code, out, _ = run(
            "bank", "build", corpus, "--model", models / "m0", "--bank", corpus / "my.bank", "--overwrite"
        )
        assert code == 0 and "3 documents" in out and "skipped" not in out


def test_a_bank_of_pages_and_notebooks_cites_their_own_lines(run, models, corpus):
    (corpus / "old.txt").write_bytes("# coding: latin-1\nThe café has number 7.\n".encode("latin-1"))
    (corpus / "page.html").write_text("<script>\n</script>\n<p>The green house\nhas number 1.</p>")
    (corpus / "notes.ipynb").write_text('{"cells": [\n{"source": ["The blue house"]}]}')
    (corpus / "scan.pdf").write_bytes(b"%PDF-1.4 and no more")
    code, out, err = run("bank", "build", corpus, "--model", models / "m0")
    assert (code, err) == (0, "") and "6 files, " in out
    assert "skipped 1 file:" in out and "scan.pdf: PDF: " in out
    table = open_bank("texts.bank").documents
    where = dict(zip(table.path, zip(table.first_line.tolist(), table.last_line.tolist(), strict=True), strict=True))
    assert where == {
        "a.txt": (1, 2),
        "b.md": (1, 2),
        "notes.ipynb": (2, 2),
        "old.txt": (1, 2),
        "page.html": (3, 4),
        "sub/c.txt": (1, 2),
    }
    code, out, err = run("bank", "ask", "texts.bank", QUESTION)
    assert (code, err) == (0, "") and "The " in out and "script" not in out


def test_an_interrupted_build(run, models, corpus, monkeypatch, tmp_path):
    import memjax.lm.build

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(memjax.lm.build.pooling, "pool_documents", interrupt)
    code, _, err = run("bank", "build", corpus, "--model", models / "m0")
    assert (code, err) == (130, "interrupted; no bank was written; the same command begins anew\n")
    assert not list(tmp_path.glob("*.bank*"))


def test_nothing_to_read(run, models, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    build = ("bank", "build", "--model", models / "m0")
    assert_refused(run(*build, "empty"), "empty: the folder holds no text file")
    unknown = "latin.txt: can't be used as text: encoding unknown: byte 0xe9 at offset 3 is not UTF-8, none is declared"
    assert_refused(run(*build, "latin.txt"), unknown)
    assert_refused(run(*build, "nowhere"), "nowhere: there is no such file or folder")


def test_a_damaged_model(run, models, corpus, tmp_path):
    run("bank", "build", corpus, "--model", models / "m0", "--bank", "b")
    file = tmp_path / "b" / "model" / "params.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert_refused(run("bank", "ask", "b", QUESTION), "b/model/params.safetensors: truncated or damaged")
    assert_refused(
        run("bank", "build", corpus, "--model", corpus, "--bank", "c"), "config.json: ", "needs a model folder"
    )
    (tmp_path / "b" / "model" / "config.json").unlink()
    assert_refused(run("bank", "ask", "b", QUESTION), "b: holds no copy of its model, name it with --model")


# ---------------------------------------------------------------------------------------------- small parts


def test_an_excerpt_shows_the_words_of_the_question():
    text = "x " * 500 + "the Red house has number 7.\n" + "y " * 500
    shown = marked_excerpt(text, QUESTION)
    assert isinstance(shown, Text)
    assert "Red house has number 7." in shown.plain and len(shown.plain) <= 244
    assert shown.plain.startswith("… ") and shown.plain.endswith(" …")
    assert sorted(shown.plain[s.start : s.end] for s in shown.spans) == ["house", "number"]
    assert marked_excerpt("short", QUESTION).plain == "short"


def test_control_sequences_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\tc\r\nd\x9b") == "a\ufffd[31mb\tc\nd\ufffd"


def test_many_skipped_files_are_listed_by_kind(capsys):
    skipped = [Skipped(f"{i}.png", f"binary: a NUL byte at offset {i}") for i in range(1997)]
    skipped += [Skipped("a\nb.pdf", "PDF: needs it"), Skipped("c.pdf", "PDF: needs it"), Skipped("\x1b.txt", "empty")]
    report_skipped(console(), skipped)
    assert capsys.readouterr().out.splitlines() == [
        "skipped 2,000 files:",
        "  1,997 binary: 0.png, 1.png, 2.png and 1,994 more",
        "  2 PDF: needs it: a b.pdf, c.pdf",
        "  \ufffd.txt: empty",
    ]
    report_skipped(console(), [])
    assert capsys.readouterr().out == ""


def test_sizes():
    assert [size(n) for n in (0, 999, 1000, 131_072, 3_220_000, 1_000_000_000)] == [
        "0 B", "999 B", "1 KB", "131 KB", "3.22 MB", "1 GB",
    ]  # fmt: skip
