"""Says in words what stands where it cannot work.

*Problem*: a wrong order in a chain raises nothing, and costs a run.

*Where*: once, on the host, before training. *Cost*: milliseconds; nothing is compiled,
and no array is made.
"""

from typing import Any

from optax_stability._checking import (
    _guard_rules,
    _measurement_rules,
    _order_rules,
)
from optax_stability._checking._description import describe
from optax_stability._checking._placement import Place, places_in
from optax_stability._checking._rule import sentences

RULES = (*_guard_rules.RULES, *_order_rules.RULES, *_measurement_rules.RULES)


def _transformation_of(tx: Any) -> Any:
    """What has ``init`` and ``update``, or the ``tx`` of a Flax object."""
    is_threshold = hasattr(tx, "rebase")
    for each in (tx, getattr(tx, "tx", None)):
        has_both = hasattr(each, "init") and hasattr(each, "update")
        if has_both and not isinstance(each, type) and not is_threshold:
            return each
    remedy = "pass the transformation, not its state"
    if is_threshold:
        remedy = "pass what it is an argument of, such as clip_by_threshold(threshold)"
    elif callable(tx):
        remedy = "pass the result of its call, such as optax.adamw(1e-3)"
    raise TypeError(
        "tx must be an optax.GradientTransformation, or an object that holds one as "
        f"tx.tx, such as a TrainState, got a {type(tx).__name__}; {remedy}."
    )


def check(tx: Any, params: Any = None) -> list[str]:
    """Says what stands in a chain where it cannot work, and where it should stand.

    **The order**, outermost first; the gradient goes from left to right::

      accumulate_moments(                     averages K microbatches
        record_history(                       one row for every step
          chain(
            record("grad"),                   the gradient as it comes
            spike_guard(                      decides whether the step is taken
              chain(
                estimate_noise_scale(),       needs moments=
                clip,                         before the optimizer
                Adam or Muon,
                add_decayed_weights,          before the learning rate
                scale_by_learning_rate,       last: it turns the sign
                record("update"))))))         the step as it is taken

    Every line may be left out, ``safe_adamw`` is three of them. Wrappers of optax that
    move the parameters on their own (``schedule_free``, ``mechanize``, ``lookahead``)
    stand inside ``spike_guard``.

    **Guarantees**

    * The chain is not run, and is the same afterwards. A schedule is asked for its
      value at step 1000.
    * A part that is not known is no fault: transformations of your own pass, and what
      they wrap is read if they keep it in a variable or an attribute.
    * Each sentence names the parts, says what goes wrong and where they belong.

    **Edge cases**: it reads what is there, and not what is called: whether ``value=``
    and ``moments=`` are passed to ``update``, nobody can see here. A learning rate that
    is missing may be applied elsewhere, and is not missed. Values are read only where
    they change what the order means, such as a weight decay of 0.

    Args:
      tx: the transformation, or what holds it as ``.tx``: a Flax ``TrainState``, an
        ``nnx.Optimizer``.
      params: the parameters, or shapes of them. If given, groups of ``optax.partition``
        that hold none of them are left out.

    Returns:
      One sentence for each fault, the empty list if there is none.

    Raises:
      TypeError: ``tx`` is not a transformation and does not hold one.

    Example:
      >>> import optax
      >>> from optax_stability import clip_by_zscore, safe_adamw, spike_guard
      >>> check(spike_guard(optax.chain(clip_by_zscore(), safe_adamw(1e-3))))
      []
      >>> guarded = spike_guard(clip_by_zscore())
      >>> (sentence,) = check(optax.chain(guarded, safe_adamw(1e-3)))
      >>> sentence.split(":")[0]
      'scale_by_safe_adam stands behind spike_guard, not inside it'
    """
    root = Place(describe(_transformation_of(tx), params))
    places = list(places_in(root))
    return [each for rule in RULES for each in sentences(rule, places)]
