"""Captions as tokens: the tokenizer, trained on captions and instruction, and the rows that the model sees.

diffusers' SanaPipeline puts a long instruction before every prompt and keeps of the text encoder's output row 0 and
the rows from the instruction's last token on. That last token is the space before the prompt, which the tokenizer
joins to the prompt's first word, and it joins nothing else across a space. So the instruction without its last
space is a constant prefix, and " " + prompt can be turned into tokens alone.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sana_export.prompting import tokenizer_entry
from sana_export.weights.tokenizer import train_tokenizer
from sana_runtime.tokenizer import clean_prompt

# How often the instruction is repeated beside the captions: often enough that its words become tokens.
_INSTRUCTION_WEIGHT = 400
# Words with the space before them, everything else character by character: "circle," is no token, nor two Chinese
# characters, so that unseen pairs of words are made of seen tokens.
_PIECE = re.compile(r" ?[A-Za-z0-9'-]+| ?[^\sA-Za-z0-9]|\s")


def instruction(tokenizer_json: bytes) -> str:
    """The text that diffusers puts before a prompt."""
    return tokenizer_entry(tokenizer_json, "tokenizer.json", "SanaPipeline").instruction


def learn_tokenizer(captions: Iterable[str], vocabulary: int) -> bytes:
    """tokenizer.json for these captions and the instruction, `vocabulary` tokens or fewer."""
    empty = train_tokenizer([], vocabulary)
    return train_tokenizer(_pieces(captions, instruction(empty)), vocabulary)


def _pieces(captions: Iterable[str], instruction_text: str) -> Iterator[str]:
    for caption in captions:
        yield from _PIECE.findall(" " + clean_prompt(caption))
    for line in instruction_text.splitlines():
        for _ in range(_INSTRUCTION_WEIGHT):
            yield from _PIECE.findall(line)


class CaptionEncoder:
    """Turns captions into the rows behind the instruction: what `Tokenizer` gives for instruction + caption."""

    def __init__(self, tokenizer_json: bytes, rows: int) -> None:
        """`rows`: how many rows cross-attention sees, the first token included."""
        self._tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        self._pad = self._tokenizer.token_to_id("<pad>")
        self.rows = rows
        text = instruction(tokenizer_json)
        if not text.endswith(" "):
            raise ValueError("diffusers' instruction no longer ends in a space: captions cannot be tokenised alone")
        self.prefix = np.array(self._tokenizer.encode(text.rstrip()).ids, np.int64)

    def encode(self, captions: Sequence[str]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Tokens [n, rows - 1], padded on the right, and how many each caption has, which may be more than fit."""
        texts = [" " + clean_prompt(caption) for caption in captions]
        found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        tokens = np.full((len(texts), self.rows - 1), self._pad, np.int16)
        for row, encoding in zip(tokens, found, strict=True):
            ids = encoding.ids[: len(row)]
            row[: len(ids)] = ids
        return tokens, np.array([len(encoding.ids) for encoding in found])
