"""A command is told what the diagnosis finds while a run goes on."""

import json

import alerts
import numpy as np


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
    with alerts.OnFinding(f'cat >> "{told}"') as writer:
        for step, row in rows(200):
            writer.write(step, row)
    assert not told.exists()


def test_a_row_without_a_measurement_is_no_nan(tmp_path):
    told = tmp_path / "told"
    with alerts.OnFinding(f'cat >> "{told}"') as writer:
        for step, row in rows(100):
            writer.write(step, row)
            if step == 60:
                writer.write(step, {"rewind/to": 50, "batch": 70})
                writer.write(step, {"eval/loss": 2.1})
    assert not told.exists()


def test_a_finding_is_told_at_once_and_once(tmp_path):
    told = tmp_path / "told"
    command = f'cat >> "{told}"; echo "$FINDING_KIND $FINDING_STEP" >> "{told}"'
    with alerts.OnFinding(command) as writer:
        for step, row in rows(120, broken=70):
            writer.write(step, row)
            assert told.exists() == (step >= 70)
    message, named = told.read_text().splitlines()
    assert json.loads(message)["kind"] == "nonfinite"
    assert named == "nonfinite 70"


def test_a_command_that_fails_does_not_end_the_run(capsys):
    with alerts.OnFinding("exit 3") as writer:
        for step, row in rows(60, broken=30):
            writer.write(step, row)
    assert "--on-finding" in capsys.readouterr().err


def test_without_a_command_there_is_no_writer():
    assert alerts.on_finding(None) == []
    assert len(alerts.on_finding("true")) == 1
