"""What controls read of nucleotide sequences: counts of short words, and the letters themselves; and a small network on these."""

from typing import Any

import numpy as np

from bmfm_pipeline.batching.draws import compiled

LONGEST = 6
# Words of 1 to 6 letters, one length after the other.
WORDS = sum(4**length for length in range(1, LONGEST + 1))
FILTERS, WIDTH, HIDDEN, BATCH = 64, 11, 32, 64
EPOCHS, PATIENCE, HELD_OUT = 30, 4, 0.1
_CODES = np.full(256, 4, dtype=np.uint8)
for _code, _letter in enumerate(b"ACGT"):
    _CODES[_letter] = _code


@compiled
def _count_words(codes, starts, dense, columns, counts, sizes):
    """Words of each sequence, ascending: columns and counts hold sizes[i] entries each, one sequence after the other.

    A word with another letter than A, C, G and T is none. `dense` (WORDS,) is zero before and after.
    """
    place = 0
    for row in range(len(starts) - 1):
        begin, end = starts[row], starts[row + 1]
        for i in range(begin, end):
            word, first = 0, 0
            for length in range(1, 7):
                j = i + length - 1
                if j >= end or codes[j] > 3:
                    break
                word = word * 4 + codes[j]
                dense[first + word] += 1
                first += 4**length
        found = 0
        for word in range(len(dense)):
            if dense[word] > 0:
                columns[place], counts[place] = word, dense[word]
                dense[word] = 0
                place += 1
                found += 1
        sizes[row] = found


class SequenceValues:
    """The sequences of a processed file as controls read them; `shape` is that of the counts of words."""

    def __init__(self, arrays: Any):
        self.arrays = arrays
        self.shape = (len(arrays), WORDS)

    def rows(self, rows: np.ndarray):
        """Counts of words of 1 to 6 letters of chosen sequences, a scipy CSR matrix (rows, 5460)."""
        from scipy import sparse

        codes, starts = self._codes(rows)
        room = int(np.minimum(np.diff(starts) * LONGEST, WORDS).sum())
        columns, counts = np.empty(room, np.int32), np.empty(room, np.int32)
        sizes = np.empty(len(rows), np.int64)
        _count_words(codes, starts, np.zeros(WORDS, np.int32), columns, counts, sizes)
        indptr = np.concatenate([[0], np.cumsum(sizes)])
        used = indptr[-1]
        return sparse.csr_matrix((counts[:used], columns[:used], indptr), shape=(len(rows), WORDS))

    def letters(self, rows: np.ndarray) -> np.ndarray:
        """Letters of chosen sequences, uint8 (rows, longest): 0 to 3 for A, C, G, T, 4 for others and behind the end."""
        codes, starts = self._codes(rows)
        lengths = np.diff(starts)
        found = np.full((len(rows), max(int(lengths.max(initial=0)), WIDTH)), 4, dtype=np.uint8)
        within = np.arange(len(codes)) - np.repeat(starts[:-1], lengths)
        found[np.repeat(np.arange(len(rows)), lengths), within] = codes
        return found

    def _codes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begins = self.arrays.letter_starts[rows]
        lengths = self.arrays.letter_starts[np.asarray(rows) + 1] - begins
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], lengths)
        return _CODES[self.arrays.letters[places]], starts


def log_words(train, test):
    """log1p of counts of words, each divided by its largest value in training; both CSR float32."""
    train, test = (matrix.astype(np.float32) for matrix in (train, test))
    for matrix in (train, test):
        np.log1p(matrix.data, out=matrix.data)
    largest = np.asarray(train.max(axis=0).todense()).ravel()
    scale = np.divide(1, largest, out=np.zeros_like(largest), where=largest > 0)
    for matrix in (train, test):
        matrix.data *= scale[matrix.indices]
    return train, test


def gc_content(words) -> np.ndarray:
    """The share of G and C among A, C, G and T, and the logarithm of how many these are, float64 (rows, 2), from counts of words."""
    single = np.asarray(words[:, :4].todense(), dtype=np.float64)
    total = single.sum(axis=1)
    share = np.divide(single[:, 1] + single[:, 2], total, out=np.full(len(total), 0.5), where=total > 0)
    return np.stack([share, np.log1p(total)], axis=1)


def fit_network(letters: np.ndarray, y: np.ndarray, test: np.ndarray, n_classes: int, seed: int) -> np.ndarray:
    """What a small convolutional network says of the test letters: probabilities (rows, n_classes), or numbers (rows,) for 0 classes.

    64 filters of 11 letters, their largest and mean answer, one hidden layer; Adam, up to 30 epochs. A tenth of the training sequences
    chooses the epoch.
    """
    import torch

    with torch.random.fork_rng():  # dropout draws from the generator of all
        torch.manual_seed(seed)
        return _fitted(letters, y, test, n_classes, seed)


def _fitted(letters: np.ndarray, y: np.ndarray, test: np.ndarray, n_classes: int, seed: int) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(seed)
    network = _network(max(n_classes, 1))
    order = torch.randperm(len(y), generator=generator)
    held = order[: max(1, int(HELD_OUT * len(y)))] if len(y) > 20 else order[:0]
    fit = order[len(held) :]
    mean, deviation = (0.0, 1.0) if n_classes else (float(y.mean()), float(y.std()) or 1.0)
    target = torch.as_tensor(
        y if n_classes else (y - mean) / deviation, dtype=torch.long if n_classes else torch.float32
    )
    loss_of = (
        torch.nn.functional.cross_entropy if n_classes else lambda out, want: ((out.squeeze(1) - want) ** 2).mean()
    )
    codes, optimiser = torch.from_numpy(letters), torch.optim.Adam(network.parameters(), lr=2e-3, weight_decay=1e-4)
    best, kept, since = np.inf, None, 0
    for _ in range(EPOCHS):
        network.train()
        for chosen in fit[torch.randperm(len(fit), generator=generator)].split(BATCH):
            optimiser.zero_grad()
            loss_of(network(_one_hot(codes[chosen])), target[chosen]).backward()
            optimiser.step()
        if not len(held):
            continue
        value = float(loss_of(_answers(network, codes[held]), target[held]))
        if value < best:
            best, since = value, 0
            kept = {name: part.detach().clone() for name, part in network.state_dict().items()}
        else:
            since += 1
            if since == PATIENCE:
                break
    if kept is not None:
        network.load_state_dict(kept)
    found = _answers(network, torch.from_numpy(test))
    return found.softmax(dim=1).double().numpy() if n_classes else found.squeeze(1).double().numpy() * deviation + mean


def _one_hot(codes):
    import torch

    return torch.nn.functional.one_hot(codes.long(), 5)[..., :4].transpose(1, 2).float()


def _answers(network, codes):
    import torch

    network.eval()
    with torch.no_grad():
        return torch.cat([network(_one_hot(part)) for part in codes.split(1024)])


def _network(outputs: int):
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.filters = nn.Conv1d(4, FILTERS, WIDTH, padding=WIDTH // 2)
            self.head = nn.Sequential(
                nn.Dropout(0.2), nn.Linear(2 * FILTERS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
            )

        def forward(self, letters):
            found = torch.relu(self.filters(letters))
            return self.head(torch.cat([found.amax(dim=2), found.mean(dim=2)], dim=1))

    return Network()
