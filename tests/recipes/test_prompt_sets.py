"""Prompts by name, folder or file."""

from __future__ import annotations

import pytest

from guard_ops.recipes.prompt_sets import NAMES, prompt_file


def test_a_word_that_is_nothing_is_told_what_there_is():
    with pytest.raises(ValueError, match="`prompts` is 'genevl'") as no:
        prompt_file("genevl")
    assert ", ".join(NAMES) in str(no.value)
    assert "no .txt or .jsonl file" in str(no.value)


def test_a_file_is_itself_whether_or_not_it_is_there(tmp_path):
    (tmp_path / "odd.csv").write_text("a\n")  # read_prompts names what it can read
    for name in ("missing.txt", "missing.jsonl", "odd.csv"):
        assert prompt_file(str(tmp_path / name)) == str(tmp_path / name)
