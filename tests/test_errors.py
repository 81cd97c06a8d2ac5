"""Every error is caught as one family, and as the ValueError that code without memjax expects."""

import inspect

import pytest

from memjax import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
LEAVES = [c for c in CLASSES if c is not errors.MemjaxError]


def test_the_family_is_complete():
    assert {c.__name__ for c in LEAVES} == {
        "BankError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "TokenizerError",
    }


@pytest.mark.parametrize("error", LEAVES)
@pytest.mark.parametrize("caught_as", [errors.MemjaxError, ValueError])
def test_caught_as(error, caught_as):
    with pytest.raises(caught_as, match="field 'version' is 3"):
        raise error("bank.json: field 'version' is 3, this library reads 1 and 2")


@pytest.mark.parametrize("error", LEAVES)
def test_kinds_do_not_catch_each_other(error):
    assert [other for other in LEAVES if issubclass(error, other)] == [error]
