"""Sequences of nucleotides as tokens: the byte-pair pieces of a tokenizer folder, with [CLS] before and [SEP] after them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError
from bmfm_pipeline.vocabulary.alleles import as_text, characters
from bmfm_pipeline.vocabulary.vocabulary import CLS, PAD, SEP, UNK, Vocabulary

FILE = "tokenizer.json"


class SequenceTokenizer:
    """Cuts sequences into the pieces of a trained tokenizer folder (tokenizer.json of Hugging Face `tokenizers`).

    Sequences are upper-cased first, as genomes write repeats in lower case; `upper_case=False` leaves them, so that every lower-case
    letter is unknown. Whatever the tokenizer does not know becomes one [UNK] = 0 a letter. Pairs of alleles are the characters that
    alleles.json of the folder gives them, else our own. Raises DataError for another folder.
    """

    def __init__(self, folder: str | Path, upper_case: bool = True):
        from tokenizers import Tokenizer

        self.folder, self.upper_case = Path(folder), upper_case
        self.vocabulary = Vocabulary.load(self.folder)
        if not self.vocabulary.subwords:
            raise DataError(f"{folder}: holds whole words, not the pieces of sequences")
        self._tokenizer = Tokenizer.from_file(str(self.folder / FILE))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        own = self.vocabulary.tokens[self.vocabulary.n_special :]
        self._characters = characters(self.folder)
        self._single = None  # of a vocabulary of single letters: the id of each, looked up at once
        if all(len(token) == 1 for token in own) and {ord(token) for token in own} <= set(self._characters.tolist()):
            self._single = self.vocabulary.ids(map(chr, self._characters)).astype(np.uint32)

    def __reduce__(self):
        return SequenceTokenizer, (self.folder, self.upper_case)

    def ids(self, sequences: Sequence[str]) -> list[np.ndarray]:
        """int64 ids of the pieces of each sequence, without special tokens."""
        texts = [text.upper() for text in sequences] if self.upper_case else list(sequences)
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(entry.ids, dtype=np.int64) for entry in found]

    @property
    def longest_piece(self) -> int:
        """Letters of the longest piece."""
        return max(len(token) for token in self.vocabulary.tokens[self.vocabulary.n_special :])

    def lengths(self, sequence: str) -> np.ndarray:
        """int64: how many letters of a sequence each of its pieces stands for, those of unknown ones too."""
        text = sequence.upper() if self.upper_case else sequence
        if self._single is not None:
            return np.ones(len(text), dtype=np.int64)
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        ends = np.array([end for _, end in offsets], dtype=np.int64)
        return np.diff(ends, prepend=0)

    def encode(self, letters: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids uint32, how many each sequence has int64) of sequences one after the other: letters uint8, starts int64 (n + 1,)."""
        if self._single is not None:
            capitals = letters - 32 * ((letters >= ord("a")) & (letters <= ord("z"))) if self.upper_case else letters
            return self._single[capitals], np.diff(starts)
        whole = as_text(letters, self._characters)
        found = self.ids([whole[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)])
        lengths = np.array([len(entry) for entry in found], dtype=np.int64)
        return np.concatenate([*found, np.zeros(0, np.int64)]).astype(np.uint32), lengths

    def batch(
        self,
        sequences: Sequence[str],
        max_length: int,
        pad_to_multiple_of: int | None = None,
        pad_to_length: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """(ids, attention mask), each int64 (B, L), and how many unknown letters they hold.

        L is at most `max_length`, [CLS] and [SEP] included; later pieces are cut off. Shorter sequences are padded to the longest, or
        to `max_length` with `pad_to_length`, rounded up to `pad_to_multiple_of`.
        """
        if max_length < 3:
            raise DataError(f"max_length {max_length} leaves no room for a piece between [CLS] and [SEP]")
        pieces = [found[: max_length - 2] for found in self.ids(sequences)]
        length = max_length if pad_to_length else 2 + max((len(found) for found in pieces), default=0)
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        ids = np.full((len(pieces), length), PAD, dtype=np.int64)
        attention = np.zeros_like(ids)
        for row, found in enumerate(pieces):
            ids[row, 0], ids[row, 1 : len(found) + 1], ids[row, len(found) + 1] = CLS, found, SEP
            attention[row, : len(found) + 2] = 1
        return ids, attention, int(np.count_nonzero(ids == UNK))

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into `folder`."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
