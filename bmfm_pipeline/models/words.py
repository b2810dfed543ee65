"""A linear classifier of the words of a sequence, counted from the very tokens of the batch, where tokens are single letters."""

import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models.configuration import MultitaskConfig

LETTERS, LONGEST = 4, 6  # A, C, G and T are the first tokens behind the special ones
# Where the words of each length begin, and how many there are.
STARTS = tuple(sum(LETTERS**shorter for shorter in range(1, length)) for length in range(1, LONGEST + 2))
WORDS = STARTS[-1]


class WordScores(nn.Linear):
    """scores = SCALE * values of the words @ weight, for words of 1 to 6 letters; a word with another letter or token is none.

    The values are log1p of the counts, brought to length 1 in every sequence. All weights start at zero: the path says nothing before it
    has learned something. With this scale a few passes at the rate of a network reach what logistic regression reaches.
    """

    SCALE = 8.0

    def __init__(self, first_letter: int, outputs: int):
        super().__init__(WORDS, outputs, bias=False)
        self.first_letter = first_letter

    @classmethod
    def of(cls, config: MultitaskConfig, outputs: int) -> "WordScores":
        """For the only field of `config`. Raises ConfigError where its tokens are not letters."""
        (field,) = config.input_fields
        letters = (field.vocab_size or 0) - field.num_special_tokens
        if not LETTERS <= letters <= LETTERS + 1:
            raise ConfigError(
                f"model.linear_path: counts words of single letters, and the field {field.name} has {letters:,} tokens; cut sequences with "
                "data_module.sequences.vocabulary.kind=nucleotide, or set model.linear_path=false"
            )
        return cls(field.num_special_tokens, outputs)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, 1, L) -> (B, outputs)"""
        return nn.functional.linear(self._values(self._words(input_ids)).to(self.weight.dtype), self.weight)

    def parts(self, input_ids: Tensor) -> Tensor:
        """(B, 1, L) -> (B, L, outputs): what each position adds to the scores; of a word each of its letters adds the same."""
        words = self._words(input_ids)
        counts = self._counts(words)
        each = self._values(words) / counts.clamp(min=1)  # of one occurrence
        batch, _, length = words.shape
        found = self.weight.new_zeros(batch, length, self.out_features)
        for size in range(1, LONGEST + 1):
            place = words[:, size - 1]
            share = each.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0.0) / size
            added = share.unsqueeze(-1) * self.weight.t()[place.clamp(min=0)]
            for behind in range(min(size, length)):
                found[:, behind:] += added[:, : length - behind]
        return found

    def _words(self, input_ids: Tensor) -> Tensor:
        """(B, 1, L) -> (B, 6, L) int64: which word of each length begins at a position, -1 where none does."""
        codes = input_ids[:, 0].to(torch.int64) - self.first_letter
        is_letter = (codes >= 0) & (codes < LETTERS)
        length = codes.shape[1]
        word, valid, words = torch.zeros_like(codes), torch.ones_like(is_letter), []
        for size in range(1, LONGEST + 1):
            reach = min(size - 1, length)
            ahead = nn.functional.pad(codes[:, reach:], (0, reach))
            valid = valid & nn.functional.pad(is_letter[:, reach:], (0, reach))
            word = word * LETTERS + ahead
            words.append(torch.where(valid, word + STARTS[size - 1], -1))
        return torch.stack(words, dim=1)

    def _counts(self, words: Tensor) -> Tensor:
        """(B, 6, L) -> (B, words) float32"""
        flat = words.flatten(1)
        counts = torch.zeros(len(flat), WORDS + 1, device=flat.device)
        places = torch.where(flat < 0, WORDS, flat)
        return counts.scatter_add_(1, places, torch.ones_like(places, dtype=counts.dtype))[:, :WORDS]

    def _values(self, words: Tensor) -> Tensor:
        values = self._counts(words).log1p()
        return self.SCALE * values / values.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
