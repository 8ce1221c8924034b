"""Uses the installed package as a user would: one step, one report, the doctor.

Run from an empty folder, in an environment with the wheel and without the clone.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import optax_stability as ost

assert "site-packages" in ost.__file__, ost.__file__

# One step, on a NaN: it is left out.
params = {"w": jnp.ones(3)}
tx = ost.record_history(ost.spike_guard(ost.safe_adamw(1e-2)))
state = tx.init(params)
bad = {"w": jnp.full(3, jnp.nan)}
updates, state = jax.jit(tx.update)(bad, state, params, value=2.0)
assert not updates["w"].any()
assert ost.metrics(state)["skip/skipped"]

# One report.
rng = np.random.default_rng(0)
losses = 2 + rng.normal(size=200) / 50 + 3 * np.exp(-np.arange(200) / 20)
losses[150:155] += 4
ost.write_report({"step": np.arange(200), "loss": losses}, "report.html")
assert "loss spiked" in Path("report.html").read_text()

# The doctor: as a command, and as a module. Exit code 1: something was found.
rows = [json.dumps({"step": i, "loss": x}) for i, x in enumerate(losses.tolist())]
Path("log.jsonl").write_text("\n".join(rows))
command = Path(sys.executable).with_name("optax-stability")
for doctor in ([command], [sys.executable, "-m", "optax_stability"]):
    said = subprocess.run(
        [*doctor, "diagnose", "log.jsonl"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 1, said
    assert "loss_spike" in said.stdout or "spiked" in said.stdout, said.stdout
