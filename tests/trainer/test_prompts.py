"""Prompt files, and what is said of those in another format."""

import pytest

from guard_ops.trainer.prompts import read_prompts


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n\n  a cube \n")
    assert read_prompts(tmp_path / "p.txt") == (["a dog", "a cube"], [{}, {}])


def test_json_lines_have_prompts_and_metadata(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"tag": "count", "prompt": "two dogs"}\n{"prompt": "é"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == (["two dogs", "é"], [{"tag": "count"}, {}])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("p.csv", "a", r"p.csv'; it needs a .txt or a .jsonl file"),
        ("p.txt", "\n\n", r"p.txt' has no prompt in it"),
        ("p.txt", 'a\n{"prompt": "b"}', r"p.txt:2 is JSON; a file of JSON lines is named .jsonl"),
        ("p.jsonl", '{"prompt": "a"}\na dog', r"p.jsonl:2 is no JSON: Expecting value"),
        ("p.jsonl", '["a"]', r'p.jsonl:1 is a list; it needs {"prompt": "..."}'),
        ("p.jsonl", '{"text": "a"}', r'p.jsonl:1 has no text as its "prompt"; it has text'),
        ("p.jsonl", '{"prompt": 3}', r'p.jsonl:1 has no text as its "prompt"'),
    ],
)
def test_a_file_in_another_format_names_the_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_file_that_is_not_there_or_no_text_says_so(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot be read: .*utf-8"):
        read_prompts(tmp_path / "p.txt")


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028dog"}\r\n{"prompt": "b"}\n', "utf-8")
    assert read_prompts(tmp_path / "p.jsonl").texts == ["a\u2028dog", "b"]
