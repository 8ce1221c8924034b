"""Applies faults to the batches of a run, to see that it survives them.

*Problem*: whether a guard, a rewind policy and a trainer work together shows in the
night in which they are needed, or in a rehearsal. *Where*: on the host, in the training
loop, before the step. *Cost*: none without a fault.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_stability.faults._fault import Fault


class FaultInjector:
    """Applies faults to the batches of a run.

    **Guarantees**

    * A batch without a fault is handed on as it is.
    * A fault depends on the number of its batch only: a run that is killed and resumed
      meets the same ones. After a rewind no batch is drawn twice, so no fault repeats.
    * The factors are always there, with the same dtype, so no fault compiles the step
      anew.

    Args:
      faults: from :func:`parse_faults`.
      vocabulary: random tokens are below it.

    Example:
      >>> from optax_stability.faults import parse_faults
      >>> injector = FaultInjector(parse_faults(["scale=100@2"]), vocabulary=256)
      >>> [float(injector.factors(batch)["gradient"]) for batch in (1, 2, 3)]
      [1.0, 100.0, 1.0]
    """

    def __init__(self, faults: Iterable[Fault], vocabulary: int):
        """Takes the faults."""
        self._faults, self._vocabulary = tuple(faults), vocabulary

    def _hit(self, kind: str, batch: int) -> bool:
        return any(x.kind == kind and x.hits(batch) for x in self._faults)

    def corrupt(self, tokens: np.ndarray, batch: int) -> np.ndarray:
        """The batch, or random tokens instead; they depend only on its number."""
        if not self._hit("bytes", batch):
            return tokens
        random = np.random.default_rng(batch)
        return random.integers(self._vocabulary, size=tokens.shape, dtype=tokens.dtype)

    def factors(self, batch: int) -> dict[str, np.float32]:
        """The factors on the ``"gradient"`` and, as ``"surge"``, the learning rate.

        They are for :func:`with_gradient_factor` and :func:`scale_by_surge`.
        """

        def product(*kinds: str) -> np.float32:
            hits = [x for x in self._faults if x.kind in kinds and x.hits(batch)]
            return np.float32(math.prod(x.size for x in hits))

        return {"gradient": product("nan", "scale"), "surge": product("surge")}

    def flipping(self, step: Callable[..., Any], batch: int) -> Callable[..., Any]:
        """The step, which returns a list of arrays first; its first run may flip a bit.

        Only the first, as a machine that errs now and then: a step that is run again
        from the same state, by :func:`optax_stability.verify_step`, is right.
        """
        wrong = [self._hit("flip", batch)]

        def faulty(*arguments):
            leaves, *others = step(*arguments)
            if wrong.pop() if wrong else False:
                first = next(i for i, x in enumerate(leaves) if x.dtype == jnp.float32)
                leaves = [*leaves[:first], _flip(leaves[first]), *leaves[first + 1 :]]
            return leaves, *others

        return faulty


def _flip(x: jax.Array) -> jax.Array:
    """Flips the lowest bit of the first entry of a float32 array."""
    word, first = x.view(jnp.uint32), (0,) * x.ndim
    return word.at[first].set(word[first] ^ 1).view(x.dtype)
