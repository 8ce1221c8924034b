"""Strict promotion for tests: JAX converts no dtype and adds no axis by itself.

A line of the library that needs a conversion or an axis has to say so. optax's Adam and
its schedules, Flax's layers and the losses of some tests do not: a test in which such
code fails is run again with JAX's defaults.
"""

import re
import traceback
from pathlib import Path

import jax

import optax_stability

PACKAGE = Path(optax_stability.__file__).parent
JAX = Path(jax.__file__).parent
IMPLICIT = re.compile("jax_numpy_(dtype|rank)_promotion")


def call(test, arguments):
    """Calls a test under strict promotion, and again if other code converts."""
    try:
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            return test(**arguments)
    except Exception as error:
        if not needed_by_others(error):
            raise
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return test(**arguments)


def needed_by_others(error):
    """Whether a conversion failed that no line of the library asked for."""
    while error is not None:
        if IMPLICIT.search(str(error)):
            return not is_ours(error)
        error = error.__cause__ or error.__context__
    return False


def is_ours(error):
    """Whether the innermost line outside JAX is in the library."""
    files = [
        Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)
    ]
    outside = [file for file in files if not file.is_relative_to(JAX)]
    return bool(outside) and outside[-1].is_relative_to(PACKAGE)
