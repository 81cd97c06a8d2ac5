"""The command line: `memjax list | train | eval | generate | export | bench ops`, and
`memjax bank build | ask | serve | info | append | delete | verify | compact`.

One file a group of commands. A command is a dataclass, whose fields are its flags (tyro), with `run`. What computes is
imported in `run`, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from memjax.cli import console
from memjax.cli.bank import Bank
from memjax.cli.bench import Bench
from memjax.cli.evaluate import Eval
from memjax.cli.export import Export
from memjax.cli.generate import Generate
from memjax.cli.listing import List
from memjax.cli.train import Train
from memjax.errors import MemjaxError

SPELLING = (
    tyro.conf.OmitSubcommandPrefixes,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; argv None takes the program's own arguments.

    Returns:
      The exit code: 0, 1 where a check failed, 2 where the input was refused (one line on standard error says why),
      130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = (
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Bank, tyro.conf.subcommand("bank")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
    )
    try:
        command = tyro.cli(
            commands,
            prog="memjax",
            description="Memory architectures for sequence models: look up, train, compare, read folders into them.",
            args=argv or ["--help"],
            config=SPELLING,
        )
    except SystemExit as end:  # tyro has printed the help or what is wrong with the arguments
        return end.code if isinstance(end.code, int) else 0
    try:
        code = command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in `memjax list | head`; nor may Python's exit write to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemjaxError, OSError) as error:
        console.error(str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        console.note(f"interrupted{'; ' if str(interrupt) else ''}{interrupt}")
        return 130
    return code or 0
