"""Small tokenizers with Gemma's conventions, trained here; one on a text of our own.

Byte-pair encoding with byte fallback; "▁" stands for a space; <pad> 0, <eos> 1, <bos> 2, <unk> 3; <bos> is
put first by the post-processor, <eos> never. The one on our own text costs no download and serves every random model.
"""

import json
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
VOCABULARY_SIZE = 768
_SPACE = "▁"
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
_PRINTABLE = [chr(code) for code in range(0x20, 0x7F)]


@cache
def tokenizer_json() -> bytes:
    """The content of tokenizer.json of the random models, the same on every call."""
    text = (files("sana_export.weights") / "tokenizer_text.txt").read_text(encoding="utf-8")
    return train_tokenizer(text.splitlines(), VOCABULARY_SIZE)


def train_tokenizer(lines: Iterable[str], vocabulary_size: int) -> bytes:
    """The content of a tokenizer.json that is trained on `lines` and has `vocabulary_size` tokens or fewer."""
    vocabulary, merges = _train(lines, vocabulary_size - len(SPECIAL_TOKENS) - len(_BYTES))
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))]
    )
    return tokenizer.to_str().encode()


def _train(lines: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: special tokens, the 256 bytes, then `size` learned pieces."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", _SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")
    alphabet = [_SPACE if character == " " else character for character in _PRINTABLE]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(lines, trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {piece: index for index, piece in enumerate((*SPECIAL_TOKENS, *_BYTES, *pieces))}
    return vocabulary, [tuple(merge) for merge in learned["merges"]]
