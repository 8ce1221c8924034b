"""Whether a folder is still what it was when its checksums were written."""

import shutil
import subprocess

import pytest

import optax_stability as ost


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "checkpoint"
    (path / "state" / "d").mkdir(parents=True)
    (path / "state" / "d" / "0").write_bytes(bytes(range(256)) * 5000)
    (path / "state" / "empty").write_bytes(b"")
    (path / "état with spaces").write_bytes(b"1")
    ost.write_checksums(path)
    return path


def test_what_is_whole_is_whole(folder):
    assert ost.find_damage(folder) is None
    before = (folder / "SHA256SUMS").read_bytes()
    ost.write_checksums(str(folder))
    assert (folder / "SHA256SUMS").read_bytes() == before
    (folder / ".nfs001").write_text("of the file system")
    assert ost.find_damage(folder) is None


@pytest.mark.parametrize("name", ["state/d/0", "état with spaces"])
def test_a_change_of_one_bit_is_found(folder, name):
    content = (folder / name).read_bytes()
    for at in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 16
        (folder / name).write_bytes(changed)
        assert ost.find_damage(folder) == f"{name} has changed since it was written"
    (folder / name).write_bytes(content[:-1])
    assert ost.find_damage(folder) == f"{name} has changed since it was written"


def test_a_file_that_is_gone_or_new_is_found(folder):
    (folder / "new").write_text("")
    assert ost.find_damage(folder) == "new is not in SHA256SUMS"
    (folder / "new").unlink()
    (folder / "state" / "empty").unlink()
    assert ost.find_damage(folder) == "state/empty is missing"


def test_damage_of_the_checksums_themselves_is_found(folder):
    content = (folder / "SHA256SUMS").read_bytes()
    for end in range(len(content) - 1):  # The last byte ends a line that is whole.
        (folder / "SHA256SUMS").write_bytes(content[:end])
        assert ost.find_damage(folder)
    (folder / "SHA256SUMS").write_bytes(b"\0\xff" * 100)
    assert ost.find_damage(folder)


def test_without_checksums_nothing_is_said(folder):
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS"):
        ost.find_damage(folder)


def test_a_file_that_cannot_be_read_is_damage(folder, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hashlib.file_digest", fail)
    says = "cannot be read (Input/output error)"
    assert ost.find_damage(folder) == f"state/d/0 {says}"


@pytest.mark.parametrize("program", ["sha256sum"])
def test_other_programs_can_check(folder, program):
    command = shutil.which(program)
    assert command, f"{program} is part of every Linux"
    done = subprocess.run(
        [command, "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True
    )
    assert done.returncode == 0
