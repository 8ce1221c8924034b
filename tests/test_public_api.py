"""Exports, README, cheat sheet and docstrings agree."""

import inspect
import re
from pathlib import Path

import pytest

import optax_stability as ost
from optax_stability import faults as ost_faults
from optax_stability import flax as ost_flax
from optax_stability import loop as ost_loop
from optax_stability import orbax as ost_orbax
from optax_stability import tensorboard as ost_tensorboard

ROOT = Path(__file__).parents[1]
CHEAT_SHEET = (ROOT / "docs" / "start" / "cheat_sheet.md").read_text()


def exports(module):
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith("optax_stability")
    }


# The public names from before the private modules were moved into packages.
PUBLIC_NAMES = {
    ost: """
        AccumulateMomentsState AttentionHeads BatchSizeSchedule
        BranchOnSpikeState ClipAttentionLogitsState ClipByThresholdState
        Decision EstimateNoiseScaleState Finding FindingAlert Moments NoiseScale
        RecordExtraState RecordHistoryState RecordLogitBoundState RecordState
        RestartMomentsState RewindPolicy RunLog SafeAdamState
        ScaleByNoiseScaleState SignMoments SkipSpikesState StopRequest WhenNoisyState
        accumulate_moments adopt_state attention_logit_bound batch_efficiency
        batch_size_schedule branch_on_spike check clip_attention_logits
        clip_by_leaf_history clip_by_quantile clip_by_threshold clip_by_zscore
        critical_batch_range diagnose estimate_noise_scale eval_params
        faults find_damage flax flush from_optax_adam_state has_updated histogram_edges
        history leaf_names loop loss_probe metrics microbatch_gradients noise_scale
        orbax penalize_gradient_norm plot_history probed read_log record
        record_extra record_history record_logit_bound restart_moments
        safe_adamw scale_by_noise_scale scale_by_safe_adam scale_gradients
        scale_learning_rate skip_spikes spike_guard tensorboard thresholds
        to_optax_adam_state verify_step when_noisy with_loss_probe
        write_checksums write_report
    """,
    ost.thresholds: """
        AtMostMedianState DetrendedMadState EmaRatioState RelearnState Threshold
        WindowState ZScoreState at_most_median constant detrended_mad ema_ratio relearn
        window_median window_quantile window_zscore zscore
    """,
    ost_flax: """
        Embed LayerNorm Linear NormTap RMSNorm TrainState microbatch_gradients
        penalize_gradient_norm per_example_gradients update_dynamic_scale
    """,
    ost_orbax: "Checkpoints select_checkpoints",
    ost_loop: """
        DivergedError Drawn FailedError NotSavedError Run Schedule TrainingLoop Window
        Writer
    """,
    ost_faults: """
        Fault FaultInjector parse_faults scale_by_surge with_gradient_factor
    """,
    ost_tensorboard: "TensorBoardLog",
}
MODULES = list(PUBLIC_NAMES)

NAMES = exports(ost)
NAMES |= {f"thresholds.{name}": f for name, f in exports(ost.thresholds).items()}
NAMES |= {f"flax.{name}": f for name, f in exports(ost_flax).items()}
NAMES |= {f"orbax.{name}": f for name, f in exports(ost_orbax).items()}
NAMES |= {f"loop.{name}": f for name, f in exports(ost_loop).items()}
NAMES |= {f"faults.{name}": f for name, f in exports(ost_faults).items()}
NAMES |= {f"tensorboard.{name}": f for name, f in exports(ost_tensorboard).items()}
FUNCTIONS = {name: f for name, f in NAMES.items() if inspect.isfunction(f)}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_lists_every_export_once(module):
    functions_and_classes = [
        name for name in module.__all__ if not inspect.ismodule(getattr(module, name))
    ]
    assert functions_and_classes == sorted(exports(module))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_public_names_are_unchanged(module):
    names = [name for name in dir(module) if not name.startswith("_")]
    known = PUBLIC_NAMES[module].split()
    changed = sorted({*names} ^ {*known})
    assert names == known, f"{changed}: add what is new to PUBLIC_NAMES, by intent"


def table_names():
    """The functions in the second column of the cheat sheet."""
    rows = [line for line in CHEAT_SHEET.splitlines() if line[:1] == "|"]
    cells = [line.split("|")[2] for line in rows][2:]
    return set(re.findall(r"`([a-z_.]+)[^`]*`", " ".join(cells)))


def test_the_cheat_sheet_lists_every_function_and_no_other():
    changed = sorted(table_names() ^ set(FUNCTIONS))
    assert not changed, f"{changed}: add what is new to docs/start/cheat_sheet.md"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_export_has_a_docstring(name):
    assert inspect.getdoc(NAMES[name])


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_docstrings_name_exactly_the_arguments_there_are(name):
    arguments = inspect.getdoc(FUNCTIONS[name]).partition("\nArgs:\n")[2]
    arguments = re.split(r"\n\S", arguments)[0]
    documented = re.findall(r"^  (\w+): ", arguments, re.MULTILINE)
    assert documented == list(inspect.signature(FUNCTIONS[name]).parameters)


def test_the_readme_spells_the_two_commands_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    readme = (ROOT / "README.md").read_text()
    for command in (
        'pip install -e ".[examples]" && python examples/gpt/train.py',
        'pip install -e ".[test]" && pytest',
    ):
        assert command in readme
        assert command in ci


def test_the_version_is_that_of_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{ost.__version__}"' in pyproject
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {ost.__version__}" in changelog
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {ost.__version__}\n" in citation
