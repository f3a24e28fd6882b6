"""Files and folders are whole or absent."""

import os

import pytest

from bestiary.data.cloud.caches import build_once
from bestiary.data.files import replacing, write_text


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "figures.npy"
    write_text(path, "old")
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert unfinished.suffix == ".npy"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept"
    write_text(path, "old")

    def write():
        with replacing(path) as unfinished:
            unfinished.write_text("half of the ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_the_umask_s(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "weights") as unfinished:
            unfinished.unlink()  # as a library does that writes beside its file and renames, privately
            unfinished.write_text("1")
            unfinished.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_built_once(tmp_path):
    built = []

    def build(folder):
        built.append(folder)
        folder.mkdir()
        (folder / "content").write_text("1")

    for _ in range(2):
        assert build_once(tmp_path / "cache" / "a", build) == tmp_path / "cache" / "a"
    assert len(built) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a"]


def test_a_folder_that_fails_is_not_there(tmp_path):
    def build(folder):
        folder.mkdir()
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        build_once(tmp_path / "a", build)
    assert not list(tmp_path.iterdir())


def test_another_process_may_have_built_the_folder_meanwhile(tmp_path):
    def build(folder):
        for made in (folder, tmp_path / "a"):
            made.mkdir()
            (made / "content").write_text(made.name)

    build_once(tmp_path / "a", build)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "content").read_text() == "a"
