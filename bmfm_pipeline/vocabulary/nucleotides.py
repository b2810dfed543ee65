"""Vocabularies of nucleotides made rather than read: byte pairs learned from sequences, k-mers, single letters."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.alleles import LETTERS
from bmfm_pipeline.vocabulary.vocabulary import SPECIAL_TOKENS

# Pairs are learned from stretches of this many letters: how often a pair occurs does not depend on the length of what it lies in, and
# the time to learn it does.
STRETCH = 128
LONGEST_PIECE, LEAST_COUNT = 32, 10
_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


def make_byte_pairs(folder: str | Path, sequences: Iterable[str], size: int = 4096, also: str = "") -> int:
    """Learn pieces by merging the commonest neighbours (byte-pair encoding; Sennrich 2016) and write the tokenizer folder.

    `size` counts the special tokens too; a merge is made of at least 10 occurrences and gives pieces of at most 32 letters, so there may
    be fewer. `also`: characters beside A, C, G, T and N that are pieces too, such as pairs of alleles. Returns how many pieces there are.
    The same sequences give the same pieces.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=LEAST_COUNT,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(LETTERS + also),
        limit_alphabet=len(LETTERS + also),
        max_token_length=LONGEST_PIECE,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_stretches(sequences), trainer)
    found = tokenizer.get_vocab_size()
    if found <= len(SPECIAL_TOKENS) + len(LETTERS + also):
        raise DataError(
            "tokenizer: the training sequences are too few to learn pieces from (no pair occurs 10 times); use "
            "data_module.sequences.vocabulary.kind=kmer or nucleotide"
        )
    return _save(tokenizer, folder)


def make_kmers(folder: str | Path, k: int = 6, also: str = "") -> int:
    """Write a tokenizer folder that cuts sequences into k letters each from the left, the rest shorter; `also`: further characters that are
    pieces by themselves. Returns its number of tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    if not 1 <= k <= 8:
        raise DataError(f"tokenizer: k must lie in 1..8, found {k}; {4**k:,} pieces are too many to learn")
    words = [*SPECIAL_TOKENS, *_words(k), *also]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f".{{1,{k}}}"), "isolated")
    return _save(tokenizer, folder)


def _words(k: int) -> Iterator[str]:
    """All words of 1 to k letters of A, C, G and T, and N alone."""
    yield from LETTERS
    for length in range(2, k + 1):
        yield from map("".join, itertools.product("ACGT", repeat=length))


def _stretches(sequences: Iterable[str]) -> Iterator[str]:
    for text in sequences:
        for start in range(0, len(text), STRETCH):
            yield text[start : start + STRETCH]


def _save(tokenizer, folder: str | Path) -> int:
    """Write the folder as transformers and `SequenceTokenizer` open it."""
    from tokenizers import AddedToken, processors

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    pairs = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pairs
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(_SETTINGS, indent=1))
    return tokenizer.get_vocab_size()
