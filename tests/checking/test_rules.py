"""Each rule finds its wrong order, and nothing in the right one."""

import doctest
import re
from pathlib import Path
from typing import Any, NamedTuple

import optax
import pytest
from optax import contrib

import optax_stability as ost
from optax_stability._checking._check import RULES
from optax_stability._checking._description import describe
from optax_stability._checking._placement import Place, places_in
from optax_stability._checking._rule import sentences

BY_NAME = {rule.name: rule for rule in RULES}
chain = optax.chain


def adam():
    return ost.safe_adamw(1e-3)


def rate():
    return optax.scale_by_learning_rate(1e-3)


def clip():
    return ost.clip_by_zscore()


def fixed_clip(limit=1.0):
    return optax.clip_by_global_norm(limit)


def guard(*parts):
    return ost.spike_guard(chain(*parts))


def frozen(tx):
    return optax.partition({"b": tx, "w": optax.set_to_zero()}, {"w": "w", "b": "b"})


def muon():
    return chain(contrib.scale_by_muon(), optax.add_decayed_weights(0.1), rate())


def accumulated(tx, **options):
    return ost.accumulate_moments(tx, 4, **options)


def by_microbatch():
    return ost.safe_adamw(1e-3, second_moment="microbatch")


class Orders(NamedTuple):
    """Chains with a wrong order, and chains in the right one.

    Attributes:
      wrong: pairs of a chain and what its sentence begins with.
      right: chains that nothing is to be said about.
    """

    wrong: list[tuple[Any, str]]
    right: list[Any]


