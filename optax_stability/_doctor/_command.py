"""The command line: ``diagnose PATH…`` and ``watch PATH``.

Exit code 0: nothing found; 1: something found; 2: an input that cannot be read, with
one line that says why.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from optax_stability._core import _atomic_file
from optax_stability._diagnosis._finding import Finding
from optax_stability._doctor import _chart, _reading, _watching
from optax_stability._doctor._examination import Examination, examine
from optax_stability._doctor._log import Log, UnreadableError
from optax_stability._doctor._terminal import Style, show, show_finding
from optax_stability._report._plotting import (
    check_matplotlib,
    check_path,
    plot_history,
)

CLEAN, FOUND, UNREADABLE = 0, 1, 2
_PICTURES = (".png", ".svg", ".pdf")
_FLAGS = {
    "step": "step",
    "loss": "loss",
    "norm": "grad/norm",
    "rate": "learning_rate",
    "held_out": "eval/loss",
    "epoch": "epoch",
}
_DESCRIPTION = """Says what is wrong with a training run, from its log.

PATH is a file or a folder: JSON lines, trainer_state.json, CSV (exports of Weights &
Biases too), event files of TensorBoard, or what a trainer prints (llm.c, nanoGPT,
Megatron-LM, torchtitan, axolotl and others)."""


def _parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="optax-stability",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0 nothing found, 1 found, 2 input that cannot be read.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    diagnose = commands.add_parser("diagnose", help="examine logs")
    diagnose.add_argument("paths", nargs="*", metavar="PATH", help="file or folder")
    diagnose.add_argument("--report", metavar="FILE", help="write an HTML report")
    diagnose.add_argument("--json", action="store_true", help="print JSON")
    diagnose.add_argument(
        "--against", metavar="OTHER", help="compare with the log of another run"
    )
    diagnose.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="draw the curves here, or into FILE (png, svg, pdf)",
    )
    _add_columns(diagnose)
    watch = commands.add_parser("watch", help="follow a log that grows")
    watch.add_argument("path", metavar="PATH", help="file or folder")
    watch.add_argument(
        "--exec",
        metavar="CMD",
        dest="command_to_run",
        help="run CMD in a shell for each new finding, with it as JSON on its input",
    )
    watch.add_argument(
        "--serve", type=int, metavar="PORT", help="show the report there; 0: any port"
    )
    watch.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where --serve listens (this machine alone)",
    )
    watch.add_argument(
        "--every",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="seconds between looks",
    )
    watch.add_argument(
        "--for",
        type=_seconds,
        default=math.inf,
        metavar="S",
        dest="seconds",
        help="seconds to watch (until interrupted)",
    )
    _add_columns(watch)
    return whole


def _seconds(text: str) -> float:
    """Seconds, above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def _add_columns(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("columns, if they are not recognised")
    for flag, ours in _FLAGS.items():
        flag = f"--{flag.replace('_', '-')}"
        group.add_argument(flag, metavar="NAME", help=f"the column of {ours}")


def chosen_columns(flags: argparse.Namespace) -> dict[str, str]:
    """The columns that the user named."""
    named = {ours: getattr(flags, flag) for flag, ours in _FLAGS.items()}
    return {ours: name for ours, name in named.items() if name is not None}


def as_json(examined: Examination) -> dict[str, Any]:
    """An examination in the types of JSON."""
    log = examined.log
    return {
        "name": log.name,
        "trainer": log.trainer,
        "columns": log.columns,
        "rows": len(log.history["step"]),
        "steps": [float(log.history["step"][at]) for at in (0, -1)],
        "findings": [each._asdict() for each in examined.findings],
        "checks": [each._asdict() for each in examined.checks],
        "cannot_be_told": examined.unknown,
        "spike_score": examined.spike_score,
        "against": [
            {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in each._asdict().items()
            }
            for each in examined.partings
        ],
    }


def _style() -> Style:
    return Style(sys.stdout.isatty() and "NO_COLOR" not in os.environ)


def _write(text: str) -> None:
    sys.stdout.write(text)


def _complain(error: UnreadableError) -> None:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")


def _baseline(flags: argparse.Namespace) -> Log | None:
    if flags.against is None:
        return None
    return _reading.read(flags.against, chosen_columns(flags))[0]


def _diagnose(flags: argparse.Namespace) -> int:
    if flags.plot and not flags.plot.lower().endswith(_PICTURES):
        # ``--plot PATH``: the path is an input.
        flags.paths, flags.plot = [flags.plot, *flags.paths], ""
    if not flags.paths:
        raise UnreadableError("PATH is missing; name a file or a folder.")
    code, examined = CLEAN, []
    try:
        baseline = _baseline(flags)
    except UnreadableError as error:
        _complain(error)
        return UNREADABLE
    for path in flags.paths:
        try:
            logs = _reading.read(path, chosen_columns(flags))
            examined += [examine(log, baseline) for log in logs]
        except UnreadableError as error:
            _complain(error)
            code = UNREADABLE
    _show(flags, examined)
    found = any(each.found for each in examined)
    return code or (FOUND if found else CLEAN)


def _show(flags: argparse.Namespace, examined: list[Examination]) -> None:
    style = _style()
    if flags.json:
        logs = {"logs": [as_json(each) for each in examined]}
        _write(json.dumps(logs, indent=1, ensure_ascii=False) + "\n")
    for i, each in enumerate(examined):
        if not flags.json:
            _write(("\n" if i else "") + show(each, style))
            if flags.plot == "":
                _write(_charts(each, style))
        _write_files(flags, each, i)


def _charts(examined: Examination, style: Style) -> str:
    names = {"loss": "loss", "grad/norm": "gradient norm"}
    charts = [
        _chart.chart(name, examined.log.history, key, style.width)
        for key, name in names.items()
    ]
    return "".join(f"\n{each}" for each in charts if each)


def numbered(path: str, number: int) -> str:
    """The path for the first log; for others with their number before the suffix."""
    stem, suffix = os.path.splitext(path)
    return path if not number else f"{stem}_{number + 1}{suffix}"


def _write_files(flags: argparse.Namespace, examined: Examination, i: int) -> None:
    if flags.report:
        path = numbered(flags.report, i)
        check_matplotlib("--report")
        _atomic_file.write(check_path(path, (".html", ".htm")), examined.report())
        sys.stderr.write(f"report: {path}\n")
    if flags.plot:
        path = numbered(flags.plot, i)
        plot_history(examined.log.history, path)
        sys.stderr.write(f"plot: {path}\n")


def _watch(flags: argparse.Namespace) -> int:
    style, changed, server = _style(), None, None
    if flags.serve is not None:
        check_matplotlib("--serve")
        from optax_stability._doctor import _serving

        pages = _serving.Pages()
        server = _serving.serve(flags.serve, flags.host, pages, flags.every)
        changed = pages.renew
        host, port = server.server_address[:2]
        sys.stderr.write(f"report: http://{host}:{port}/\n")

    found = False

    def show_news(examined: Examination, new: list[Finding]) -> None:
        nonlocal found
        found |= bool(new)
        for each in new:
            _write(show_finding(each, examined.log, style))
        sys.stdout.flush()

    try:
        _watching.watch(
            flags.path,
            chosen_columns(flags),
            every=flags.every,
            seconds=flags.seconds,
            show=show_news,
            command=flags.command_to_run,
            changed=changed,
        )
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
    return FOUND if found else CLEAN


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    flags = _parser().parse_args(arguments)
    run = {"diagnose": _diagnose, "watch": _watch}[flags.command]
    try:
        return run(flags)
    except UnreadableError as error:
        _complain(error)
        return UNREADABLE
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FOUND
    except (ImportError, OSError, ValueError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return UNREADABLE
