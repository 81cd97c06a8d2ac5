"""What a decoded token costs after a history of 1K to 1M tokens: bytes of state and milliseconds, beside attention.

    python -m experiments.decode_cost

Every memory reads the whole history, in pieces, before its steps are timed; the key-value cache of full attention is
filled with random numbers instead, since its time depends on their number only and reading 1M tokens with it takes
hours. All memories and lengths are timed in turns, one layer each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import begun, recorded, settings

ATTENTION = "sliding_window_attention"
STEPS = 16  # decoded in one call


@dataclass(frozen=True)
class Config:
    """What is timed."""

    memories: tuple[str, ...] = ("gated_delta_net", "delta_net", "kda", "mamba2", "gla", "hgrn2", "retnet", "rwkv7")
    """Names of `memjax list`."""
    histories: tuple[int, ...] = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)
    """Tokens read before."""
    dim: int = 256
    heads: int = 4
    head_dim: int = 64
    piece: int = 4096
    """Tokens read at once."""
    repeats: int = 40
    """Samples of each figure."""
    device: str | None = None
    """Platform to run on: cpu, gpu or tpu; by default the best that jax finds."""
    output: Path = Path("build/decode_cost")
    """Folder for the record and its picture."""
    record: bool = False
    """Put them into experiments/records instead of the output folder."""
    quick: bool = False
    """Two memories and short histories: shows that everything runs, not how fast."""


QUICK: dict[str, Any] = {
    "memories": ("gated_delta_net", "gla"), "histories": (64, 256), "dim": 32, "heads": 2, "head_dim": 16, "piece": 64,
    "repeats": 3,
}  # fmt: skip


def states_after(config: Config, memory: Any, params: Any) -> dict[int, Any]:
    """The state after each history: one stream of random tokens, read in pieces."""
    import jax
    import jax.numpy as jnp

    read = jax.jit(lambda state, x: memory.apply(params, state, x)[1])
    state, at, found = memory.init_state(1), 0, {}
    for n in sorted(config.histories):
        while at < n:
            piece = min(config.piece, n - at)
            x = jax.random.normal(jax.random.fold_in(jax.random.key(1), at), (1, piece, config.dim))
            state, at = read(state, x), at + piece
        found[n] = jax.tree.map(jnp.copy, state)
    return found


def full_cache(memory: Any) -> Any:
    """The state of attention whose window is full of random keys and values."""
    import jax
    import jax.numpy as jnp

    empty = memory.init_state(1)
    keys = jax.random.split(jax.random.key(2), 2)
    k, v = (jax.random.normal(key, empty.k.shape, empty.k.dtype) for key in keys)
    return empty._replace(k=k, v=v, count=jnp.full_like(empty.count, memory.window))


def caller(config: Config, memory: Any, params: Any, state: Any) -> Any:
    """A function that decodes STEPS tokens, the state donated from call to call, and returns the seconds of one."""
    import time
    from functools import partial

    import jax

    @partial(jax.jit, donate_argnums=0)
    def decode(state, xs):
        def one(state, x):
            y, state = memory.step(params, state, x)
            return state, y

        return jax.lax.scan(one, state, xs)

    xs = jax.random.normal(jax.random.key(3), (STEPS, 1, config.dim))
    held = [state]

    def call() -> float:
        began = time.perf_counter()
        held[0], y = jax.block_until_ready(decode(held[0], xs))
        return (time.perf_counter() - began) / STEPS

    call()
    return call


def measure(config: Config) -> list[dict[str, Any]]:
    """A row for each memory and history: bytes of state, and seconds of a decoded token."""
    import jax

    from experiments.memories import mixers
    from memjax.bench.timing import interleave, summary
    from memjax.train import Progress

    sizes = {"dim": config.dim, "heads": config.heads, "head_dim": config.head_dim}
    calls, bytes_of = {}, {}
    with Progress(len(config.memories) + len(config.histories), "reading", unit="state") as bar:
        for name in config.memories:
            (memory,) = mixers(name, window=config.histories[0], **sizes)
            params = jax.jit(memory.init)(jax.random.key(0))
            for n, state in states_after(config, memory, params).items():
                calls[name, n] = caller(config, memory, params, state)
                bytes_of[name, n] = memory.state_bytes(1)
            bar.update()
        for n in config.histories:
            (memory,) = mixers(ATTENTION, window=n, **sizes)
            params = jax.jit(memory.init)(jax.random.key(0))
            calls["attention", n] = caller(config, memory, params, full_cache(memory))
            bytes_of["attention", n] = memory.state_bytes(1)
            bar.update()
    taken = interleave(calls, config.repeats)
    return [
        {"memory": name, "history": n, "state_bytes": bytes_of[name, n], **summary(samples)}
        for (name, n), samples in taken.items()
    ]


def table(rows: list[dict[str, Any]]) -> None:
    """Print microseconds of a token by memory and history, and how much the longest history adds."""
    from rich.console import Console
    from rich.table import Table

    from experiments.markdown import tokens
    from memjax.cli.console import size

    histories = sorted({row["history"] for row in rows})
    out = Table(title="microseconds of a decoded token after a history", title_justify="left", box=None)
    for header in ("memory", "state", *map(tokens, histories), "last / first"):
        out.add_column(header, justify="left" if header == "memory" else "right", no_wrap=True)
    for name in dict.fromkeys(row["memory"] for row in rows):
        by = {row["history"]: row for row in rows if row["memory"] == name}
        first, last = by[histories[0]], by[histories[-1]]
        grows = first["state_bytes"] != last["state_bytes"]
        state = size(first["state_bytes"]) + ("+" if grows else "")
        micro = [1e6 * by[n]["median"] for n in histories]
        medians = [f"{us:.0f}" if us < 1e4 else f"{us / 1e3:.0f} ms" for us in micro]
        out.add_row(name, state, *medians, f"{last['median'] / first['median']:.2f}")
    Console().print(out)


def main(config: Config) -> list[dict[str, Any]]:
    config = begun(config, QUICK)
    rows = measure(config)
    table(rows)
    recorded("decode_cost", {"config": settings(config), "rows": rows}, config)
    return rows


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