ORDERS = {
    "optimizer behind guard": Orders(
        [
            (
                chain(ost.spike_guard(optax.identity()), adam()),
                "scale_by_safe_adam stands behind spike_guard, not inside it:",
            ),
            (
                chain(guard(clip()), optax.sgd(0.1, momentum=0.9)),
                "trace stands behind spike_guard",
            ),
            (
                chain(ost.branch_on_spike(clip()), contrib.muon(0.1)),
                "scale_by_muon stands behind branch_on_spike",
            ),
            (
                optax.named_chain(
                    ("guard", optax.apply_if_finite(fixed_clip(), 5)),
                    ("step", optax.masked(optax.lion(1e-3), {"w": True})),
                ),
                "scale_by_lion stands behind apply_if_finite",
            ),
        ],
        [
            guard(clip(), adam()),
            chain(guard(clip()), optax.sgd(0.1)),
            # A guard around both leaves nothing for the inner one to skip.
            guard(ost.skip_spikes(fixed_clip(), grad_norm=None), adam()),
            optax.partition({"a": ost.spike_guard(clip()), "b": adam()}, "a"),
        ],
    ),
    "decay behind guard": Orders(
        [
            (
                chain(guard(ost.scale_by_safe_adam()), optax.add_decayed_weights(0.1)),
                "add_decayed_weights stands behind spike_guard",
            )
        ],
        [
            chain(guard(ost.scale_by_safe_adam()), optax.add_decayed_weights(0.0)),
            chain(guard(ost.scale_by_safe_adam()), rate(), ost.record("update")),
        ],
    ),
    "guard behind optimizer": Orders(
        [
            (
                chain(adam(), ost.spike_guard(optax.identity())),
                "spike_guard stands behind scale_by_safe_adam:",
            ),
            (
                chain(optax.trace(0.9), ost.skip_spikes(rate())),
                "skip_spikes stands behind trace:",
            ),
        ],
        [chain(optax.identity(), guard(adam()))],
    ),
    "NaN hidden from guard": Orders(
        [
            (
                chain(clip(), guard(adam())),
                "clip_by_zscore stands in front of spike_guard",
            ),
            (
                chain(optax.zero_nans(), guard(adam())),
                "zero_nans stands in front of spike_guard",
            ),
            (
                chain(ost.clip_by_quantile(0.9), optax.apply_if_finite(adam(), 5)),
                "clip_by_quantile stands in front of apply_if_finite",
            ),
        ],
        [guard(clip(), adam()), guard(optax.zero_nans(), adam())],
    ),
    "clip in front of guard": Orders(
        [
            (
                chain(fixed_clip(), guard(adam())),
                "clip_by_global_norm stands in front of spike_guard",
            )
        ],
        [
            guard(fixed_clip(), adam()),
            chain(fixed_clip(), ost.skip_spikes(adam(), grad_norm=None)),
            chain(fixed_clip(), optax.apply_if_finite(adam(), 5)),
        ],
    ),
    "guard in guard": Orders(
        [
            (
                guard(ost.skip_spikes(adam())),
                "skip_spikes stands inside spike_guard, another guard:",
            ),
            (
                optax.apply_if_finite(guard(adam()), 5),
                "spike_guard stands inside apply_if_finite",
            ),
        ],
        [guard(optax.apply_if_finite(adam(), 5))],
    ),
    "guard in accumulator of optax": Orders(
        [
            (
                optax.MultiSteps(guard(adam()), 4),
                "spike_guard stands inside MultiSteps: one NaN stays",
            ),
            (
                optax.MultiSteps(
                    optax.apply_if_finite(adam(), 5), 4
                ).gradient_transformation(),
                "apply_if_finite stands inside MultiSteps",
            ),
        ],
        [
            accumulated(guard(adam())),
            optax.MultiSteps(adam(), 4),
            optax.MultiSteps(
                guard(adam()), 4, should_skip_update_fn=optax.skip_not_finite
            ),
        ],
    ),
    "guard behind accumulator of optax": Orders(
        [
            (
                chain(optax.apply_every(4), guard(optax.sgd(0.1))),
                "spike_guard stands behind apply_every",
            )
        ],
        [accumulated(guard(optax.sgd(0.1)))],
    ),
    "guard in a wrapper that moves alone": Orders(
        [
            (
                contrib.schedule_free(guard(optax.sgd(0.1)), 0.1),
                "spike_guard stands inside schedule_free",
            ),
            (
                contrib.mechanize(ost.skip_spikes(adam())),
                "skip_spikes stands inside mechanize",
            ),
            (
                optax.lookahead(ost.skip_spikes(adam()), 5, 0.5),
                "skip_spikes stands inside lookahead",
            ),
        ],
        [
            guard(contrib.schedule_free(optax.sgd(0.1), 0.1)),
            guard(contrib.mechanize(adam())),
        ],
    ),
    "accumulation in guard": Orders(
        [
            (
                guard(accumulated(adam())),
                "accumulate_moments stands inside spike_guard",
            )
        ],
        [accumulated(guard(adam()))],
    ),
    "history in guard": Orders(
        [
            (
                guard(ost.record_history(adam())),
                "record_history stands inside spike_guard",
            )
        ],
        [ost.record_history(guard(adam()))],
    ),
    "history beside guard": Orders(
        [
            (
                chain(ost.record_history(ost.record("grad")), guard(adam())),
                "record_history stands beside spike_guard",
            )
        ],
        [ost.record_history(chain(ost.record("grad"), guard(adam())))],
    ),
    "frozen leaves in guard": Orders(
        [
            (
                guard(frozen(adam())),
                "set_to_zero for frozen leaves stands inside spike_guard",
            )
        ],
        [
            frozen(guard(adam())),
            chain(optax.freeze({"w": True, "b": False}), guard(frozen(adam()))),
            guard(optax.set_to_zero()),
        ],
    ),
    "change behind branch": Orders(
        [
            (
                chain(ost.branch_on_spike(ost.scale_by_safe_adam()), rate()),
                "scale_by_learning_rate stands behind branch_on_spike",
            )
        ],
        [
            chain(ost.branch_on_spike(adam()), ost.record("update")),
            chain(guard(ost.scale_by_safe_adam()), rate()),
        ],
    ),
    "clip behind optimizer": Orders(
        [
            (
                chain(adam(), clip()),
                "clip_by_zscore stands behind scale_by_safe_adam: it limits",
            ),
            (
                chain(contrib.muon(0.1), fixed_clip()),
                "clip_by_global_norm stands behind scale_by_muon",
            ),
            (
                chain(
                    optax.scale_by_adam(),
                    optax.conditionally_transform(clip(), lambda step: True),
                    rate(),
                ),
                "clip_by_zscore stands behind scale_by_adam",
            ),
        ],
        [
            chain(clip(), adam()),
            # Adafactor and StableAdamW limit the mean square of the update.
            chain(optax.scale_by_adam(), optax.clip_by_block_rms(1.0), rate()),
            chain(optax.sgd(0.1, momentum=0.9), fixed_clip()),
        ],
    ),
    "clip of leaves in front of Muon": Orders(
        [
            (
                chain(ost.clip_by_leaf_history(), muon()),
                "clip_by_leaf_history with a limit for each leaf stands in front of",
            )
        ],
        [
            chain(clip(), muon()),
            chain(ost.clip_by_leaf_history(), adam()),
            chain(
                ost.clip_by_threshold(ost.thresholds.constant(1.0), scope="leaf"),
                muon(),
            ),
        ],
    ),
    "clip twice": Orders(
        [
            (
                chain(fixed_clip(), ost.record("clipped"), fixed_clip(2.0), adam()),
                "clip_by_global_norm stands behind clip_by_global_norm",
            )
        ],
        [
            chain(fixed_clip(), fixed_clip(0.5), adam()),
            chain(fixed_clip(), optax.scale(10.0), fixed_clip(), optax.sgd(0.1)),
        ],
    ),
    "optimizer behind optimizer": Orders(
        [
            (
                chain(optax.scale_by_adam(), adam()),
                "scale_by_safe_adam stands behind scale_by_adam",
            )
        ],
        [optax.partition({"a": optax.adamw(0.1), "b": adam()}, "a"), optax.lamb(0.1)],
    ),
    "learning rate in front of optimizer": Orders(
        [
            (
                chain(rate(), ost.scale_by_safe_adam()),
                "scale_by_learning_rate stands in front of scale_by_safe_adam",
            ),
            (
                chain(
                    optax.scale_by_learning_rate(optax.constant_schedule(0.1)),
                    optax.scale_by_lion(),
                ),
                "scale_by_learning_rate stands in front of scale_by_lion",
            ),
        ],
        [
            chain(optax.scale(1 / 1024), adam()),
            chain(optax.scale(-1.0), adam()),  # uphill on purpose
            chain(rate(), optax.trace(0.9)),
        ],
    ),
    "two learning rates": Orders(
        [
            (
                chain(adam(), rate()),
                "scale_by_learning_rate stands behind another learning rate",
            ),
            (
                chain(adam(), optax.scale_by_learning_rate(lambda step: 0.1)),
                "scale_by_learning_rate stands behind another learning rate",
            ),
        ],
        [
            chain(adam(), optax.scale(-1.0)),  # uphill on purpose
            chain(optax.scale(-1.0), adam()),
            chain(adam(), optax.scale_by_schedule(lambda step: 0.5)),
            chain(optax.scale_by_adam(), optax.scale(1e-3), optax.scale(-1.0)),
            optax.inject_hyperparams(optax.adam)(optax.constant_schedule(0.1)),
        ],
    ),
    "decay in front of optimizer": Orders(
        [
            (
                chain(optax.add_decayed_weights(0.1), ost.scale_by_safe_adam(), rate()),
                "add_decayed_weights stands in front of scale_by_safe_adam",
            )
        ],
        [
            chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
            optax.adadelta(0.1, weight_decay=0.1),
        ],
    ),
    "decay behind learning rate": Orders(
        [
            (
                chain(ost.scale_by_safe_adam(), rate(), optax.add_decayed_weights(0.1)),
                "add_decayed_weights stands behind scale_by_learning_rate",
            )
        ],
        [
            chain(ost.scale_by_safe_adam(), optax.add_decayed_weights(0.1), rate()),
            chain(
                ost.scale_by_safe_adam(), rate(), optax.add_decayed_weights(-0.1 * 1e-3)
            ),
        ],
    ),
    "scaled leaves in front of Adam": Orders(
        [
            (
                chain(ost.scale_gradients({"w": 0.1}), adam()),
                "scale_gradients stands in front of scale_by_safe_adam",
            ),
            (
                guard(ost.scale_gradients({"w": 0.1}), adam()),
                "scale_gradients stands in front of scale_by_safe_adam",
            ),
        ],
        [
            chain(ost.scale_gradients({"w": 0.1}), clip(), adam()),
            chain(ost.scale_gradients({"w": 0.1}), guard(adam())),
            chain(ost.scale_gradients({"w": 0.1}), ost.safe_adamw(1e-3, eps=1e-8)),
            chain(ost.scale_gradients({"w": 0.0}), adam()),
            chain(ost.scale_gradients({"w": 0.1}), optax.sgd(0.1)),
        ],
    ),
    "noise scale in front of optimizer": Orders(
        [
            (
                chain(ost.scale_by_noise_scale(64), adam()),
                "scale_by_noise_scale stands in front of scale_by_safe_adam",
            )
        ],
        [chain(adam(), ost.scale_by_noise_scale(64))],
    ),
    "optimizer switched off": Orders(
        [
            (
                ost.when_noisy(chain(clip(), adam()), above=1.0),
                "scale_by_safe_adam stands inside when_noisy",
            )
        ],
        [chain(ost.when_noisy(clip(), above=1.0), adam())],
    ),
    "nothing to restart": Orders(
        [
            (
                chain(ost.restart_moments(optax.identity(), every=500), adam()),
                "restart_moments has nothing inside",
            )
        ],
        [chain(ost.restart_moments(ost.scale_by_safe_adam(), every=500), rate())],
    ),
    "restart of what should go on": Orders(
        [
            (
                ost.restart_moments(ost.safe_adamw(lambda step: 0.1), every=500),
                "scale_by_learning_rate stands inside restart_moments",
            ),
            (
                ost.restart_moments(chain(clip(), adam()), every=500),
                "clip_by_zscore stands inside restart_moments",
            ),
        ],
        [ost.restart_moments(adam(), every=500)],
    ),
    "extra arguments that stop": Orders(
        [
            (
                contrib.split_real_and_imaginary(guard(adam())),
                "spike_guard stands inside split_real_and_imaginary",
            ),
            (
                contrib.sam(guard(adam()), optax.sgd(0.1)),
                "spike_guard stands inside sam",
            ),
            (
                chain(optax.lookahead(by_microbatch(), 5, 0.5)),
                "scale_by_safe_adam stands inside lookahead",
            ),
            (
                chain(optax.MultiSteps(guard(adam()), 4).gradient_transformation()),
                "spike_guard stands inside MultiSteps, which hands no",
            ),
        ],
        [
            guard(contrib.split_real_and_imaginary(adam())),
            contrib.split_real_and_imaginary(ost.skip_spikes(adam())),
            contrib.sam(accumulated(by_microbatch()), optax.sgd(0.1)),
        ],
    ),
    "moments of one call": Orders(
        [
            (
                optax.MultiSteps(chain(ost.estimate_noise_scale(), adam()), 4),
                "estimate_noise_scale stands inside MultiSteps",
            )
        ],
        [accumulated(chain(ost.estimate_noise_scale(), adam()))],
    ),
    "no mean square": Orders(
        [
            (
                accumulated(guard(by_microbatch()), mean_square=False),
                "scale_by_safe_adam with second_moment='microbatch' stands inside",
            )
        ],
        [
            accumulated(guard(by_microbatch())),
            accumulated(guard(adam()), mean_square=False),
            guard(by_microbatch()),  # from the moments that update is given
        ],
    ),
    "accumulation twice": Orders(
        [
            (
                accumulated(accumulated(adam())),
                "accumulate_moments stands inside accumulate_moments",
            ),
            (
                optax.MultiSteps(accumulated(adam()), 4),
                "accumulate_moments stands inside MultiSteps",
            ),
        ],
        [accumulated(adam())],
    ),
    "accumulation behind optimizer": Orders(
        [
            (
                chain(adam(), accumulated(optax.identity())),
                "accumulate_moments stands behind scale_by_safe_adam",
            )
        ],
        [
            chain(clip(), accumulated(adam())),
            chain(optax.adam(0.1), optax.apply_every(4)),
        ],
    ),
    "optimizer behind accumulation": Orders(
        [
            (
                chain(accumulated(optax.identity()), adam()),
                "scale_by_safe_adam stands behind accumulate_moments",
            ),
            (
                chain(optax.apply_every(4), optax.adam(0.1)),
                "scale_by_adam stands behind apply_every",
            ),
        ],
        [accumulated(adam())],
    ),
    "decay behind accumulation": Orders(
        [
            (
                chain(
                    accumulated(ost.scale_by_safe_adam()),
                    optax.add_decayed_weights(0.1),
                    rate(),
                ),
                "add_decayed_weights stands behind accumulate_moments",
            )
        ],
        [chain(accumulated(ost.scale_by_safe_adam()), rate())],
    ),
    "history around accumulation": Orders(
        [
            (
                ost.record_history(accumulated(guard(adam()))),
                "accumulate_moments stands inside record_history",
            )
        ],
        [accumulated(ost.record_history(guard(adam())))],
    ),
    "gradient measured too late": Orders(
        [
            (
                chain(clip(), ost.record("grad"), adam()),
                "record('grad') stands behind clip_by_zscore",
            ),
            (
                chain(adam(), ost.record("grad")),
                "record('grad') stands behind scale_by_safe_adam",
            ),
        ],
        [
            chain(ost.record("grad"), clip(), ost.record("clipped"), adam()),
            chain(clip(), ost.record("grad", of="params"), adam()),
        ],
    ),
    "update measured too early": Orders(
        [
            (
                chain(ost.record("update"), adam()),
                "record('update') stands in front of scale_by_safe_adam",
            ),
            (
                chain(ost.scale_by_safe_adam(), ost.record("update"), rate()),
                "record('update') stands in front of scale_by_learning_rate",
            ),
        ],
        [
            chain(adam(), ost.record("update")),
            chain(ost.scale_by_safe_adam(), ost.record("direction"), rate()),
        ],
    ),
    "one name for two records": Orders(
        [
            (
                chain(ost.record("a"), adam(), ost.record("a")),
                "record('a') stands in the chain twice",
            )
        ],
        [
            chain(ost.record("a"), adam(), ost.record("b")),
            optax.partition({"a": ost.record("a"), "b": ost.record("a")}, "a"),
        ],
    ),
    "pairs measured too late": Orders(
        [
            (
                chain(clip(), ost.estimate_noise_scale(difference=True), adam()),
                "estimate_noise_scale with difference=True stands behind clip_by",
            ),
            (
                chain(
                    adam(),
                    ost.scale_by_noise_scale(
                        64, estimator=ost.estimate_noise_scale(difference=True)
                    ),
                ),
                "estimate_noise_scale with difference=True stands behind scale_by_safe",
            ),
        ],
        [
            chain(ost.estimate_noise_scale(difference=True), clip(), adam()),
            # The moments hold the norm of the gradient as it was.
            chain(clip(), ost.estimate_noise_scale(), adam()),
        ],
    ),
    "leaves flattened": Orders(
        [
            (
                optax.flatten(chain(ost.clip_by_leaf_history(), adam())),
                "clip_by_leaf_history stands inside flatten",
            ),
            (optax.flatten(muon()), "scale_by_muon stands inside flatten"),
        ],
        [optax.flatten(chain(clip(), adam()))],
    ),
}


