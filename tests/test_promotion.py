"""The suite runs under strict promotion; only code that is not ours is excused."""

import jax.numpy as jnp
import numpy as np
import optax
import promotion
import pytest

from optax_stability._core import _numerics


def test_tests_run_under_strict_promotion():
    with pytest.raises(ValueError, match="jax_numpy_dtype_promotion"):
        jnp.ones(2) + np.ones(2, np.int32)
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
        jnp.ones(2) + jnp.ones((2, 2))


def test_a_test_whose_own_code_converts_runs_again():
    runs = []

    def converts(x):
        runs.append(x)
        return x + np.ones(2, np.int32)

    promotion.call(converts, {"x": jnp.ones(2)})
    assert len(runs) == 2


def test_a_test_in_which_adam_of_optax_converts_runs_again():
    tx, params = optax.adam(0.1), jnp.ones(2)
    promotion.call(lambda: tx.update(params, tx.init(params)), {})


def test_a_conversion_in_a_line_of_ours_is_an_error():
    with pytest.raises(ValueError, match="jax_numpy_dtype_promotion"):
        promotion.call(lambda: _numerics.increment(jnp.int32(1), jnp.float32(1)), {})
