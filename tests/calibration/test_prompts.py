"""The shipped prompts are varied and found; a file without prompts is refused."""

import unicodedata
from pathlib import Path

import pytest

from sana_calibration.prompts import load_prompts, prompts_digest
from sana_runtime.errors import InputError


def test_shipped_prompts_are_varied() -> None:
    prompts = load_prompts()
    assert len(prompts) == 128
    assert len({prompt.casefold() for prompt in prompts}) == 128
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths) < 10
    assert max(lengths) > 150
    text = "".join(prompts)
    scripts = {unicodedata.name(letter).split()[0] for letter in text if letter.isalpha()}
    assert {"LATIN", "CJK", "HIRAGANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK"} <= scripts
    assert sum(unicodedata.category(letter) == "So" for letter in text) >= 10


def test_comments_blank_lines_and_byte_order_mark_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# list\n\n  a cat \r\n\t\n#x\nein Hund 🐕\n".encode())
    assert load_prompts(path) == ("a cat", "ein Hund 🐕")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# only\n# comments\n", b"\xff\xfe\x00"], ids=repr)
def test_file_without_prompts_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"prompts\.txt holds no prompts"):
        load_prompts(path)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_prompts(tmp_path / "none.txt")


def test_digest_depends_on_order_and_boundaries() -> None:
    lists = [("a", "b"), ("b", "a"), ("ab",), ("a", "b", "")]
    assert len({prompts_digest(prompts) for prompts in lists}) == len(lists)
