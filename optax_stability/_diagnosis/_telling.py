"""Tells a command of the user's what was found."""

import json
import os
import subprocess
from collections.abc import Mapping
from typing import Any

# A command that takes longer is ended: the next finding must not wait for it.
_COMMAND_SECONDS = 60


def tell(command: str, content: Mapping[str, Any]) -> str | None:
    """Runs a command in a shell, with JSON as its input; why it failed, or None.

    The variables ``FINDING_KIND`` and ``FINDING_STEP`` are set.
    """
    named = {"FINDING_KIND": content["kind"], "FINDING_STEP": str(content["step"])}
    try:
        done = subprocess.run(
            command,
            shell=True,
            input=json.dumps(content, ensure_ascii=False) + "\n",
            text=True,
            env=os.environ | named,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        remedy = "let it start what takes longer in the background"
        return f"{command!r} was ended after {_COMMAND_SECONDS} seconds ({remedy})"
    if done.returncode:
        return f"{command!r} failed with exit code {done.returncode}"
    return None
