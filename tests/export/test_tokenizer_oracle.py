"""The runtime's caption_tokens, mask and kept rows against diffusers' SanaPipeline.encode_prompt."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from transformers import PreTrainedTokenizerFast

from sana_runtime.manifest import TokenizerEntry
from sana_runtime.tokenizer import CaptionTokenizer

FIXTURES = Path(__file__).parents[1] / "runtime" / "fixtures"
INSTRUCTION = ["draw this", "a red fox : "]


class PositionEncoder:
    """A text encoder whose embedding of a row is the row's token and position."""

    dtype = torch.float64

    def __call__(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        self.tokens, self.mask = tokens.numpy(), attention_mask.numpy()
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        return (torch.stack([tokens, position], dim=-1).double(),)


def encode_with_diffusers(prompt: str, negative: str, instruction: list[str] | None) -> tuple[list[np.ndarray], int]:
    """encode_prompt's positive rows, mask, negative rows, mask; and the instruction's token count."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(FIXTURES / "tokenizer.json"), pad_token="<pad>", bos_token="<bos>"
    )
    # encode_prompt needs these attributes of its pipeline and no weights.
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=PositionEncoder())
    for name in ("_get_gemma_prompt_embeds", "_text_preprocessing"):
        setattr(pipeline, name, getattr(SanaPipeline, name).__get__(pipeline))
    encoded = SanaPipeline.encode_prompt(
        pipeline,
        prompt,
        negative_prompt=negative,
        device=torch.device("cpu"),
        complex_human_instruction=instruction,
    )
    count = len(tokenizer.encode("\n".join(instruction))) if instruction else 0
    return [tensor.numpy()[0] for tensor in encoded], count


def encode_with_runtime(text: str, *, negative: bool, instruction: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    padded_length = max(300, count + 298)
    entry = TokenizerEntry("tokenizer.json", instruction, count, padded_length, 0)
    encoded = CaptionTokenizer(FIXTURES, entry).encode(text, negative=negative)
    rows = np.stack([encoded.caption_tokens[0], np.arange(padded_length)], axis=-1)
    keep = [0, *range(encoded.tail_start, encoded.tail_start + 299)]
    return rows[keep], encoded.caption_mask[0, keep]


@pytest.mark.parametrize("instruction", [INSTRUCTION, None], ids=["instruction", "plain"])
@pytest.mark.parametrize(
    "prompt",
    ["", "   ", "A Red FOX in the snow ", "fox\n\tsnow", "unknown wörds", "fox " * 299, "fox " * 1000],
    ids=["empty", "blank", "words", "white space", "unknown", "just too long", "far too long"],
)
@pytest.mark.parametrize("negative", ["", "Blurry snow", "blurry " * 400], ids=["", "short", "long"])
def test_rows_and_masks_are_diffusers(prompt: str, negative: str, instruction: list[str] | None) -> None:
    (rows, mask, negative_rows, negative_mask), count = encode_with_diffusers(prompt, negative, instruction)
    text = "\n".join(instruction) if instruction else ""
    for expected, candidate in (
        ((rows, mask), encode_with_runtime(prompt, negative=False, instruction=text, count=count)),
        (
            (negative_rows, negative_mask),
            encode_with_runtime(negative, negative=True, instruction=text, count=count),
        ),
    ):
        assert expected[0].shape == (300, 2)
        np.testing.assert_array_equal(candidate[0], expected[0])
        np.testing.assert_array_equal(candidate[1], expected[1])
