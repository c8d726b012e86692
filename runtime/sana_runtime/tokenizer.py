"""From a prompt to caption_tokens, exactly as diffusers' SanaPipeline prepares them (clean_caption=False)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sana_runtime.contract import CAPTION_LENGTH
from sana_runtime.errors import BundleError, InputError
from sana_runtime.manifest import TokenizerEntry


@dataclass(frozen=True)
class CaptionTokens:
    """`caption_tokens` and `caption_mask`: int64 [1, L], padded on the right; the mask is 1 for tokens.

    The caption the transformer attends to is row 0 and the 299 rows from `tail_start` on: the instruction
    conditions the prompt's rows (the text encoder is causal) and is then dropped.
    """

    caption_tokens: npt.NDArray[np.int64]
    caption_mask: npt.NDArray[np.int64]
    tail_start: int


class CaptionTokenizer:
    """The bundle's tokenizer. One thread at a time: truncation is state of the wrapped tokenizer."""

    def __init__(self, bundle: Path, entry: TokenizerEntry) -> None:
        self.entry = entry
        path = bundle / entry.file
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust binding raises bare Exception
            raise BundleError(
                f"{path} cannot be read as a tokenizer",
                received=str(error),
                expected="the tokenizer.json of the checkpoint",
                action="copy the bundle again, or run the build command again",
            ) from error
        self._tokenizer.no_padding()

    def encode(self, text: str, *, negative: bool) -> CaptionTokens:
        """Tokens of a prompt, or of a negative prompt, which never gets the instruction.

        Text that is too long is cut at the end, as transformers does with `truncation=True`.
        Raises `InputError` if `text` is not a string that can be written as UTF-8.
        """
        caption = clean_prompt(text)
        length = CAPTION_LENGTH
        if self.entry.instruction and not negative:
            caption = self.entry.instruction + caption
            length = self.entry.instruction_tokens + CAPTION_LENGTH - 2
        self._tokenizer.enable_truncation(length)
        tokens = self._tokenizer.encode(caption).ids
        return self._padded(tokens, tail_start=length - CAPTION_LENGTH + 1)

    def _padded(self, tokens: list[int], tail_start: int) -> CaptionTokens:
        shape = (1, self.entry.padded_length)
        caption_tokens = np.full(shape, self.entry.pad_token_id, np.int64)
        caption_mask = np.zeros(shape, np.int64)
        caption_tokens[0, : len(tokens)] = tokens
        caption_mask[0, : len(tokens)] = 1
        return CaptionTokens(caption_tokens, caption_mask, tail_start)


def clean_prompt(text: str) -> str:
    """Lower case without surrounding white space. Raises `InputError` if `text` cannot be a prompt."""
    if not isinstance(text, str):
        raise InputError("the prompt is not text", received=type(text).__name__, expected="a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "the prompt holds characters that are not Unicode text",
            received=repr(text),
            expected="a prompt in UTF-8",
            action="check the encoding of your terminal or of the file the prompt came from",
        ) from error
    return text.lower().strip()
