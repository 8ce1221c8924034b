"""Tools for Flax users. Only this package imports Flax.

NNX needs no adapter for the extra arguments of the transformations:
``optimizer.update(model, grads, value=loss, moments=moments)``.

May import: ``_core``, ``_moments``, ``_gradients``.
"""

from optax_stability.flax._gradient_penalty import (
    penalize_gradient_norm,
)
from optax_stability.flax._loss_scale import (
    update_dynamic_scale,
)
from optax_stability.flax._microbatching import (
    microbatch_gradients,
)
from optax_stability.flax._norm_taps import (
    per_example_gradients,
)
from optax_stability.flax._tapped_modules import (
    Embed,
    LayerNorm,
    Linear,
    NormTap,
    RMSNorm,
)
from optax_stability.flax._train_state import TrainState

__all__ = [
    "Embed",
    "LayerNorm",
    "Linear",
    "NormTap",
    "RMSNorm",
    "TrainState",
    "microbatch_gradients",
    "penalize_gradient_norm",
    "per_example_gradients",
    "update_dynamic_scale",
]
