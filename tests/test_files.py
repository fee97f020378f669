"""Files that are replaced whole."""

import os

import pytest

from kivicache.files import replacing


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path, link = tmp_path / "table.csv", tmp_path / "link.csv"
    path.write_text("old")
    link.symlink_to(path)
    with pytest.raises(KeyboardInterrupt), replacing(path) as fresh:
        fresh.write_text("hal")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with replacing(link) as fresh:
        fresh.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none'$"), replacing(tmp_path / "none" / "table.csv"):
        pytest.fail("nothing to write to")


def test_a_device_is_written_to():
    with replacing(os.devnull) as path:
        assert str(path) == os.devnull