def said_by(name, tx):
    """What one rule says of a chain."""
    return list(sentences(BY_NAME[name], list(places_in(Place(describe(tx))))))


def test_every_rule_has_its_orders():
    assert list(ORDERS) == list(BY_NAME)
    assert len(BY_NAME) == len(RULES)


WRONG = [(name, *each) for name, orders in ORDERS.items() for each in orders.wrong]
RIGHT = [(name, tx) for name, orders in ORDERS.items() for tx in orders.right]


def ids(cases):
    return [f"{case[0]}, {i}" for i, case in enumerate(cases)]


@pytest.mark.parametrize(("name", "tx", "start"), WRONG, ids=ids(WRONG))
def test_a_wrong_order_gets_one_sentence_of_its_rule(name, tx, start):
    (sentence,) = said_by(name, tx)
    assert sentence.startswith(start)
    assert sentence in ost.check(tx)


@pytest.mark.parametrize(("name", "tx"), RIGHT, ids=ids(RIGHT))
def test_the_right_order_gets_none(name, tx):
    assert said_by(name, tx) == []


@pytest.mark.parametrize("rule", RULES, ids=BY_NAME)
def test_a_sentence_says_what_is_wrong_and_what_to_do(rule):
    says = rule.says.format(first="A", second="B")
    fault, _, remedy = says.partition(". ")
    assert says.startswith("A ")
    assert says.endswith(".")
    assert fault
    assert remedy.startswith(("Put", "Keep", "Leave", "Give", "Replace", "Clip"))


