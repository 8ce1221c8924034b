"""What the README shows works as it stands there, before and after."""

import re
import tomllib
from pathlib import Path

import accelerator_programs
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
import reporting
import trainer_step
from flax import nnx

import optax_stability as ost

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BATCH = jnp.ones((2, 4))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


(PASTE,) = blocks("python")
PLAIN, NNX, LINEN = blocks("diff")


def side(block, sign):
    """A ``diff`` before ("-") or after ("+") the change."""
    lines = [line for line in block.splitlines() if line[:1] in ("", " ", sign)]
    return "\n".join(line[1:] for line in lines)


def chain(sign):
    """What the README says to paste, and what it says that it replaces."""
    given = {}
    exec(PASTE, given)
    given["tx"] = {
        "-": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4)),
        "+": given["tx"],
    }[sign]
    return given


def square(w, batch):
    return jnp.mean((batch @ w) ** 2)


def take_plain_step(given, batch):
    given |= {"jax": jax, "loss_fn": lambda params, batch: square(params["w"], batch)}
    exec(side(PLAIN, given["sign"]), given)
    params = {"w": jnp.ones((4, 1))}
    params, state, _ = given["step"](params, given["tx"].init(params), batch)
    return params["w"], state


def take_nnx_step(given, batch):
    def loss_fn(model, batch):
        return jnp.mean(model(batch) ** 2)

    model = nnx.Linear(4, 1, use_bias=False, rngs=nnx.Rngs(0))
    given |= {"nnx": nnx, "model": model, "loss_fn": loss_fn}
    exec(side(NNX, given["sign"]), given)
    given["step"](model, given["optimizer"], batch)
    return model.kernel[...], given["optimizer"]


def take_linen_step(given, batch):
    def loss_fn(params, batch):
        return jnp.mean(model.apply(params, batch) ** 2)

    model = nn.Dense(1, use_bias=False)
    params = model.init(jax.random.key(0), jnp.ones_like(batch))
    given |= {"jax": jax, "model": model, "params": params, "loss_fn": loss_fn}
    exec(side(LINEN, given["sign"]), given)
    state, _ = given["step"](given["state"], batch)
    return state.params["params"]["kernel"], state


STEPS = [take_plain_step, take_nnx_step, take_linen_step]


@pytest.mark.parametrize("take_step", STEPS)
def test_a_step_survives_a_nan_after_the_change_and_not_before(take_step):
    bad = BATCH.at[0, 0].set(jnp.nan)
    before, _ = take_step({"sign": "-"} | chain("-"), bad)
    after, state = take_step({"sign": "+"} | chain("+"), bad)
    assert jnp.isnan(before).any()
    assert jnp.isfinite(after).all()
    assert ost.metrics(state)["skip/skipped"]


@pytest.mark.parametrize("take_step", STEPS)
def test_a_step_trains_before_and_after_the_change(take_step):
    for sign in "-+":
        given = {"sign": sign} | chain(sign)
        once, _ = take_step(given, BATCH)
        assert jnp.isfinite(once).all()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


def test_the_right_chain_is_on_the_first_two_screens():
    assert README[: README.index(PASTE)].count("\n") < 60


def test_the_readme_quotes_what_was_measured():
    cases = reporting.read("trainer_step")["cases"]
    (rows,) = cases.values()
    ratio = rows[trainer_step.OURS]["time_ratio"]["median"]
    words = " ".join(README.split())
    assert f"takes {ratio:.2f} times as long" in words
    before = reporting.devices_with("trainer_step")["nvidia_h100_80gb_hbm3"]["cases"]
    (gpt2,) = [rows for title, rows in before.items() if "gpt2" in title]
    ratio = gpt2[trainer_step.OURS]["time_ratio"]["median"]
    assert f"a GPT-2 took {ratio:.2f} times as long on an H100" in words


def test_the_readme_quotes_what_was_counted():
    def ratios(key, targets=""):
        steps = reporting.read("accelerator_programs")["step"]
        rows = [rows for title, rows in steps.items() if targets in title]
        names = accelerator_programs.ORDINARY, accelerator_programs.PLAIN
        found = [[row[name][key] for name in names] for row in rows]
        return sorted(ours / plain for ours, plain in found)

    least, *_, most = ratios("bytes")
    fewest, *_, largest = ratios("kernels", "H100")
    words = " ".join(README.split())
    assert f"moves {least:.2f} to {most:.2f} times as many bytes" in words
    assert f"in {fewest:.2f} to {largest:.2f} times as many kernels" in words


def test_the_readme_names_the_versions_that_the_package_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    for requirement in (*project["dependencies"], *optional["flax"]):
        assert requirement.replace(">=", " ≥ ") in " ".join(README.split())
