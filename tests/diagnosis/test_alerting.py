"""A command is told what the diagnosis finds while a run goes on."""

import contextlib
import json

import numpy as np
import pytest

import optax_stability as ost


def rows(count, broken=None):
    rng = np.random.default_rng(0)
    for step in range(count):
        loss = 2 + 3 * np.exp(-step / 30) + 0.02 * rng.standard_normal()
        dead = step == broken
        yield (
            step,
            {"loss": np.nan if dead else loss, "grad/norm": np.nan if dead else 1},
        )


def test_a_healthy_run_tells_nothing(tmp_path):
    told = tmp_path / "told"
    with contextlib.closing(ost.FindingAlert(f'cat >> "{told}"')) as alert:
        for step, row in rows(200):
            alert.write(step, row | {"histogram": np.ones(3), "origin": "a file"})
    assert not told.exists()


def test_a_row_without_a_measurement_is_no_nan(tmp_path):
    told = tmp_path / "told"
    with contextlib.closing(ost.FindingAlert(f'cat >> "{told}"')) as alert:
        for step, row in rows(100):
            alert.write(step, row)
            if step == 60:
                alert.write(step, {"rewind/to": 50, "batch": 70})
                alert.write(step, {"eval/loss": 2.1})
    assert not told.exists()


def test_a_finding_is_told_at_once_and_once(tmp_path):
    told = tmp_path / "told"
    command = f'cat >> "{told}"; echo "$FINDING_KIND $FINDING_STEP" >> "{told}"'
    with contextlib.closing(ost.FindingAlert(command)) as alert:
        for step, row in rows(120, broken=70):
            alert.write(step, row)
            assert told.exists() == (step >= 70)
    message, named = told.read_text().splitlines()
    assert json.loads(message)["kind"] == "nonfinite"
    assert named == "nonfinite 70"


def test_what_is_not_urgent_is_told_within_so_many_rows_or_at_the_end(tmp_path):
    for count, seen_at in ((80, 60), (55, None)):
        told = tmp_path / f"told_{count}"
        alert, first = ost.FindingAlert(f'cat >> "{told}"', every=30), None
        for step, row in rows(count):
            # The loss rises for good at step 45.
            alert.write(step, row if step < 45 else row | {"loss": 9.0 + step / 100})
            first = len(alert._rows) if first is None and told.exists() else first
        assert first == seen_at
        alert.close()
        assert json.loads(told.read_text().splitlines()[0])["step"] >= 40


def test_a_command_that_fails_is_reported_and_does_not_end_the_run():
    said = []
    alert = ost.FindingAlert("exit 3", report=said.append)
    for step, row in rows(60, broken=30):
        alert.write(step, row)
    assert said == ["'exit 3' failed with exit code 3; the run goes on"]
    with pytest.warns(UserWarning, match="failed with exit code 3"):
        ost.FindingAlert("exit 3").write(0, {"loss": np.nan, "grad/norm": 1.0})


def test_without_rows_there_is_nothing_to_tell():
    ost.FindingAlert("exit 1").close()
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        ost.FindingAlert("true", every=0)
