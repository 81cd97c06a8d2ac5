"""Pipelines: batches from grain that are deterministic, endless, and can be resumed at any step.

Each is a `grain.MapDataset` up to the batch: batch i is a function of i and the seed, so the position of an iterator is
one number, which `get_state` and `set_state` (and orbax, which saves an iterator as it is) carry. Reading ahead is done
by threads, or, with workers > 0, by processes: for a `fn` that holds the interpreter lock. The batches are the same;
the state belongs to the number of workers. Processes are spawned, so a script needs
`if __name__ == "__main__":`, and the iterator should be closed (`iterator.close()`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Integer

from memjax.errors import DataError

if TYPE_CHECKING:
    import grain


def token_windows(
    ids: Integer[np.ndarray, " n"], length: int, *, batch: int, seed: int, shuffle: bool = True, workers: int = 0
) -> "grain.IterDataset":
    """Windows of one long row of tokens, for a language model: inputs are [:, :-1], targets [:, 1:].

    Windows of length + 1 tokens begin every `length` tokens, so each token but the first is a target once per epoch; a
    rest shorter than a window is dropped. Every epoch has its own order.

    Args:
      ids: token ids; may be memory-mapped (each worker process gets a copy of its own).
      length: tokens the model sees, t.
      batch: windows per batch, b.
      seed: of the order, in [0, 2**32).
      shuffle: False gives the windows in order.
      workers: processes that read ahead; 0 uses threads.

    Returns:
      Endless dataset of {"ids": int32 [b, t + 1]}.

    Raises:
      DataError: if ids are not a 1-D array of integers, or too few for one window.
    """
    _check(length=length, batch=batch)
    _check_ids("ids", ids)
    count = (len(ids) - 1) // length
    if count < 1:
        raise DataError(f"ids: one window of length {length} needs {length + 1} tokens, got {len(ids)}")
    windows = _grain().MapDataset.source(_Windows(ids, length, count)).seed(_seed(seed))
    return _batches((windows.shuffle() if shuffle else windows).repeat(), batch, workers)


def packed_documents(
    documents: Sequence[Integer[np.ndarray, " _"]], length: int, *, batch: int, seed: int, workers: int = 0
) -> "grain.IterDataset":
    """Documents packed into rows of length + 1 tokens, to be trained on without seeing each other.

    A document longer than a row is cut into pieces, each with its own start. Pieces are placed best-fit decreasing: the
    longest first, each into the fullest row that has room (Ding et al., Fewer Truncations Improve Language Modeling,
    2024, arXiv:2404.10830). The packing is made once; every epoch has its own order of rows.

    Args:
      documents: 1-D arrays of token ids; empty ones are dropped.
      length: tokens the model sees, t.
      batch: rows per batch, b.
      seed: of the order, in [0, 2**32).
      workers: processes that read ahead; 0 uses threads.

    Returns:
      Endless dataset of {"ids": int32 [b, t + 1], "start": bool [b, t + 1], "valid": bool [b, t + 1]}. start is True at
      the first token of a piece, valid is False (and ids are 0) at the padding on the right. The targets ids[:, 1:]
      count where valid[:, 1:] & ~start[:, 1:].

    Raises:
      DataError: if a document is not a 1-D array of integers, or if there is none.
    """
    _check(length=length, batch=batch)
    for i, document in enumerate(documents):
        _check_ids(f"documents[{i}]", document)
    width = length + 1
    pieces = [
        document[start : start + width].astype(np.int32)
        for document in documents
        for start in range(0, len(document), width)
    ]
    if not pieces:
        raise DataError(f"documents: got {len(documents)} documents and no token")
    rows = _Rows(pieces, best_fit([len(piece) for piece in pieces], width), width)
    return _batches(_grain().MapDataset.source(rows).seed(_seed(seed)).shuffle().repeat(), batch, workers)


def generated(
    fn: Callable[[np.random.Generator], dict[str, Any]], *, seed: int, batch: int | None = None, workers: int = 0
) -> "grain.IterDataset":
    """Fresh examples without end from a function of a random generator, for synthetic tasks.

    Example i is fn(np.random.default_rng([seed, i])): it depends on nothing else, so that a run resumed at step n sees
    the same batches.

    Args:
      fn: makes one example, a dict of arrays of fixed shapes. It must draw from its argument only.
      seed: not negative; another seed gives other examples.
      batch: examples per batch, stacked in front, so each array is [b, ...]. None: fn makes a whole batch at once.
      workers: processes that read ahead; 0 uses threads. fn and what it refers to are pickled for them.

    Returns:
      Endless dataset of dicts as fn gives them.
    """
    if batch is not None:
        _check(batch=batch)
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    # Larger than any run: an index is a place in the stream, nothing of that length is ever made.
    examples = _grain().MapDataset.range(1 << 62).map(_Example(fn, seed))
    return _batches(examples, batch, workers)


def mark_absl_flags() -> None:
    """Let grain's worker processes start outside of absl.app.

    grain 0.2.18 reads an absl flag before it starts a worker, and absl raises UnparsedFlagAccessError if the program is
    not run by absl.app: in every plain script, notebook and test (google/grain#1355, with the fix in #1361). Marking
    the flags as parsed keeps their defaults. Flags that were parsed already stay as they are.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack pieces into rows of `width`, the longest first, each into the fullest row that has room.

    Args:
      lengths: of the pieces, each in [1, width].
      width: room of a row.

    Returns:
      For each row the indices of its pieces.

    >>> best_fit([2, 5, 3, 4], 7)
    [[1, 0], [3, 2]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # rows by the room they have left
    has_room = 0  # bit r is set where with_room[r] is not empty, so the best fit is the lowest bit from a length on
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = has_room >> lengths[piece]
        if fitting:
            room = lengths[piece] + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            has_room ^= (not with_room[room]) << room
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(piece)
        rest = room - lengths[piece]
        with_room[rest].append(row)
        has_room |= (rest > 0) << rest
    return rows


class _Windows:
    def __init__(self, ids: np.ndarray, length: int, count: int):
        self.ids, self.length, self.count = ids, length, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(index) * self.length
        return {"ids": self.ids[start : start + self.length + 1].astype(np.int32)}


class _Rows:
    def __init__(self, pieces: list[np.ndarray], rows: list[list[int]], width: int):
        self.pieces, self.rows, self.width = pieces, rows, width

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pieces = [self.pieces[piece] for piece in self.rows[int(index)]]
        ends = np.cumsum([len(piece) for piece in pieces])
        ids, start = np.zeros(self.width, np.int32), np.zeros(self.width, bool)
        ids[: ends[-1]] = np.concatenate(pieces)
        start[np.concatenate([[0], ends[:-1]])] = True
        return {"ids": ids, "start": start, "valid": np.arange(self.width) < ends[-1]}


class _Example:
    def __init__(self, fn: Callable[[np.random.Generator], dict[str, Any]], seed: int):
        self.fn, self.seed = fn, seed

    def __call__(self, i: int) -> dict[str, Any]:
        return self.fn(np.random.default_rng([self.seed, int(i)]))


def _grain():
    import grain

    return grain


def _batches(dataset: Any, batch: int | None, workers: int) -> Any:
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if batch is not None:
        # With the remainder kept, grain counts batches in floating point, and sys.maxsize / 1 overflows.
        dataset = dataset.batch(batch, drop_remainder=True)
    # grain's defaults (16 threads, 500 elements) count single examples; an element here is a whole batch.
    dataset = dataset.to_iter_dataset(_grain().ReadOptions(num_threads=4, prefetch_buffer_size=8))
    if not workers:
        return dataset
    mark_absl_flags()
    return dataset.mp_prefetch(_grain().MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))


def _seed(seed: int) -> int:
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    return seed


def _check_ids(name: str, ids: np.ndarray) -> None:
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{name}: needs 1-D integers, got shape {ids.shape} of {ids.dtype}")


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
