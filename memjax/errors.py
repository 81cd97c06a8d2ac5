"""The errors a user can act on, one class for each thing that can be wrong outside the code.

Each is a `MemjaxError`, so that one `except` catches whatever this library refuses, and a `ValueError`, so that
code which knows nothing of memjax treats it as bad input. A message is one sentence that names the argument, or the
file and the field, then what it got and what it needed:

    raise BankError(f"{path}: field 'tokenizer' is {found!r}, this model needs {expected!r}")

A mistake in a call (shapes, dtypes, an unknown name) is a plain ValueError or TypeError, as everywhere in JAX.
"""


class MemjaxError(Exception):
    """The base of every error below."""


class ConfigError(MemjaxError, ValueError):
    """A configuration that can't be built: an unknown class or field, a value out of range, fields that contradict."""


class CheckpointError(MemjaxError, ValueError):
    """A checkpoint that is truncated, of another version, or of another model: missing, extra or reshaped arrays."""


class BankError(MemjaxError, ValueError):
    """A bank that is damaged, was written by another model or tokenizer, or is too full for what was asked."""


class TokenizerError(MemjaxError, ValueError):
    """A tokenizer file that can't be read, or that doesn't fit the vocabulary of the model."""


class DataError(MemjaxError, ValueError):
    """A corpus or a record that is empty, truncated, or not in the stated form."""


def shorten(error: object) -> str:
    """One line of at most 200 characters, for what a file says and others' errors, which may be pages long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
