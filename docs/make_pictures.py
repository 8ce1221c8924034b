"""Makes the pictures of ``examples/docs`` from the present code.

    python docs/make_pictures.py                     # all: 15 minutes of two cores
    python docs/make_pictures.py compare linen       # these
    python docs/make_pictures.py compare --runs DIR  # draws the runs there, if they are

Each is made by the command that the gallery gives for it; the notebooks are executed
and stored with their output. The pictures of a page need ``chromium``. Beside them,
``pictures.json`` keeps a fingerprint of the files that draw each; a test says which
pictures are older than these.
"""

import argparse
import base64
import functools
import hashlib
import importlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "docs"
FINGERPRINTS = FOLDER / "pictures.json"
_SHEET = ROOT / "optax_stability" / "report.mplstyle"
_REPORT = ROOT / "optax_stability" / "_report"
_FAULTS = ("--inject", "bytes@150x5", "surge=30@220x20", "nan@350")
_SIDES = ("--inject", "bytes@150x20", "--sides", "skip", "branch", "rewind", "plain")
_PAGE_WIDTH = 1100
PNG = "image/png"
_COLOURS = 128  # of a picture: a third of the bytes, and the same to the eye


def _run(folder: Path, script: str, *flags: str) -> None:
    """Runs a script of the examples in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "examples" / script), *flags]
    subprocess.run(command, cwd=folder, check=True)


def _light(content: bytes) -> bytes:
    """The same picture in few bytes: each is kept in the repository for good."""
    from PIL import Image

    file, picture = io.BytesIO(), Image.open(io.BytesIO(content)).convert("RGB")
    # The method by which rare colours, those of small marks, are not lost.
    method = Image.Quantize.MAXCOVERAGE
    few = picture.quantize(_COLOURS, method, dither=Image.Dither.NONE)
    few.save(file, format="png", optimize=True)
    return file.getvalue()


def _compared(runs: Path, *, name: str, flags: tuple[str, ...]) -> bytes:
    """The picture of ``compare.py``."""
    _run(runs / name, "compare.py", *flags)
    return (runs / name / "runs" / "compare" / "compare.png").read_bytes()


def _training(runs: Path) -> bytes:
    _run(runs / "gpt", "gpt/train.py")
    return (runs / "gpt" / "runs" / "gpt" / "training.png").read_bytes()


def _lora(runs: Path) -> bytes:
    """The picture of the fine-tuning of the run above."""
    _training(runs)
    _run(runs / "gpt", "lora_finetune.py")
    return (runs / "gpt" / "runs" / "lora" / "training.png").read_bytes()


def _linen(runs: Path) -> bytes:
    _run(runs / "linen", "linen_train_state.py")
    return (runs / "linen" / "runs" / "linen" / "linen.png").read_bytes()


def _notebook(runs: Path, *, name: str, which: int) -> bytes:
    """A picture of a notebook, which is executed and stored."""
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "examples" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    runs.mkdir(parents=True, exist_ok=True)
    where = {"metadata": {"path": str(runs)}}
    metadata = notebook.metadata.copy()
    NotebookClient(notebook, timeout=None, resources=where).execute()
    notebook.metadata = metadata
    outputs = []
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # When it was executed.
        if "outputs" in cell:
            cell.outputs = [each for each in cell.outputs if not _is_progress(each)]
            outputs += [each for each in cell.outputs if PNG in each.get("data", {})]
    for output in outputs:
        content = base64.b64decode(output.data[PNG])
        output.data[PNG] = base64.b64encode(_light(content)).decode()
    nbformat.write(notebook, path)
    return base64.b64decode(outputs[which].data[PNG])


def _is_progress(output: Any) -> bool:
    """Whether it is a bar of tqdm, which a stored notebook does not show."""
    widget = "application/vnd.jupyter.widget-view+json"
    return output.get("name") == "stderr" or widget in output.get("data", {})


def _qk_norm(runs: Path) -> bytes:
    """The picture of the stored results of ``benchmarks/attention_saturation.py``."""
    del runs
    study = importlib.import_module("attention_saturation")
    reporting = importlib.import_module("reporting")
    results = json.loads(reporting.path_of("cpu").read_text())
    return study.picture(results["attention_saturation"])


def _page(runs: Path, *, figures: int) -> bytes:
    """The page of a report down to this many figures, as a browser shows it."""
    path = runs / "report.html"
    if not path.exists():
        study = importlib.import_module("diagnosis")
        name = "every fifth batch corrupted, guarded"
        runs.mkdir(parents=True, exist_ok=True)
        ost = importlib.import_module("optax_stability")
        ost.write_report(study.train(study.RUNS[name]), path, title=name.capitalize())
    rest = f"figure:nth-of-type(n+{figures + 1}), section:not(:has(.finding, figure))"
    page = path.read_text() + f"<style>{rest}, footer {{ display: none }}</style>"
    return _shot(page, runs)


def _shot(page: str, folder: Path) -> bytes:
    """A page as a browser shows it, without the empty space below."""
    import matplotlib.image
    import numpy as np

    source, target = folder / "page.html", folder / "page.png"
    source.write_text(page)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
    browser += ["--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"]
    browser += [f"--window-size={_PAGE_WIDTH},4000", f"--screenshot={target}"]
    subprocess.run([*browser, source.as_uri()], check=True, capture_output=True)
    pixels = matplotlib.image.imread(target)
    written = np.flatnonzero((pixels != pixels[-1, 0]).any(axis=(1, 2)))
    file = io.BytesIO()
    matplotlib.image.imsave(file, pixels[: written[-1] + 40])
    return file.getvalue()


class Picture(NamedTuple):
    """A picture.

    Attributes:
      make: from the folder for the runs to the content of the file.
      drawn_by: the files whose change makes it old: what draws, not what trains.
    """

    make: Callable[[Path], bytes]
    drawn_by: tuple[Path, ...]


_PANELS = (*sorted((_REPORT / "_drawing").glob("*.py")), _SHEET)
_COMPARISON = (ROOT / "examples" / "drawing.py", _SHEET)
_PAGE = (*sorted(_REPORT.glob("*.py")), *_PANELS)
PICTURES = {
    "compare": Picture(
        functools.partial(
            _compared, name="compare", flags=("--steps", "400", *_FAULTS)
        ),
        _COMPARISON,
    ),
    "branch": Picture(
        functools.partial(_compared, name="branch", flags=("--steps", "300", *_SIDES)),
        _COMPARISON,
    ),
    "training": Picture(_training, _PANELS),
    "lora": Picture(_lora, _PANELS),
    "linen": Picture(_linen, _PANELS),
    "quickstart": Picture(
        functools.partial(_notebook, name="quickstart", which=0),
        (ROOT / "examples" / "quickstart.ipynb", *_PANELS),
    ),
    "noise_scale": Picture(
        functools.partial(_notebook, name="noise_scale", which=-1),
        (ROOT / "examples" / "noise_scale.ipynb", _SHEET),
    ),
    "qk_norm": Picture(
        _qk_norm, (ROOT / "benchmarks" / "attention_saturation.py", _SHEET)
    ),
    "report": Picture(functools.partial(_page, figures=3), _PAGE),
    "report_top": Picture(functools.partial(_page, figures=2), _PAGE),
}


def _content(path: Path) -> bytes:
    """What a file draws with; of a notebook its code, not its output."""
    if path.suffix != ".ipynb":
        return path.read_bytes()
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return "\n".join(code).encode()


def fingerprint(name: str) -> str:
    """Of all that draws a picture."""
    content = b"".join(map(_content, PICTURES[name].drawn_by))
    return hashlib.sha256(content).hexdigest()[:16]


def stored() -> dict[str, str]:
    """The fingerprint of each picture, when it was made."""
    return json.loads(FINGERPRINTS.read_text()) if FINGERPRINTS.exists() else {}


def make(name: str, runs: Path) -> None:
    """Makes a picture, and keeps its fingerprint."""
    start = time.monotonic()
    content = PICTURES[name].make(runs)
    (FOLDER / f"{name}.png").write_bytes(_light(content))
    found = stored() | {name: fingerprint(name)}
    found = {each: found[each] for each in sorted(found) if each in PICTURES}
    FINGERPRINTS.write_text(json.dumps(found, indent=1) + "\n")
    sys.stderr.write(f"{name}.png, {time.monotonic() - start:.0f} s\n")


def main() -> None:
    """Makes the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description="Makes the pictures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--runs", type=Path, help="folder of the runs, to be kept")
    flags = parser.parse_args()
    unknown = [name for name in flags.names if name not in PICTURES]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PICTURES)}")
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "gpt")]
    with tempfile.TemporaryDirectory() as folder:
        for name in flags.names or PICTURES:
            make(name, (flags.runs or Path(folder)).resolve())


if __name__ == "__main__":
    main()
