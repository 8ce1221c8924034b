"""What a type checker says of code that uses the library, and of slips in it."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optax_stability as ost
from optax_stability import faults as ost_faults
from optax_stability import flax as ost_flax
from optax_stability import loop as ost_loop
from optax_stability import orbax as ost_orbax
from optax_stability import tensorboard as ost_tensorboard

HERE = Path(__file__).parent
# By the names that they have in the code of the user.
MODULES = {"ost": ost, "thresholds": ost.thresholds, "ost_flax": ost_flax}
MODULES |= {"ost_orbax": ost_orbax, "ost_loop": ost_loop, "ost_faults": ost_faults}
MODULES["ost_tensorboard"] = ost_tensorboard


def pyright(*arguments):
    """What pyright says, with the packages that are installed here."""
    command = [sys.executable, "-m", "pyright", *arguments]
    command += ["--pythonpath", sys.executable, "--outputjson"]
    # It exits with 1 if it finds an error.
    said = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, check=False)
    return json.loads(said.stdout)


def marked(file):
    """File, line and rule of each rule that a comment names."""
    for number, line in enumerate((HERE / file).read_text().splitlines(), 1):
        for rule in re.findall(r"report\w+", line.partition("  # ")[2]):
            yield file, number, rule


@pytest.mark.full
def test_pyright_accepts_the_code_of_a_user_and_rejects_every_slip():
    said = pyright()
    assert said["summary"]["filesAnalyzed"] == 2
    errors = {
        (
            Path(each["file"]).name,
            each["range"]["start"]["line"] + 1,
            each.get("rule"),  # None for an error of syntax
        ): each["message"]
        for each in said["generalDiagnostics"]
    }
    slips = {*marked("user_code.py"), *marked("mistakes.py")}
    assert {where: errors[where] for where in errors.keys() - slips} == {}
    assert slips - errors.keys() == set()


@pytest.mark.full
def test_the_type_of_every_public_name_is_known():
    said = pyright("--verifytypes", "optax_stability", "--ignoreexternal")
    symbols = said["typeCompleteness"]["symbols"]
    assert {f"optax_stability.{name}" for name in ost.__all__} <= {
        each["name"] for each in symbols
    }
    assert [each for each in symbols if each["diagnostics"]] == []
    assert said["typeCompleteness"]["completenessScore"] == 1


@pytest.mark.parametrize("alias", MODULES)
def test_the_code_of_a_user_uses_every_public_name(alias):
    nodes = list(ast.walk(ast.parse((HERE / "user_code.py").read_text())))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    used = {node.attr for node in attributes if ast.unparse(node.value) == alias}
    for node in imports:
        if node.module == MODULES[alias].__name__:
            used |= {each.name for each in node.names}
    assert set(MODULES[alias].__all__) - used == set()
