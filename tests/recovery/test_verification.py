"""A step that is run twice: one wrong bit anywhere is found, and not passed on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_stability as ost

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "bool", "uint8"]
DTYPES += ["complex64"]


def state_of(dtype):
    return {"a": {"w": jnp.ones((3, 2), dtype)}, "key": jax.random.key(0)}


class Faulty:
    """A step whose results have one wrong bit in the given calls."""

    def __init__(self, calls, path="w"):
        self._calls, self._path, self.count = calls, path, 0

    def __call__(self, state, batch):
        self.count += 1
        wrong = self.count in self._calls

        def flip(path, x):
            if not (wrong and jax.tree_util.keystr(path).endswith(f"'{self._path}']")):
                return x
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                data = jax.random.key_data(x)
                return jax.random.wrap_key_data(data.at[0].set(data[0] ^ 1))
            return flip_last_bit(x)

        return jax.tree_util.tree_map_with_path(flip, state), {"loss": batch}


def flip_last_bit(x):
    """In the last entry."""
    array = np.array(x)
    raw = array.view(np.uint8).reshape(array.size, -1)
    raw[-1, 0] ^= 1
    return jnp.asarray(array)


BATCH = jnp.float32(2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_agrees_is_returned(dtype):
    step = Faulty(calls=())
    (state, metrics), differs = ost.verify_step(step, state_of(dtype), BATCH)
    assert differs is None
    assert step.count == 2
    assert state["a"]["w"].dtype == dtype
    assert metrics["loss"] == 2


@pytest.mark.parametrize("calls", [(1,), (2,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_bit_is_found_and_not_passed_on(dtype, calls):
    step = Faulty(calls)
    (state, _), differs = ost.verify_step(step, state_of(dtype), BATCH)
    assert differs == "0/a/w"
    assert step.count == 3 + (calls == (2,))
    np.testing.assert_array_equal(state["a"]["w"], state_of(dtype)["a"]["w"])


def test_a_wrong_key_is_found():
    (state, _), differs = ost.verify_step(Faulty((1,), "key"), state_of("int32"), BATCH)
    assert differs == "0/key"
    assert state["key"] == jax.random.key(0)


def test_nan_agrees_with_itself_and_zero_not_with_minus_zero():
    made, differs = ost.verify_step(lambda x: x / x, jnp.zeros(3))
    assert differs is None
    assert np.isnan(made).all()
    signs = iter([0.0, -0.0, 0.0, 0.0])
    _, differs = ost.verify_step(lambda x: x * next(signs), jnp.ones(2))
    assert differs is not None


def test_a_device_that_is_never_right_is_one_line():
    step = Faulty(range(1, 99, 2))
    with pytest.raises(ArithmeticError) as error:
        ost.verify_step(step, state_of("float32"), BATCH, attempts=2)
    assert step.count == 4
    assert str(error.value) == (
        "0/a/w has other bits in each of 4 runs of the same step from the same state: "
        "the device computes wrong numbers, or the step is not a pure function; train "
        "on another device."
    )


def test_a_step_may_donate_its_arguments_and_they_are_still_there():
    step = jax.jit(lambda state, batch: state + batch, donate_argnums=0)
    state = jnp.arange(4.0)
    made, differs = ost.verify_step(step, state, jnp.ones(4))
    assert differs is None
    np.testing.assert_array_equal(made, [1, 2, 3, 4])
    np.testing.assert_array_equal(state, [0, 1, 2, 3])
    np.testing.assert_array_equal(step(state, jnp.ones(4)), made)


def test_a_state_that_is_split_stays_split():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(lambda x: x * 2, donate_argnums=0)
    made, differs = ost.verify_step(step, jax.device_put(jnp.arange(16.0), split))
    assert differs is None
    assert made.sharding == split


def test_a_number_of_attempts_that_cannot_be_is_explained():
    with pytest.raises(ValueError, match="attempts=0 must be an integer of at least 1"):
        ost.verify_step(Faulty(()), state_of("int32"), BATCH, attempts=0)
