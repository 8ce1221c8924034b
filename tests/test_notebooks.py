"""The notebooks run from the first cell to the last, and show what they say."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"

# A short run in place of the cell that is tagged "parameters".
QUICKSTART = """
STEPS, BYTES_AT, NAN_AT = 60, range(40, 43), 50
BATCH, MICROBATCHES = 8, 4
LAYERS, WIDTH, HEADS, CONTEXT = 1, 32, 2, 32
"""
QUICKSTART_SHOWS = """
assert skipped[-1] == NAN_AT, skipped
assert set(skipped) <= {*BYTES_AT, NAN_AT}, skipped
assert np.isfinite(np.delete(losses, skipped)).all()
assert losses[-5:].mean() < losses[:5].mean() - 1
assert np.isfinite(plain_losses[: NAN_AT + 1]).all()
assert np.isnan(plain_losses[NAN_AT + 1 :]).all()
assert "nonfinite" in [finding.kind for finding in ost.diagnose(history)]
"""
NOISE_SCALE = """
EXAMPLES, BATCHES, WATCHED, MICROBATCHES = 512, (8, 32), 32, 8
LAYERS, WIDTH, HEADS, CONTEXT = 1, 32, 2, 16
"""
NOISE_SCALE_SHOWS = """
assert found.steps > 3
assert (low > 0).any() and (high[known] >= scale[known]).all()
assert (low[known] <= scale[known]).all()
for seen, loss in curves.values():
    assert seen[-1] == EXAMPLES and loss[-1] < loss[0]
"""


@pytest.mark.parametrize(
    ("name", "parameters", "shows"),
    [
        ("quickstart", QUICKSTART, QUICKSTART_SHOWS),
        ("noise_scale", NOISE_SCALE, NOISE_SCALE_SHOWS),
    ],
)
def test_a_notebook_runs_and_shows_what_it_says(name, parameters, shows):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    (cell,) = (
        each for each in notebook.cells if "parameters" in each.metadata.get("tags", ())
    )
    cell.source = parameters
    notebook.cells.append(nbformat.v4.new_code_cell(shows))
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    pictures = [
        output
        for each in notebook.cells
        for output in each.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2


@pytest.mark.parametrize("name", ["quickstart", "noise_scale"])
def test_a_notebook_is_kept_with_what_it_shows_and_no_more(name):
    path = EXAMPLES / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for each in notebook.cells for output in each.get("outputs", ())]
    assert any("image/png" in each.get("data", {}) for each in outputs)
    assert not [each for each in outputs if each.get("name") == "stderr"]
    assert path.stat().st_size < 300_000
