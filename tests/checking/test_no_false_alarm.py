"""Nothing is said of any chain that optax or this repository recommends."""

import ast
import collections
import contextlib
import inspect
import json
import re
import warnings
from pathlib import Path

import accelerator_programs
import accumulation
import contenders
import diagnosis
import fault_table
import jax
import jax.numpy as jnp
import linen_train_state
import many_devices
import optax
import pytest
import real_logs
import recipes
import step_cost
import training
from config import Config
from optax import contrib
from test_contract import CASES

import optax_stability as ost

ROOT = Path(__file__).parents[2]
# A wrong order on purpose: what happens with it is what is measured.
ON_PURPOSE = {
    "apply_if_finite of it, inside": "apply_if_finite stands inside MultiSteps: one NaN"
}


def optimizers():
    """Every function of optax that makes an optimizer from a learning rate."""
    for module in (optax, contrib):
        for name, value in vars(module).items():
            if not inspect.isfunction(value) or name.startswith("scale_by_"):
                continue
            parameters = list(inspect.signature(value).parameters.values())
            needed = [each.name for each in parameters if each.default is each.empty]
            first = parameters[0].name if parameters else ""
            if first == "learning_rate" and needed in ([], ["learning_rate"]):
                yield name, value


OPTIMIZERS = dict(optimizers())


