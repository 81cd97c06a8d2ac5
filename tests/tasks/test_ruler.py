"""RULER's twins: each row is read again by a search, a chain of assignments or a count."""

from collections import Counter, defaultdict

import jax
import numpy as np
import pytest

from memjax.tasks.ruler import IS, KEY, MARKS, VAR, A, CommonWords, FrequentWords, Needles, Q, VariableTracking
from memjax.tasks.task import IGNORE


def batch(task, n=64):
    inputs, labels, _ = jax.jit(task.batch, static_argnums=1)(jax.random.key(0), n)
    return np.asarray(inputs), np.asarray(labels)


def questions(row, asked):
    """What stands between Q and A, and the answers from there on; every token of the end belongs to one."""
    begins = np.flatnonzero(row == Q).tolist()
    found = []
    for at, end in zip(begins, [*begins[1:], len(row)], strict=True):
        (a,) = at + np.flatnonzero(row[at:end] == A)
        answers = asked[a:end]
        assert (answers != IGNORE).all() and (asked[at:a] == IGNORE).all()
        assert row[a + 1 : end].tolist() == answers[:-1].tolist()  # each is given once it has been asked for
        found.append((row[at + 1 : a].tolist(), answers.tolist()))
    assert (asked[: begins[0]] == IGNORE).all()
    return begins[0], found


NEEDLES = [
    Needles(48),
    Needles(48, keys=4),
    Needles(48, values=4),
    Needles(60, keys=4, queries=4),
    Needles(90, keys=3, values=2, queries=2),
    Needles(51, haystack="needles"),
    Needles(7),
]


@pytest.mark.parametrize("task", NEEDLES, ids=repr)
def test_needles(task):
    """A search for each key finds its values in the order they stand."""
    needles = task.keys * task.values if task.haystack == "filler" else (51 - 3) // 4
    places = Counter()
    first = MARKS + task.n_fillers
    for row, asked in zip(*batch(task, 200), strict=True):
        end, found = questions(row, asked)
        at = np.flatnonzero(row[:end] == KEY)
        assert len(at) == needles and (row[at + 2] == IS).all() and (np.diff(at) >= 4).all() and at.max() + 3 < end
        known = defaultdict(list)
        for i in at:
            known[int(row[i + 1])].append(int(row[i + 3]))
        assert sorted(map(len, known.values())) == [task.values] * (needles // task.values)
        assert len({v for values in known.values() for v in values}) == needles
        assert all(first <= k < first + task.n_keys <= min(v) for k, v in known.items())
        assert len({q[0] for q, _ in found}) == task.queries == len(found)
        assert [known[q[0]] for q, _ in found] == [answers for _, answers in found]  # the oracle scores 1
        rest = np.delete(row[:end], [i + j for i in at for j in range(4)])
        assert ((rest >= MARKS) & (rest < first)).all()
        places.update(at.tolist())
    if task == NEEDLES[0]:
        assert set(places) <= set(range(48 - 3 - 3)) and len(places) > 35  # any depth


@pytest.mark.parametrize("task", [VariableTracking(64), VariableTracking(80, hops=2, chains=3), VariableTracking(7, 0)])
def test_variable_tracking(task):
    """Assignments are carried out as they are read."""
    for row, asked in zip(*batch(task), strict=True):
        end, ((question, answers),) = questions(row, asked)
        at = np.flatnonzero(row[:end] == VAR)
        assert len(at) == task.chains * (task.hops + 1) and (row[at + 2] == IS).all() and (np.diff(at) >= 4).all()
        value_of, names = {}, defaultdict(list)
        for i in at:
            x, y = int(row[i + 1]), int(row[i + 3])
            assert x not in value_of
            value_of[x] = value_of.get(y, y)  # a variable stands for its value, which was assigned before
            names[value_of[x]].append(x)
        assert len(names) == task.chains
        assert all(len(chain) == task.hops + 1 for chain in names.values())
        assert min(names) >= MARKS + task.n_fillers + task.n_keys
        assert names[question[0]] == answers and len(question) == 1


@pytest.mark.parametrize("task", [CommonWords(3, 4, 7, 2, 12), CommonWords()])
def test_common_words(task):
    for row, asked in zip(*batch(task), strict=True):
        end, ((question, answers),) = questions(row, asked)
        counts = Counter(row[:end].tolist())
        assert question == [] and min(counts) >= MARKS
        expected = Counter({task.repeats: task.common, task.other_repeats: task.others})
        assert Counter(counts.values()) == expected
        assert answers == sorted(word for word, n in counts.items() if n == task.repeats)


@pytest.mark.parametrize("task", [FrequentWords(), FrequentWords(60, 1.7, 30)], ids=repr)
def test_frequent_words(task):
    zeta = sum(r**-task.alpha for r in range(1, 10**6))
    for row, asked in zip(*batch(task), strict=True):
        end, ((question, answers),) = questions(row, asked)
        (noise, most), *rest = Counter(row[:end].tolist()).most_common()
        assert noise == MARKS and question == [] and most > rest[0][1]
        assert [n for _, n in rest] == [int(task.length * r**-task.alpha / zeta) for r in range(2, len(rest) + 2)]
        assert task.length * (len(rest) + 2) ** -task.alpha / zeta < 1  # every word that comes at all
        assert answers == [word for word, _ in rest[:3]]
        assert rest[0][1] > rest[1][1] > rest[2][1] > (rest[3][1] if len(rest) > 3 else 0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Needles(keys=33), "Needles: keys is 33, needs 1 to 32"),
        (lambda: Needles(queries=2), "Needles: queries is 2, needs 1 to 1"),
        (lambda: Needles(27, keys=4, queries=4), "Needles: length is 27, needs at least 28"),
        (lambda: Needles(256, values=33), "n_values is 32, needs at least 33"),
        (lambda: Needles(256, haystack="needles"), "Needles: n_keys is 32, needs at least 63"),
        (lambda: VariableTracking(26), "VariableTracking: length is 26, needs at least 27"),
        (lambda: VariableTracking(chains=7), "VariableTracking: n_keys is 32, needs at least 35"),
        (lambda: CommonWords(repeats=1), "CommonWords: repeats is 1, needs more than other_repeats = 1"),
        (lambda: CommonWords(n_words=60), "CommonWords: n_words is 60, needs at least 66"),
        (lambda: FrequentWords(20), "FrequentWords: length is 20, needs more"),
        (lambda: FrequentWords(n_words=3), "FrequentWords: n_words is 3, needs at least 7"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
