"""Runs flash-linear-attention's naive chunk forms under PyTorch, as it is asked on standard input.

    .venv-peers/bin/python fla_peer.py

This file is run by the Python of `make peers`, which has torch and fla-core and knows nothing of jax or memjax. A line
of JSON is a question, a line of JSON the answer; the first line tells the versions. The naive modules are loaded by
their paths: importing the package would load Triton kernels, which a machine without a GPU can't.
"""

# pyright: reportMissingImports=false
# (torch is in the other environment)

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch


class Peer(NamedTuple):
    """A function of the file, its argument for each of ours by name, and what it does otherwise than ours.

    heads_first: arrays are [b h t ...]. own_scale: it multiplies q by k**-0.5 and can't be told not to.
    """

    file: str
    function: str
    arguments: dict[str, str]
    heads_first: bool = False
    own_scale: bool = False
    settings: dict[str, Any] = {}


SAME = {name: name for name in "qkv"}
UNSCALED = {"scale": 1.0, "output_final_state": True}
PEERS = {
    "simple_gla": Peer("simple_gla", "naive_chunk_simple_gla", SAME | {"log_decay": "g"}, settings=UNSCALED),
    "delta_rule": Peer("delta_rule", "delta_rule_chunkwise", SAME | {"beta": "beta"}, heads_first=True, own_scale=True),
    "gated_delta_rule": Peer(
        "gated_delta_rule",
        "naive_chunk_gated_delta_rule",
        SAME | {"log_decay": "g", "beta": "beta"},
        settings=UNSCALED,
    ),
    "kda": Peer("kda", "naive_chunk_kda", SAME | {"log_decay": "g", "beta": "beta"}, settings=UNSCALED),
    "gdn2": Peer("gdn2", "naive_chunk_gdn2", SAME | {"log_decay": "g", "erase": "b", "write": "w"}, settings=UNSCALED),
    "dplr": Peer(
        "generalized_delta_rule/dplr",
        "dplr_chunkwise",
        SAME | {"a": "alpha", "b": "beta", "log_decay": "gk"},
        heads_first=True,
        own_scale=True,
    ),
}
"""Each with the chunk size that its function has by default."""


class Prepared:
    """A peer with the arrays of a case in its own layout, so that no time is spent on that when it runs."""

    def __init__(self, peer: Peer, arrays: dict[str, numpy.ndarray]):
        self.peer = peer
        inputs = {name.removeprefix("in "): a for name, a in arrays.items() if name.startswith("in ")}
        self.scale = inputs["q"].shape[-1] ** 0.5 if peer.own_scale else 1.0
        inputs["q"] = inputs["q"] * self.scale
        tensors = {name: self._turn(torch.from_numpy(a)).contiguous() for name, a in inputs.items()}
        self.inputs = {peer.arguments[name]: tensor for name, tensor in tensors.items()}
        self.cotangents = self._turn(torch.from_numpy(arrays["do"])).contiguous(), torch.from_numpy(arrays["dstate"])
        self.function = partial(load(peer), **peer.settings)

    def forward(self) -> Any:
        with torch.no_grad():
            return self.function(**self.inputs)

    def residuals(self) -> Any:
        return self.function(**{name: a.detach().requires_grad_() for name, a in self.inputs.items()})

    def both(self) -> Any:
        leaves = {name: a.detach().requires_grad_() for name, a in self.inputs.items()}
        outputs = self.function(**leaves)
        return outputs, torch.autograd.grad(outputs, list(leaves.values()), self.cotangents)

    def results(self) -> dict[str, numpy.ndarray]:
        """Outputs and gradients in our layout and scale."""
        (o, state), gradients = self.both()
        theirs = dict(zip(self.inputs, gradients, strict=True))
        found = {f"d {name}": self._turn(theirs[other]) for name, other in self.peer.arguments.items()}
        found["d q"] = found["d q"] * self.scale
        return {name: a.detach().numpy() for name, a in (found | {"o": self._turn(o), "state": state}).items()}

    def _turn(self, a: torch.Tensor) -> torch.Tensor:
        return a.transpose(1, 2) if self.peer.heads_first else a


def load(peer: Peer) -> Callable[..., Any]:
    """The function, from its file alone."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("fla is not installed")
    path = Path(package.submodule_search_locations[0]) / "ops" / peer.file / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{peer.function}", path)
    assert spec and spec.loader, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, peer.function)


def main() -> None:
    """Answer line by line until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    torch.set_num_threads(os.cpu_count() or 1)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "fla-core")}
    answer(**versions, threads=torch.get_num_threads(), peers=list(PEERS))
    prepared = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if question["do"] == "prepare":
                prepared = None  # frees the case before
                with numpy.load(question["file"]) as file:
                    prepared = Prepared(PEERS[question["peer"]], dict(file))
                path = Path(question["file"]).with_name("results.npz")
                numpy.savez(path, allow_pickle=False, **prepared.results())
                answer(file=str(path))
            else:
                run = getattr(prepared, question["mode"])
                began = time.perf_counter()
                kept = run()  # freed after the clock has stopped
                seconds = time.perf_counter() - began
                del kept
                answer(seconds=seconds)
        except Exception as error:
            failed = traceback.extract_tb(error.__traceback__)[-1].line  # all that a bare `assert` says
            answer(error=f"{type(error).__name__}: {error}".removesuffix(": ") + f" (at `{failed}`)")


if __name__ == "__main__":
    main()