def made_with(factory, **options):
    """What a factory makes of a constant rate, and of a schedule if it takes one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield factory(1e-3, **options)
        with contextlib.suppress(TypeError, ValueError):
            yield factory(optax.constant_schedule(1e-3), **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_of_optax_is_wrong(name):
    for tx in made_with(OPTIMIZERS[name]):
        assert ost.check(tx) == []
        guarded = ost.spike_guard(optax.chain(ost.clip_by_zscore(), tx))
        assert ost.check(guarded) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_where_an_optimizer_of_optax_has_it_is_right(name):
    factory = OPTIMIZERS[name]
    if "weight_decay" in inspect.signature(factory).parameters:
        for tx in made_with(factory, weight_decay=0.1):
            assert ost.check(tx) == []


def test_the_optimizers_are_there():
    assert {"adamw", "adafactor", "lamb", "muon", "sgd"} <= set(OPTIMIZERS)


@pytest.mark.parametrize("name", CASES)
def test_no_row_of_the_contract_is_wrong(name):
    assert ost.check(CASES[name].make()) == []


TABLES = {
    module.__name__: table
    for module, table in [
        (accelerator_programs, accelerator_programs.OPTIMIZERS),
        (contenders, contenders.PEERS | contenders.PARTS | contenders.BRANCHES),
        (fault_table, fault_table.RULES),
        (many_devices, many_devices.SIDES | many_devices.STATES),
        (real_logs, real_logs.RULES),
    ]
}
TABLES["contenders, accumulation"] = contenders.ACCUMULATORS
TABLES["functions"] = {
    f"{function.__module__}.{function.__name__}": function
    for function in [
        accumulation.multi_steps,
        accumulation.with_squares,
        accumulation.with_adamw,
        accumulation.without_squares,
        contenders.clipped,
        contenders.fixed_clip,
        step_cost.guarded_chain,
        step_cost.norms_recorded,
        step_cost.norms_recorded_alone,
        step_cost.stability_chain,
    ]
}
MADE = {
    f"{table}: {name}": make
    for table, rows in TABLES.items()
    for name, make in rows.items()
}


@pytest.mark.parametrize("name", MADE)
def test_no_chain_of_a_benchmark_is_wrong(name):
    said = ost.check(MADE[name]())
    expected = ON_PURPOSE.get(name.split(": ")[1])
    if expected:
        (sentence,) = said
        assert sentence.startswith(expected)
    else:
        assert said == []


@pytest.mark.parametrize("run", diagnosis.RUNS, ids=str)
def test_no_chain_of_the_runs_to_diagnose_is_wrong(run):
    assert ost.check(diagnosis.optimizer_of(diagnosis.RUNS[run])) == []


CONFIGS = {
    "default": Config(),
    "baseline": Config(baseline=True),
    "branch": Config(on_spike="branch"),
    "rewind": Config(on_spike="rewind"),
    "after warm-up": Config(clip_after_warmup=True),
    "when noisy": Config(clip_when_noisy=1000.0),
    "faults": Config(inject=("surge=30@20x5",)),
    "histograms": Config(histogram_every=10),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_chain_of_the_trainer_is_wrong(name):
    assert ost.check(training.make_optimizer(CONFIGS[name])) == []


MAJORITY = ost.thresholds.window_median(3.0)
RECIPES = {
    "clip_after_warmup": lambda: recipes.clip_after_warmup(ost.clip_by_zscore(), 10),
    "unit_wise_agc": recipes.unit_wise_agc,
    "unit_wise_agc, guarded": lambda: ost.spike_guard(
        optax.chain(recipes.unit_wise_agc(), ost.safe_adamw(1e-3))
    ),
    "adagc": lambda: optax.chain(recipes.adagc(), ost.safe_adamw(1e-3)),
    "lower_after_spike": lambda: recipes.lower_after_spike(
        optax.chain(ost.clip_by_zscore(), ost.safe_adamw(1e-3)), MAJORITY
    ),
    "linen": lambda: linen_train_state.make_tx(300),
}


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_is_wrong(name):
    assert ost.check(RECIPES[name]()) == []


class Names(dict):
    """Names of a page; one that is not known is a learning rate."""

    def __missing__(self, name):
        """The learning rate."""
        return 1e-3


def chains_of(code):
    """The transformations that a text of Python assigns to names."""
    names = Names(optax=optax, ost=ost, jax=jax, jnp=jnp, contrib=contrib)
    names |= {name: getattr(ost, name) for name in ost.__all__}
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Assign | ast.Return) or node.value is None:
            continue
        expression = compile(ast.Expression(node.value), "page", "eval")
        try:
            made = eval(expression, {}, names)
        except Exception:  # An expression that needs what only a run has.
            continue
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = made
        if isinstance(made, optax.GradientTransformation | optax.MultiSteps):
            yield ast.unparse(node), made


def cells_of(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return "\n".join(re.sub(r"^ *%.*$", "    pass", each, flags=re.M) for each in code)


def examples_in(text):
    """The Python after ``>>>`` in a page or a docstring."""
    lines = re.findall(r"^ *(?:>>>|\.\.\.) ?(.*)$", text, re.M)
    return "\n".join(lines)


def blocks_of(page):
    """Examples and blocks of Python of a page."""
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    plain = [each for each in blocks if ">>>" not in each]
    return [examples_in(text), *plain]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {
    **{str(page.relative_to(ROOT)): blocks_of(page) for page in PAGES},
    **{
        str(path.relative_to(ROOT)): [cells_of(path)]
        for path in sorted((ROOT / "examples").glob("*.ipynb"))
    },
    **{
        name: [examples_in(inspect.getdoc(getattr(ost, name)) or "")]
        for name in ost.__all__
        if name != "check"  # which shows a wrong order
    },
}


def test_no_chain_on_a_page_or_in_a_docstring_is_wrong():
    found = collections.Counter()
    for place, blocks in TEXTS.items():
        for code in blocks:
            for text, tx in chains_of(code):
                assert ost.check(tx) == [], f"{place}: {text}"
                found[place] += 1
    # As many as there were when this was written, so that none is lost unseen.
    assert found["examples/quickstart.ipynb"] >= 2
    assert found["examples/noise_scale.ipynb"] >= 1
    assert found["README.md"] >= 1
    assert found["docs/start/which.md"] >= 3
    assert found["docs/guides/spikes.md"] >= 2
    assert found.total() >= 20
