"""caption_tokens: cleaning, instruction, truncation, padding and the rows the transformer keeps."""

from pathlib import Path

import pytest

from sana_runtime.errors import BundleError, InputError
from sana_runtime.manifest import TokenizerEntry
from sana_runtime.tokenizer import CaptionTokenizer, clean_prompt
from tests.runtime.toys import FIXTURES, INSTRUCTION, INSTRUCTION_TOKENS, PADDED_LENGTH

BOS, DRAW, THIS, COLON, A, RED, FOX = 2, 4, 5, 6, 7, 8, 9


def tokenizer(instruction: str = INSTRUCTION, padded_length: int = PADDED_LENGTH) -> CaptionTokenizer:
    tokens = INSTRUCTION_TOKENS if instruction else 0
    return CaptionTokenizer(FIXTURES, TokenizerEntry("tokenizer.json", instruction, tokens, padded_length, 0))


def valid_tokens(encoded: object) -> list[int]:
    count = int(encoded.caption_mask.sum())  # type: ignore[attr-defined]
    return encoded.caption_tokens[0, :count].tolist()  # type: ignore[attr-defined]


def test_positive_carries_the_instruction_and_negative_does_not() -> None:
    positive = tokenizer().encode("A red FOX", negative=False)
    negative = tokenizer().encode("A red FOX", negative=True)
    assert valid_tokens(positive) == [BOS, DRAW, THIS, COLON, A, RED, FOX]
    assert valid_tokens(negative) == [BOS, A, RED, FOX]
    for encoded in (positive, negative):
        assert encoded.caption_tokens.shape == encoded.caption_mask.shape == (1, PADDED_LENGTH)
        count = int(encoded.caption_mask.sum())
        assert encoded.caption_mask[0, :count].all()
        assert not encoded.caption_tokens[0, count:].any()  # pad token 0


def test_kept_rows_reach_the_end_of_each_text_s_own_length() -> None:
    # instruction_tokens + 298 = 302 positions: rows 0 and 3..301; without instruction 300: rows 0 and 1..299.
    assert tokenizer().encode("a", negative=False).tail_start == INSTRUCTION_TOKENS - 1
    assert tokenizer().encode("a", negative=True).tail_start == 1
    assert tokenizer(instruction="", padded_length=300).encode("a", negative=False).tail_start == 1


@pytest.mark.parametrize(("negative", "length"), [(False, 302), (True, 300)])
def test_long_text_is_cut_at_the_end_and_keeps_bos(negative: bool, length: int) -> None:
    encoded = tokenizer().encode("fox " * 400, negative=negative)
    tokens = valid_tokens(encoded)
    assert len(tokens) == length
    assert tokens[0] == BOS
    assert tokens[-1] == FOX


def test_truncation_of_one_text_does_not_stay_for_the_next() -> None:
    shared = tokenizer()
    assert len(valid_tokens(shared.encode("fox " * 400, negative=True))) == 300
    assert len(valid_tokens(shared.encode("fox " * 400, negative=False))) == 302


def test_empty_prompt_is_bos_alone_without_instruction() -> None:
    assert valid_tokens(tokenizer().encode("", negative=True)) == [BOS]
    assert valid_tokens(tokenizer().encode("   ", negative=False)) == [BOS, DRAW, THIS, COLON]


def test_cleaning_is_lower_and_strip() -> None:
    assert clean_prompt("  A\tRed ÉTÉ\n") == "a\tred été"


@pytest.mark.parametrize("text", [None, 3, b"fox", "\ud800"])
def test_what_is_not_text_is_refused(text: object) -> None:
    with pytest.raises(InputError, match="the prompt"):
        tokenizer().encode(text, negative=False)  # type: ignore[arg-type]


def test_damaged_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model":')
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        CaptionTokenizer(tmp_path, TokenizerEntry("tokenizer.json", "", 0, 300, 0))
