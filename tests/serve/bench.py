"""A bank of a few untrusted texts and an untrained model, behind an application or a real server."""

import contextlib
import threading
import time
from pathlib import Path

import uvicorn

from memjax import Stack
from memjax.data import read_folder
from memjax.in_storage.msa import MSA
from memjax.lm import LanguageModel, block
from memjax.lm.asking import open_with_model
from memjax.lm.build import build_bank
from memjax.lm.files import load_model, save_model
from memjax.serve import ServedBank, make_app
from memjax.serve.guard import known_hosts
from tests.lm import tiny

SCRIPT = "<script>document.title = 1</script>"
TEXTS = {
    "a.txt": "The red house has number 1234567.\nIt stands alone.\n",
    "b <img src=x onerror=document.title=2>.md": f"A house, and\n{SCRIPT}\n",
    "sub/c.txt": "A third text,\nin a folder of its own.\n",
}


def make_bank(folder: Path, texts: dict[str, str] = TEXTS, layers: int = 1) -> Path:
    """Write texts into folder/texts and read them into folder/texts.bank, by a model of so many router layers."""
    for name, text in texts.items():
        file = folder / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    if not (folder / "model").exists():
        model = LanguageModel(Stack((block(MSA(**tiny.FIELDS), 8),) * layers), tiny.TOKENIZER.vocab_size)
        save_model(folder / "model", model, tiny.params(model), tiny.TOKENIZER, reading=tiny.READING)
    build(folder)
    return folder / "texts.bank"


def build(folder: Path) -> None:
    """Bring the bank up to date with its folder."""
    build_bank(load_model(folder / "model"), read_folder(folder / "texts")[0], folder / "texts.bank", progress=False)


def serve(bank: Path, passages: int | None = None, words: bool = False) -> ServedBank:
    return ServedBank(bank, lambda: open_with_model(bank), passages, words)


@contextlib.contextmanager
def server(bank: Path):
    """A real server on a free port of this machine: its port."""
    config = uvicorn.Config(
        make_app(serve(bank), known_hosts("127.0.0.1")), port=0, http="h11", ws="none", lifespan="off",
        log_level="warning",
    )  # fmt: skip
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()
