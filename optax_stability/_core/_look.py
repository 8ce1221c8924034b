"""Decides which steps take the measurements that are not made at every step.

*Problem*: a program that asks the device whether a measurement is due makes the host of
a GPU wait for the answer. The host knows the number of the step: it can choose between
two programs, one with the measurements and one without.

*How*: the extra argument ``look=`` of ``update``. A plain bool is decided during
tracing, so that ``look=False`` costs nothing and ``look=True`` asks nothing.

*Cost*: with ``look`` two programs to compile; without it one condition per measurement.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def is_due(extra_args: Mapping[str, Any], rule: Callable[[], Any]) -> Any:
    """``look`` if it was given, else what the rule says: a plain bool, or bool[]."""
    look = extra_args.get("look")
    if look is None:
        return rule()
    if isinstance(look, (bool, np.bool_)):
        return bool(look)
    if not isinstance(look, jax.Array) or look.shape != () or look.dtype != bool:
        raise ValueError(
            f"look must be True or False, got {look!r}; give a static argument of the "
            "jitted step, such as look=step % 10 == 0."
        )
    return look
