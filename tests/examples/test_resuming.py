"""A run goes on, or is new, or there is an error: nothing starts anew in silence."""

import contextlib
import dataclasses
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import resuming
from inputs import InputError, Resume, flag
from resuming import as_json, check_resume


@dataclasses.dataclass(frozen=True)
class Flags:
    out: Path = Path("/runs/x")
    resume: Resume = "auto"
    eval_every: int = 10
    batch_size: int = 8
    size: str = "tiny"
    inject: tuple[str, ...] = ()
    data: Path | None = None
    peak: float | None = None


FREE, FIXED = {"resume", "out", "eval_every"}, {"size", "inject"}
CORPUS = ["book.txt", 1000]


def saved(flags=None, corpus=CORPUS):
    """What the newest checkpoint says, as it is read back."""
    about = {"settings": as_json(flags or Flags()), "corpus": corpus}
    return json.loads(json.dumps(about | {"step": 3, "batch": 3}))


def default_values(settings):
    """What ``peak`` is when it is not given."""
    return {"peak": {"tiny": 0.003, "small": 0.001}[settings["size"]]}


def check(newest, corpus=CORPUS, **flags):
    flags = Flags(**flags)
    about = {"settings": as_json(flags), "corpus": corpus}
    resume, out = flags.resume, flags.out
    rules = {"free": FREE, "fixed": FIXED, "defaults": default_values}
    check_resume(resume, out, about, newest, **rules)


def refuses(text, *args, **flags):
    with pytest.raises(InputError) as error:
        check(*args, **flags)
    assert str(error.value) == text


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_empty_folder_is_for_a_new_run(resume):
    check(None, resume=resume)


@pytest.mark.parametrize("resume", ["must", "changed"])
def test_an_empty_folder_cannot_be_gone_on_with(resume):
    remedy = "check --out, or leave out --resume"
    refuses(f"--resume: no checkpoint in /runs/x; {remedy}", None, resume=resume)


@pytest.mark.parametrize("resume", ["auto", "must", "changed"])
def test_the_same_run_is_gone_on_with(resume):
    check(saved(), resume=resume)
    check(saved(), resume=resume, eval_every=99, out=Path("moved"))


def test_never_leaves_a_run_alone():
    remedy = "give another --out, or delete that folder"
    refuses(
        f"--resume: never, but /runs/x holds a run; {remedy}", saved(), resume="never"
    )


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_other_settings_are_an_error(resume):
    remedy = "give that value, another --out, or --resume changed"
    has = "but the run in /runs/x has"
    refuses(f"--batch-size: 4, {has} 8; {remedy}", saved(), resume=resume, batch_size=4)
    corpus = ["other.txt", 10]
    remedy = "give that text, another --out, or --resume changed"
    refuses(
        f"--data: other.txt of 10 tokens, {has} book.txt of 1000 tokens; {remedy}",
        saved(),
        corpus,
        resume=resume,
    )


def test_a_default_is_shown_with_its_value():
    remedy = "give that value, another --out, or --resume changed"
    has = "but the run in /runs/x has"
    says = f"--peak: 0.001, {has} the default, 0.003; {remedy}"
    refuses(says, saved(), peak=0.001)
    says = f"--peak: the default, 0.003, {has} 0.001; {remedy}"
    refuses(says, saved(Flags(peak=0.001)))


def test_changed_takes_other_settings():
    check(saved(), ["book.txt", 1001], resume="changed", batch_size=4)


@pytest.mark.parametrize("resume", ["auto", "must", "changed"])
def test_what_shapes_the_state_can_never_be_changed(resume):
    """And is named first, for no other remedy would do."""
    remedy = "give that value, or another --out"
    says = f"--size: small, but the run in /runs/x has tiny; {remedy}"
    refuses(says, saved(), resume=resume, batch_size=4, size="small")


def test_a_setting_that_the_run_did_not_have_is_another_one():
    newest = saved()
    del newest["settings"]["batch_size"]
    with pytest.raises(InputError, match=r"--batch-size: 8, but .* has None"):
        check(newest)


def test_settings_are_kept_as_json_can(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = as_json(Flags(inject=("nan@3",), data=Path("book.txt")))
    assert settings == json.loads(json.dumps(settings))
    assert settings["inject"] == ["nan@3"]
    # So that the same file is the same, wherever the command is given.
    assert settings["data"] == str(tmp_path / "book.txt")
    assert flag("batch_size") == "--batch-size"


# --- one folder, one run -----------------------------------------------------------


@contextlib.contextmanager
def open_it(out):
    about = {"settings": {}, "corpus": CORPUS}
    with resuming.open_folder(out, about, lambda *_: None, keep=3) as opened:
        yield opened


def test_a_folder_is_for_one_process(tmp_path):
    with open_it(tmp_path), pytest.raises(InputError) as error, open_it(tmp_path):
        pass
    who = f"process {os.getpid()} on {socket.gethostname()} since 2"
    says = f"--out: another process is training in {tmp_path} ({who}"
    assert str(error.value).startswith(says)
    assert str(error.value).endswith("; wait until it ends, or give another --out")
    assert "\n" not in str(error.value)
    with open_it(tmp_path):
        """A run that has ended holds nothing."""


def test_a_folder_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path, capsys):
    with open_it(tmp_path) as (saved, newest, (log, _)):
        assert newest is None
        saved.save({"x": np.ones(3)}, {"step": 0, "batch": 0})
        saved.save({"x": np.ones(3)}, {"step": 4, "batch": 4})
        log.write(4, {"batch": 4})
    with open_it(tmp_path) as (_, newest, _):
        assert newest == {"step": 4, "batch": 4}
    log = (tmp_path / "log.jsonl").read_text()
    for step in (0, 4):
        (tmp_path / "checkpoints" / str(step) / "state" / "_METADATA").unlink()
    for _ in range(2):  # Also when it is asked again.
        with pytest.raises(InputError) as error, open_it(tmp_path):
            pass
        assert str(error.value) == (
            f"--out: no checkpoint in {tmp_path} is whole; they are in "
            f"{tmp_path}/checkpoints-damaged; give another --out to start anew"
        )
    assert (tmp_path / "log.jsonl").read_text() == log
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(" is damaged: ")[0] for note in notes] == [
        "note: checkpoint 4",
        "note: checkpoint 0",
    ]
