"""JRT-Prompt: what is repeated, what is scored; and the examples with a masked prefix."""

import numpy as np
import pytest

from memjax.tasks.jrt_prompt import masked_prefix, repeated, repeated_text

CONTEXT, QUESTION, ANSWER = np.array([[5, 6, 7], [8, 9, 0]]), np.array([[3, 4], [2, 0]]), np.array([[1, 2], [7, 0]])


def test_reads_twice_and_scores_the_answer():
    prompt = repeated(CONTEXT, QUESTION, ANSWER)
    assert prompt.ids.tolist() == [[5, 6, 7, 3, 4] * 2 + [1, 2], [8, 9, 0, 2, 0] * 2 + [7, 0]]
    assert prompt.valid.all()
    assert prompt.answer.tolist() == [[False] * 10 + [True] * 2] * 2
    targets = prompt.ids[:, 1:][prompt.answer[:, 1:]]
    assert targets.tolist() == [1, 2, 7, 0]


def test_padding_is_neither_read_nor_scored():
    prompt = repeated(CONTEXT, QUESTION, ANSWER, padding=0)
    assert [row[v].tolist() for row, v in zip(prompt.ids, prompt.valid, strict=True)] == [
        [5, 6, 7, 3, 4, 5, 6, 7, 3, 4, 1, 2],
        [8, 9, 2, 8, 9, 2, 7],
    ]
    assert [row[a].tolist() for row, a in zip(prompt.ids, prompt.answer, strict=True)] == [[1, 2], [7]]


def test_read_once_is_the_ordinary_prompt():
    prompt = repeated(CONTEXT, QUESTION, ANSWER, reads=1)
    np.testing.assert_array_equal(prompt.ids, np.concatenate([CONTEXT, QUESTION, ANSWER], 1))
    np.testing.assert_array_equal(prompt.answer.sum(1), [2, 2])


def test_text():
    assert repeated_text("The sky is blue.", "Is it?") == "The sky is blue.\nIs it?\nThe sky is blue.\nIs it?"
    assert repeated_text("C", "Q", reads=3, separator=" ") == "C Q C Q C Q"
    assert repeated_text("C", "Q", reads=1) == "C\nQ"


def test_masked_prefix():
    rng, ids = np.random.default_rng(0), np.arange(100, 100 + 4 * 401).reshape(4, 401)
    example = masked_prefix(rng, ids, 200, mask_id=3)
    assert example.ids.shape == example.targets.shape == (4, 400)
    hidden = example.ids == 3
    np.testing.assert_array_equal(hidden, example.hidden)
    assert not hidden[:, 200:].any() and 0.1 < hidden[:, :200].mean() < 0.2
    np.testing.assert_array_equal(example.targets[hidden], ids[:, :-1][hidden])
    np.testing.assert_array_equal(example.ids[~hidden], ids[:, :-1][~hidden])
    np.testing.assert_array_equal(example.targets[example.next], ids[:, 1:][example.next])
    assert not example.next[:, :199].any() and example.next[:, 200:].all()
    assert not (example.next & example.hidden).any()
    again = masked_prefix(np.random.default_rng(0), ids, 200, mask_id=3)
    np.testing.assert_array_equal(again.ids, example.ids)


def test_every_token_of_the_prefix_may_be_hidden_or_none():
    ids = np.arange(10, 22).reshape(2, 6)
    everything = masked_prefix(np.random.default_rng(0), ids, 3, mask_id=1, rate=1.0)
    assert everything.ids.tolist() == [[1, 1, 1, 13, 14], [1, 1, 1, 19, 20]]
    assert everything.next.tolist() == [[False, False, False, True, True]] * 2
    nothing = masked_prefix(np.random.default_rng(0), ids, 3, mask_id=1, rate=0.0)
    np.testing.assert_array_equal(nothing.ids, ids[:, :-1])
    assert nothing.next.tolist() == [[False, False, True, True, True]] * 2


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: repeated(CONTEXT, QUESTION, ANSWER, reads=0), "repeated: reads is 0, needs at least 1"),
        (lambda: repeated_text("C", "Q", reads=0), "repeated_text: reads is 0, needs at least 1"),
        (lambda: repeated(CONTEXT, QUESTION[:1], ANSWER), "repeated: question has 1 rows, needs those of the context"),
        (lambda: masked_prefix(np.random.default_rng(0), CONTEXT, 3, 0), "enc_length is 3, needs 1 to 2"),
        (lambda: masked_prefix(np.random.default_rng(0), CONTEXT, 1, 0, 1.5), "rate is 1.5, needs 0 to 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
