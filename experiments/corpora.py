"""Text to train and to search, from packages of Debian 12: what `experiments.packaged_model` and larger banks read.

    python -m experiments.corpora ~/corpora python_docs kjv     # these; without names all
    python -m experiments.corpora --list

Each corpus becomes a folder of plain files: DIR/train/<name>, DIR/test/<name> or DIR/more/<name>. Packages come by
`apt-get download` and are unpacked, not installed: it takes apt and dpkg-deb, not root. The licences are the packages'.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from tyro.conf import Positional

GZIP = (".gz", ".dz")  # dictionaries are gzip with an index


class Corpus(NamedTuple):
    """use: "train", "test" or "more". pattern: which files of the packages; command: or what prints the text."""

    use: str
    what: str
    packages: str
    pattern: str = ""
    command: str = ""


CORPORA = {
    "python_docs": Corpus("train", "manuals", "python3.11-doc", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt"),
    "kjv": Corpus(
        "train", "old prose", "bible-kjv bible-kjv-text", command="usr/bin/bible -p usr/lib -f gen1:1-rev22:21"
    ),
    "jargon": Corpus("train", "prose of a dictionary", "dict-jargon", "usr/share/dictd/*.dict.dz"),
    "wordnet": Corpus("train", "glosses", "dict-wn", "usr/share/dictd/*.dict.dz"),
    "perl_modules": Corpus("train", "code and its manuals", "perl-modules-5.36", "usr/share/perl/5.36.0/**/*.pm"),
    "essays": Corpus("test", "prose", "anarchism", "usr/share/doc/anarchism/html/*.html"),
    "go": Corpus("test", "code", "golang-1.19-src", "usr/share/go-1.19/src/**/*.go"),
    "manpages": Corpus("test", "manuals", "manpages manpages-dev", "usr/share/man/man*/*.gz"),
    "gcide": Corpus("more", "a dictionary", "dict-gcide", "usr/share/dictd/*.dict.dz"),
    "foldoc": Corpus("more", "a dictionary", "dict-foldoc", "usr/share/dictd/*.dict.dz"),
    "kernel_docs": Corpus("more", "manuals", "linux-doc-6.1", "usr/share/doc/linux-doc-6.1/html/_sources/**/*.rst.txt"),
}


@dataclass(frozen=True)
class Config:
    """Make folders of text."""

    folder: Positional[Path] = Path("build/corpora")
    names: Annotated[tuple[str, ...], Positional] = ()
    """Corpora to make; by default all."""
    list: bool = False
    """Only say what there is."""


def make(name: str, folder: Path) -> int:
    """Make one corpus in `folder`, whole or not at all; the number of its files. One that is there is left alone."""
    corpus = CORPORA[name]
    target = folder / corpus.use / name
    if target.exists():
        return sum(file.is_file() for file in target.rglob("*"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as where:
        root, out = Path(where) / "root", Path(where) / "out"
        for package in corpus.packages.split():
            subprocess.run(
                ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], cwd=where, check=True
            )
            (deb,) = Path(where).glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
        out.mkdir()
        if corpus.command:
            program, *args = corpus.command.split()
            text = subprocess.run([root / program, *args], cwd=root, stdout=subprocess.PIPE, check=True).stdout
            (out / f"{name}.txt").write_bytes(text)
        else:
            copy(root, corpus.pattern, out)
        sizes = [file.stat().st_size for file in out.rglob("*") if file.is_file()]
        if not sum(sizes):
            raise SystemExit(f"{name}: nothing in {corpus.packages} is what is meant; is this Debian 12?")
        out.rename(target)
    return len(sizes)


def copy(root: Path, pattern: str, out: Path) -> None:
    """Copy the files of a pattern, unpacked, by their paths below its first folder; no links, which are repetitions."""
    base = root / pattern.partition("*")[0].rpartition("/")[0]
    for file in root.glob(pattern):
        if file.is_file() and not file.is_symlink():
            to = out / file.relative_to(base)
            to.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix in GZIP:
                data, to = gzip.decompress(file.read_bytes()), to.with_suffix("")
                if to.suffix == ".dict":  # UTF-8 by the format, but for a few bytes that would make it no text at all
                    data = data.decode(errors="replace").encode()
                to.write_bytes(data)
            else:
                shutil.copyfile(file, to)


def main(config: Config) -> None:
    names = config.names or tuple(CORPORA)
    if unknown := set(names) - CORPORA.keys():
        raise SystemExit(f"corpora: there is no {min(unknown)!r}, only {', '.join(CORPORA)}")
    for name in names:
        corpus = CORPORA[name]
        said = f"{corpus.use}/{name}: {corpus.what}, from {corpus.packages}"
        print(said if config.list else f"{said}: {make(name, config.folder):,} files", flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