def test_one_fault_in_the_usual_chain_is_one_sentence():
    """Weight decay and learning rate of an optimizer are not told as well."""
    tx = chain(ost.record("grad"), ost.spike_guard(clip()), adam())
    assert len(ost.check(tx)) == 1
    assert len(ost.check(chain(adam(), clip()))) == 1
    assert len(ost.check(optax.MultiSteps(guard(clip(), adam()), 4))) == 1
    assert len(ost.check(chain(accumulated(optax.identity()), adam()))) == 1


@pytest.mark.parametrize(
    "tx", [chain(optax.scale(-1.0), adam()), chain(adam(), optax.scale(-1.0))]
)
def test_to_go_uphill_is_no_fault(tx):
    assert ost.check(tx) == []


def test_several_faults_are_several_sentences():
    tx = optax.MultiSteps(guard(adam(), clip()), 4)
    said = ost.check(tx)
    assert [each.split(" ")[0] for each in said] == ["spike_guard", "clip_by_zscore"]


PAGE = Path(__file__).parents[2] / "docs" / "order.md"


def test_the_page_lists_every_rule_and_no_other():
    listed = re.findall(r"^\| ([^|`]+?) \|", PAGE.read_text(), re.M)
    assert [name for name in listed if name != "rule"] == list(BY_NAME)


def test_the_example_of_the_page_runs():
    options = doctest.NORMALIZE_WHITESPACE
    found = doctest.testfile(str(PAGE), module_relative=False, optionflags=options)
    assert found == (0, found.attempted)
    assert found.attempted == 4


def test_the_order_of_the_page_is_right():
    """The whole of it, as one chain."""
    inside = chain(
        ost.estimate_noise_scale(),
        ost.scale_gradients({"w": 0.1}),
        clip(),
        ost.scale_by_safe_adam(),
        optax.add_decayed_weights(0.1),
        rate(),
        ost.record("update"),
    )
    for guarded in (ost.spike_guard(inside), ost.branch_on_spike(inside)):
        whole = ost.record_history(chain(ost.record("grad"), guarded))
        assert ost.check(accumulated(whole)) == []
