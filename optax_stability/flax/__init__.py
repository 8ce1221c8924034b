"""What Flax users need beside the transformations. This package alone imports Flax.

NNX needs no adapter to pass on what the transformations can be told:
``optimizer.update(model, grads, value=loss, moments=moments)``.
"""

from optax_stability.flax._gradient_penalty import (
    penalize_gradient_norm as penalize_gradient_norm,
)
from optax_stability.flax._loss_scale import (
    update_dynamic_scale as update_dynamic_scale,
)
from optax_stability.flax._microbatching import (
    microbatch_gradients as microbatch_gradients,
)
from optax_stability.flax._norm_taps import (
    per_example_gradients as per_example_gradients,
)
from optax_stability.flax._tapped_modules import Embed as Embed
from optax_stability.flax._tapped_modules import LayerNorm as LayerNorm
from optax_stability.flax._tapped_modules import Linear as Linear
from optax_stability.flax._tapped_modules import NormTap as NormTap
from optax_stability.flax._tapped_modules import RMSNorm as RMSNorm
from optax_stability.flax._train_state import TrainState as TrainState
