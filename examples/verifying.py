"""Runs a step twice, and says so if the device does not compute the same again."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import optax_stability as ost
from optax_stability.loop import FailedError


def verified(step: Callable, structure: Any, say: Callable[[str], object]) -> Callable:
    """A step that is run twice, and again if any bit of loss or state differs.

    Args:
      step: returns the leaves of the new state, and metrics.
      structure: the structure of the state, which names the leaves.
      say: receives a sentence with the name of the first array that differs.
    """

    def named(*arguments):
        leaves, metrics = step(*arguments)
        return {"metrics": metrics, "state": structure.unflatten(leaves)}

    def verified(*arguments):
        try:
            made, name = ost.verify_step(named, *arguments)
        except ArithmeticError as error:
            raise FailedError(str(error)) from error
        if name is not None:
            problem = f"{name} had other bits when the step was run again"
            say(f"this device computes wrong numbers: {problem}; two more runs agreed")
        found = {"verify/differs": np.float32(name is not None)}
        return jax.tree.leaves(made["state"]), made["metrics"] | found

    return verified
