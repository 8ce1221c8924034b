"""The notebooks run from the first cell to the last, and show what their text says."""

from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from tiers import full, long_run

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ["quickstart", "noise_scale"]
LARGEST = 250_000  # bytes: what a notebook may weigh in the repository
# Each in place of the cell tagged "parameters", for a short run.
SHORT = {
    "quickstart": """
        STEPS, RANDOM_BYTES, NAN_AT = 80, range(50, 55), 70
        LAYERS, WIDTH, HEADS, CONTEXT = 1, 32, 2, 32
        BATCH, MICROBATCHES = 8, 4
        LEARNING_RATE, WARMUP = 1e-2, 10
        LOG_EVERY = 5
    """,
    "noise_scale": """
        BATCH_SIZES = (2, 8)
        EXAMPLES, CHUNK = 512, 64
        LAYERS, WIDTH, HEADS, CONTEXT = 1, 32, 2, 16
        LEARNING_RATE, WARMUP = 5e-3, 64
    """,
}
# Each after the last cell.
CHECKS = {
    "quickstart": """
        assert our_skips.tolist() == [*RANDOM_BYTES, NAN_AT], our_skips
        assert np.isfinite(our_losses).all()
        assert np.isfinite(plain_losses[: NAN_AT + 1]).all()
        assert np.isnan(plain_losses[NAN_AT + 1 :]).all()
        assert np.isfinite(whole_losses).all()
        assert our_losses[-5:].mean() < our_losses[:5].mean() - 1
        kinds = {finding.kind: finding.step for finding in ost.diagnose(history)}
        assert kinds["nonfinite"] == NAN_AT
        assert kinds["loss_spike"] == RANDOM_BYTES[0]
        assert np.isnan(relative[:, NAN_AT // LOG_EVERY]).all()
        spike = relative[:, RANDOM_BYTES[0] // LOG_EVERY]
        assert (spike > 0).all()
    """,
    "noise_scale": """
        for size, run in runs.items():
            known = run["valid"].astype(bool)
            assert known.any()
            low, middle, high = (run[k][known] for k in ("low", "b_simple", "high"))
            assert ((0 <= low) & (low <= middle) & (middle <= high)).all()
            assert (0 < low[-1]) & np.isfinite(high).all()
            assert (run["b_simple"][~known] == 0).all()
            assert run["held_out"][-1] < run["held_out"][0] - 0.5
            # Nothing is worth more than in tiny batches.
            assert (worth(size, run) <= seen).all()
            assert needed[size] <= EXAMPLES
        assert learning_rate(8) == 2 * learning_rate(2) == 2 * LEARNING_RATE
    """,
}


def code(text):
    return "\n".join(line[8:] for line in text.splitlines()).strip()


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("name", NAMES)
@full
@long_run
def test_a_notebook_runs_and_shows_what_its_text_says(name, tmp_path):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    stored = len(pictures(notebook))
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    )
    parameters.source = code(SHORT[name])
    notebook.cells.append(nbformat.v4.new_code_cell(code(CHECKS[name])))
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, resources=where).execute()
    assert len(pictures(notebook)) == stored
    # Warnings and errors are for stderr.
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output.text


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_is_light_and_shows_its_pictures(name):
    path = EXAMPLES / f"{name}.ipynb"
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(pictures(notebook)) >= 2
    numbers = [cell.execution_count for cell in notebook.cells if "outputs" in cell]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize(
    ("source", "in_a_clone", "installs"),
    [
        ("", True, "optax_stability[flax,plot] @ file://{clone}"),
        ("", False, "optax_stability[flax,plot]"),
        ("git+https://o/r", True, "optax_stability[flax,plot] @ git+https://o/r"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_installs_what_can_be_installed(
    name, source, in_a_clone, installs, tmp_path, monkeypatch
):
    clone = tmp_path / "clone"
    (clone / "examples").mkdir(parents=True)
    if in_a_clone:
        (clone / "optax_stability").mkdir()
    monkeypatch.chdir(clone / "examples")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    installed = []
    shell = InteractiveShell()
    shell.register_magic_function(installed.append, magic_name="pip")
    shell.run_cell(first.source.replace('SOURCE = ""', f'SOURCE = "{source}"'))
    package = installs.format(clone=clone)
    assert installed == [f'install -q "{package}" tqdm']
