"""Decides whether a command may resume the run in its output folder.

A run resumes, or is new, or there is an error: no run restarts silently.
"""

import dataclasses
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

from input_error import InputError

Resume = Literal["auto", "must", "never", "changed"]


def flag(field: str) -> str:
    """The name of a field on the command line."""
    return "--" + field.replace("_", "-")


def as_json(config: Any) -> dict[str, Any]:
    """The fields of a dataclass, as JSON values for a checkpoint."""

    def plain(value):
        if isinstance(value, Path):
            return str(value.resolve())
        return list(value) if isinstance(value, tuple) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def check_resume(
    resume: Resume,
    out: Path,
    about: dict[str, Any],
    newest: dict[str, Any] | None,
    *,
    free: Set[str],
    fixed: Set[str],
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
        has = f"but the run in {out} has {before.get(key)}"
        if key in fixed:
            raise InputError(
                f"{flag(key)}: {now[key]}, {has}; give that value, or another --out"
            )
        if resume != "changed":
            raise InputError(f"{flag(key)}: {now[key]}, {has}; {remedy}")
    corpora = about["corpus"], newest["corpus"]
    if corpora[0] != corpora[1] and resume != "changed":
        given, saved = (f"{name} of {size} tokens" for name, size in corpora)
        problem = f"--data: {given}, but the run in {out} has {saved}"
        remedy = "give that text, another --out, or --resume changed"
        raise InputError(f"{problem}; {remedy}")
