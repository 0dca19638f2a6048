"""Keras in another precision for a while."""

import contextlib
from collections.abc import Iterator

import keras


@contextlib.contextmanager
def keras_precision(dtype: str) -> Iterator[None]:
    """Creates Keras layers, and computes, in `dtype`; as it was afterwards.

    The policy of new layers is fixed when it is first asked for, and does not follow floatx back.
    """
    before = keras.config.floatx()
    _set(dtype)
    try:
        yield
    finally:
        _set(before)


def _set(dtype: str) -> None:
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
