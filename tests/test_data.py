"""Texts and rows from files, and from datasets by name; the hub is stood in for."""

import json
import sys
from types import ModuleType

import pytest

from kivicache.data import load_rows, load_text
from kivicache.models import MissingPackage


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the library of datasets, and notes what was asked of it."""
    asked, module = [], ModuleType("datasets")

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "no/such":
            raise ValueError("Dataset 'no/such' doesn't exist\nor cannot be accessed")
        return [{"text": "one"}, {"text": "two"}, {"text": "three"}]

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("kivicache.data.find_spec", lambda name: module)
    return asked


def test_texts_and_rows_from_files(tmp_path):
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("über\n", encoding="utf-8")
    rows.write_text("\n".join(json.dumps({"i": i}) for i in range(4)) + "\n\n")
    assert load_text(str(text)) == "über\n"
    assert load_rows(str(rows)) == [{"i": i} for i in range(4)] and load_rows(str(rows), 2) == [{"i": 0}, {"i": 1}]
    rows.write_text('{"text": "one\u2028line\x85"}\n', encoding="utf-8")
    assert load_rows(str(rows)) == [{"text": "one\u2028line\x85"}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{]", "rows.jsonl: allowed: one JSON object per line"),
        (b'[{"a": 1}]', r"rows.jsonl: got \[{'a': 1}\]; allowed: one JSON object per line"),
        (b"\xff\xfe", "rows.jsonl: allowed: text in UTF-8"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(content, said, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_rows(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match="data: got 5; allowed: a file, or OWNER/NAME"):
        load_rows(5)


def test_the_built_in_text_is_long_enough_for_the_defaults():
    text = load_text(None)
    assert text.startswith("CHAPTER I.") and len(text) > 8 * 4 * 1025
    assert "Gutenberg" not in text


@pytest.mark.parametrize(
    ("source", "args", "split"),
    [
        ("owner/name", ("owner/name", None), "test"),
        ("owner/name/config", ("owner/name", "config"), "test"),
        ("owner/name/config/train", ("owner/name", "config"), "train"),
    ],
)
def test_datasets_by_name(source, args, split, hub):
    assert load_rows(source, 2) == [{"text": "one"}, {"text": "two"}]
    assert load_text(source) == "one\ntwo\nthree"
    assert hub == [(args, {"split": split})] * 2


@pytest.mark.parametrize("source", ["missing.txt", "a/b/c/d/e", "owner/", "folder/rows.jsonl"])
def test_what_is_neither_is_refused(source, hub):
    with pytest.raises(ValueError, match="allowed: a file, or OWNER/NAME"):
        load_rows(source)
    assert not hub


def test_what_the_hub_does_not_have_is_one_line(hub):
    with pytest.raises(ValueError, match=r"data: 'no/such' cannot be loaded: Dataset 'no/such' doesn't exist$"):
        load_text("no/such")


def test_without_the_library_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr("kivicache.data.find_spec", lambda name: None)
    with pytest.raises(
        MissingPackage, match=r'datasets is not installed; install it with: pip install "kivicache\[eval\]"'
    ):
        load_rows("owner/name")
