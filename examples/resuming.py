"""Decides whether a command may use, or resume the run in, its output folder.

A run resumes, or is new, or there is an error: no run restarts silently, and no two
processes write to one folder.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import console
import devices
from inputs import InputError, Resume, flag

import optax_stability as ost
from optax_stability.loop import Writer
from optax_stability.orbax import Checkpoints
from optax_stability.tensorboard import TensorBoardLog

Progress = dict[str, Any]


def as_json(config: Any) -> dict[str, Any]:
    """The fields of a dataclass, as JSON values for a checkpoint."""

    def plain(value):
        if isinstance(value, Path):
            return str(value.resolve())
        return list(value) if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def _logs(out: Path, newest: Progress | None, on_finding: str | None) -> list[Any]:
    """What receives the rows of a run, and can be closed."""
    step, batch = (newest[key] if newest else None for key in ("step", "batch"))
    logs: list[Any] = [
        ost.RunLog(out / "log.jsonl", resume_after=batch, report=console.warn),
        TensorBoardLog(out / "tensorboard", resume_after=step),
    ]
    if on_finding:
        logs.append(ost.FindingAlert(on_finding, report=console.warn))
    return logs


@contextlib.contextmanager
def open_folder(
    out: Path,
    about: dict[str, Any],
    check: Callable[[Path, dict[str, Any], Progress | None], None],
    keep: int,
    on_finding: str | None = None,
) -> Iterator[tuple[Checkpoints, Progress | None, list[Writer]]]:
    """Opens the output folder of a run; only the first process writes a log.

    Args:
      out: the folder.
      about: what identifies the run.
      check: raises if the run in the folder is another; see :func:`check_resume`.
      keep: how many checkpoints to keep.
      on_finding: a command to run for each new finding.

    Yields:
      Its checkpoints, the progress of the newest that is whole (None for a new run),
      and its logs.

    Raises:
      InputError: the folder cannot be used.
    """
    with contextlib.ExitStack() as stack:
        try:
            saved = Checkpoints(out / "checkpoints", keep, report=console.warn)
            stack.enter_context(saved)
            newest = saved.newest()
            if newest is None and saved.damaged:
                problem = f"no checkpoint in {out} is whole; they are in {saved.aside}"
                raise InputError(f"--out: {problem}; give another --out to start anew")
            check(out, about, newest)
            logs = _logs(out, newest, on_finding) if devices.is_first() else []
        except BlockingIOError as error:
            problem = f"another process is training in {out} ({error.strerror})"
            remedy = "wait until it ends, or give another --out"
            raise InputError(f"--out: {problem}; {remedy}") from error
        except OSError as error:
            reason = f"cannot write to {out} ({error.strerror})"
            raise InputError(f"--out: {reason}; give another folder") from error
        for log in logs:
            stack.callback(log.close)
        yield saved, newest, logs


def _show(value: Any, default: Any) -> str:
    return f"the default, {default}" if value is None and default else str(value)


def check_resume(
    resume: Resume,
    out: Path,
    about: dict[str, Any],
    newest: dict[str, Any] | None,
    *,
    free: Set[str],
    fixed: Set[str],
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    """Raises InputError unless the run in ``--out`` is this one, or there is none.

    Args:
      resume: value of ``--resume``.
      out: value of ``--out``.
      about: the current ``settings``, and the ``corpus`` they train on.
      newest: the same of the newest checkpoint in ``--out``, if there is one.
      free: fields that may differ, because they do not affect the training.
      fixed: fields that may not differ even with ``--resume changed``, because another
        value changes the structure of the state.
      defaults: returns what settings that are None stand for.
    """
    if newest is None:
        if resume in ("must", "changed"):
            remedy = "check --out, or leave out --resume"
            raise InputError(f"--resume: no checkpoint in {out}; {remedy}")
        return
    if resume == "never":
        remedy = "give another --out, or delete that folder"
        raise InputError(f"--resume: never, but {out} holds a run; {remedy}")
    now, before = about["settings"], newest["settings"]
    differs = [key for key in now if key not in free and now[key] != before.get(key)]
    remedy = "give that value, another --out, or --resume changed"
    for key in sorted(differs, key=lambda key: key not in fixed):
        given, had = (_show(x.get(key), defaults(x).get(key)) for x in (now, before))
        differ = f"{flag(key)}: {given}, but the run in {out} has {had}"
        if key in fixed:
            raise InputError(f"{differ}; give that value, or another --out")
        if resume != "changed":
            raise InputError(f"{differ}; {remedy}")
    corpora = about["corpus"], newest["corpus"]
    if corpora[0] != corpora[1] and resume != "changed":
        given, saved = (f"{name} of {size} tokens" for name, size in corpora)
        problem = f"--data: {given}, but the run in {out} has {saved}"
        remedy = "give that text, another --out, or --resume changed"
        raise InputError(f"{problem}; {remedy}")
