"""The converters against loops that walk the tokens one by one."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memjax.arrays import from_cu_seqlens, from_lengths, from_segment_ids


def as_lists(pair):
    return tuple(np.asarray(flags).tolist() for flags in pair)


def walk(row, padding):
    """valid and start of one row of ids, by the sentence of the docstring."""
    valid, start, current = [], [], None
    for token in row:
        is_valid = token != padding and token >= 0
        valid.append(is_valid)
        start.append(is_valid and token != current)
        current = token if is_valid else current
    return valid, start


def walk_documents(lengths, t):
    """valid and start of documents laid end to end in a row of length t."""
    start = [i == 0 for n in lengths for i in range(n)]
    padding = [False] * (t - len(start))
    return [True] * len(start) + padding, start + padding


# Few shapes, because each is compiled anew; the contents are free.
ROWS = st.sampled_from([1, 9]).flatmap(
    lambda t: st.lists(st.lists(st.integers(-2, 3), min_size=t, max_size=t), min_size=2, max_size=2)
)


@given(rows=ROWS, padding=st.sampled_from([0, -1, 3]))
def test_segment_ids_equal_a_walk(rows, padding):
    valid, start = as_lists(from_segment_ids(np.array(rows, np.int32), padding))
    assert list(zip(valid, start, strict=True)) == [walk(row, padding) for row in rows]


@given(lengths=st.sampled_from([0, 4]).flatmap(lambda n: st.lists(st.integers(0, 3), min_size=n, max_size=n)))
def test_cu_seqlens_equal_a_walk(lengths):
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    expected = tuple([flags] for flags in walk_documents(lengths, 12))
    assert as_lists(from_cu_seqlens(cu_seqlens, 12)) == expected


@given(lengths=st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_lengths_equal_a_walk(lengths):
    rows = [walk_documents([n], n) for n in lengths]
    right = tuple([row[f] + [False] * (6 - len(row[f])) for row in rows] for f in (0, 1))
    left = tuple([[False] * (6 - len(row[f])) + row[f] for row in rows] for f in (0, 1))
    assert as_lists(from_lengths(np.array(lengths, np.int32), 6)) == right
    assert as_lists(from_lengths(np.array(lengths, np.int32), 6, side="left")) == left


def test_other_integer_dtypes():
    for dtype in (np.int8, np.int64):
        assert as_lists(from_segment_ids(np.array([[-1, 4, 4]], dtype), -1)) == (
            [[False, True, True]],
            [[False, True, False]],
        )


def test_the_three_layouts_agree():
    ids = np.array([[1, 1, 1, 2, 2, 0, 0]], np.int32)
    assert as_lists(from_segment_ids(ids)) == as_lists(from_cu_seqlens(np.array([0, 3, 5], np.int32), 7))
    one = np.array([[4, 4, 4, 0], [4, 0, 0, 0]], np.int32)
    assert as_lists(from_segment_ids(one)) == as_lists(from_lengths(np.array([3, 1], np.int32), 4))


def test_under_jit():
    ids, ends, lengths = np.array([[0, 5, 5, 6]]), np.array([0, 1, 4]), np.array([2, 4])
    for function, argument in [
        (from_segment_ids, ids),
        (lambda x: from_cu_seqlens(x, 5), ends),
        (lambda x: from_lengths(x, 4, "left"), lengths),
    ]:
        assert as_lists(jax.jit(function)(argument)) == as_lists(function(argument))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_segment_ids(np.zeros(3, np.int32)), r"segment_ids: got shape \[3\], need \[b, t\]"),
        (lambda: from_segment_ids(np.zeros((1, 3), np.uint8)), "segment_ids: got dtype uint8, need a signed integer"),
        (lambda: from_cu_seqlens(np.zeros((1, 3), np.int32), 4), r"cu_seqlens: got shape \[1, 3\], need \[n\+1\]"),
        (lambda: from_cu_seqlens(np.zeros(0, np.int32), 4), r"cu_seqlens: got no entries, need at least \[0\]"),
        (lambda: from_cu_seqlens(np.array([1, 3]), 4), r"cu_seqlens\[0\]: got 1, need 0"),
        (lambda: from_cu_seqlens(np.array([0, 3, 2]), 4), "cu_seqlens: got 3 before 2 at entry 1"),
        (lambda: from_cu_seqlens(np.array([0, 3, 5]), 4), r"cu_seqlens\[-1\]: got 5, need at most t = 4"),
        (lambda: from_lengths(np.array([[2]]), 4), r"lengths: got shape \[1, 1\], need \[b\]"),
        (lambda: from_lengths(np.array([2.0]), 4), "lengths: got dtype float32, need a signed integer"),
        (lambda: from_lengths(np.array([2, 5]), 4), r"lengths\[1\]: got 5, need between 0 and t = 4"),
        (lambda: from_lengths(np.array([-1, 2]), 4), r"lengths\[0\]: got -1, need between 0 and t = 4"),
        (lambda: from_lengths(np.array([2]), 4, side="both"), "side: got 'both', need 'right' or 'left'"),
    ],
)
def test_bad_input_is_named(as_user, call, message):
    with pytest.raises(ValueError, match=message):
        call()
