"""Whether a command may go on with the run that is in its folder.

Nothing starts anew in silence: a run goes on, or is new, or there is an error.
"""

import dataclasses
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

from input_error import InputError

Resume = Literal["auto", "must", "never", "changed"]


def flag(field: str) -> str:
    """How a field is written on the command line."""
    return "--" + field.replace("_", "-")


def as_json(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as a checkpoint keeps them."""

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
    """Raises InputError unless this is the run that is in ``--out``, or a new one.

    Args:
      resume: what is wanted.
      out: the folder.
      about: the ``settings`` now, and the ``corpus`` they train on.
      newest: the same of the newest checkpoint in ``--out``, if there is one.
      free: fields that may differ, for they leave the training alone.
      fixed: fields that may not even with ``--resume changed``, for with another value
        the state has another shape.
    """
    if newest is None:
        if resume in ("must", "changed"):
            remedy = "check --out, or leave --resume away"
            raise InputError(f"--resume: no checkpoint in {out}; {remedy}")
        return
    if resume == "never":
        remedy = "give another --out, or remove it"
        raise InputError(f"--resume: never, but {out} holds a run; {remedy}")
    now, before = about["settings"], newest["settings"]
    differs = [key for key in now if key not in free and now[key] != before.get(key)]
    remedy = "give that, another --out, or --resume changed"
    for key in sorted(differs, key=lambda key: key not in fixed):
        has = f"but the run in {out} has {before.get(key)}"
        if key in fixed:
            raise InputError(
                f"{flag(key)}: {now[key]}, {has}; give that, or another --out"
            )
        if resume != "changed":
            raise InputError(f"{flag(key)}: {now[key]}, {has}; {remedy}")
    corpora = about["corpus"], newest["corpus"]
    if corpora[0] != corpora[1] and resume != "changed":
        text, had = (f"{name} of {size} tokens" for name, size in corpora)
        says = f"--data: {text}, but the run in {out} has {had}"
        raise InputError(f"{says}; {remedy}")
