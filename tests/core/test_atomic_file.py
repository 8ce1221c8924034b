"""Files that are written whole, or not at all."""

from optax_stability._core import _atomic_file


def test_the_content_is_written_beside_the_file_which_it_then_replaces(
    tmp_path, monkeypatch
):
    target = tmp_path / "new" / "folder" / "file"
    _atomic_file.write(target, b"before")
    seen = []

    def replace(temporary, path):
        seen.append((path.read_bytes(), temporary.read_bytes()))
        temporary.rename(path)

    monkeypatch.setattr(_atomic_file.os, "replace", replace)
    _atomic_file.write(target, b"after")
    assert seen == [(b"before", b"after")]
    assert target.read_bytes() == b"after"
    assert list(target.parent.iterdir()) == [target]
