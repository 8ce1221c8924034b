"""A run goes on, or is new, or there is an error: nothing starts anew in silence."""

import dataclasses
import json
from pathlib import Path

import pytest
from input_error import InputError
from resuming import Resume, as_json, check_resume, flag


@dataclasses.dataclass(frozen=True)
class Flags:
    out: Path = Path("/runs/x")
    resume: Resume = "auto"
    eval_every: int = 10
    batch_size: int = 8
    size: str = "tiny"
    inject: tuple[str, ...] = ()
    data: Path | None = None


FREE, FIXED = {"resume", "out", "eval_every"}, {"size", "inject"}
CORPUS = ["book.txt", 1000]


def saved(flags=None, corpus=CORPUS):
    """What the newest checkpoint says, as it is read back."""
    about = {"settings": as_json(flags or Flags()), "corpus": corpus}
    return json.loads(json.dumps(about | {"step": 3, "batch": 3}))


def check(newest, corpus=CORPUS, **flags):
    flags = Flags(**flags)
    about = {"settings": as_json(flags), "corpus": corpus}
    resume, out = flags.resume, flags.out
    check_resume(resume, out, about, newest, free=FREE, fixed=FIXED)


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
