"""Word-level vocabularies, one per field, stored as Hugging Face tokenizer folders."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError

# Ids 0 to 4 in every vocabulary, as published checkpoints of this family have them.
SPECIAL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
UNK, SEP, PAD, CLS, MASK = range(5)
# Where a folder keeps its tokens, the most telling file first.
FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
# All fields in one file, as older folders have them: {field: tokens in id order}.
OLDER_FILE = "multifield_vocab.json"


class Vocabulary:
    """Tokens of one field in id order; the first `n_special` of them are special.

    `ids` maps whole words exactly (case matters); unknown ones become [UNK] = 0. `subwords`: the tokens are pieces that words are cut
    into by rules which are not kept here; see `SequenceTokenizer`.
    """

    def __init__(self, tokens: Sequence[str], n_special: int = len(SPECIAL_TOKENS), subwords: bool = False):
        self.tokens = list(tokens)
        self.n_special = n_special
        self.subwords = subwords
        self._index = {token: index for index, token in enumerate(self.tokens)}
        if len(self._index) != len(self.tokens):
            seen: set[str] = set()
            twice = sorted({token for token in self.tokens if token in seen or seen.add(token)})
            raise DataError(f"vocabulary: tokens given twice: {', '.join(twice[:10])}")
        if tuple(self.tokens[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise DataError(
                f"vocabulary: must begin with {', '.join(SPECIAL_TOKENS)}, found {', '.join(self.tokens[:5])}"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        return token in self._index

    def ids(self, words: Iterable[str]) -> np.ndarray:
        """int32 ids of `words`; 0 where a word is unknown."""
        return np.fromiter((self._index.get(word, UNK) for word in words), dtype=np.int32)

    def token_values(self) -> np.ndarray:
        """float64 (len,): the number that each token spells, nan for tokens that are no numbers."""

        def value(token: str) -> float:
            try:
                return float(token)
            except ValueError:
                return math.nan

        return np.array(
            [math.nan if index < self.n_special else value(token) for index, token in enumerate(self.tokens)]
        )

    def value_ids(self) -> np.ndarray:
        """int32 (largest value + 1,): token id of each whole value; [UNK] where there is none. Empty when no token is a number."""
        values = self.token_values()
        whole = np.flatnonzero(np.isfinite(values) & (values >= 0) & (values == np.floor(values)))
        table = np.zeros(int(values[whole].max()) + 1 if len(whole) else 0, dtype=np.int32)
        table[values[whole].astype(int)] = whole
        return table

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `folder` so that transformers' PreTrainedTokenizerFast opens it. Raises DataError for subwords."""
        if self.subwords:
            raise DataError(
                f"{folder}: pieces of sequences cannot be saved without the rules that cut them; copy their folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        special = [
            {
                "id": index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in enumerate(self.tokens[: self.n_special])
        ]
        around = {"single": _template("A"), "pair": [*_template("A"), *_template("B")[1:]]}
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                **around,
                "special_tokens": {
                    token: {"id": token, "ids": [self._index[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")
                },
            },
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": self._index, "unk_token": "[UNK]"},
        }
        names = {
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "padding_side": "right",
            **names,
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1))
        (folder / "vocab.txt").write_text("".join(token + "\n" for token in self.tokens))

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        """Read a Hugging Face fast-tokenizer folder (tokenizer.json), or an older one that has only vocab.json or vocab.txt."""
        file = next((Path(folder) / name for name in FILES if (Path(folder) / name).exists()), None)
        if file is None:
            raise DataError(f"{folder}: holds no {', no '.join(FILES)}")
        if file.name == "vocab.txt":
            return cls._leading_special(file.read_text().removesuffix("\n").split("\n"))
        if file.name == "vocab.json":
            vocab = json.loads(file.read_text())
            return cls._leading_special(_in_id_order(vocab, file))
        stored = json.loads(file.read_text())
        vocab = dict(stored["model"]["vocab"])
        for token in stored.get("added_tokens", []):
            vocab[token["content"]] = token["id"]
        tokens = _in_id_order(vocab, file)
        # The read-depth tokens [S] and [T] are ordinary tokens even where a folder lists them as special.
        special = {
            token["id"]
            for token in stored.get("added_tokens", [])
            if token.get("special") and token["content"] not in ("[S]", "[T]")
        }
        n_special = next((index for index in range(len(tokens)) if index not in special), len(tokens))
        whole = stored["model"].get("type", "WordLevel") == "WordLevel" and not stored.get("pre_tokenizer")
        return cls(tokens, max(n_special, len(SPECIAL_TOKENS)), not whole)

    @classmethod
    def _leading_special(cls, tokens: list[str]) -> "Vocabulary":
        """Without a list of special tokens: the leading ones in square brackets that name a special token or a further [CLS_n]."""
        n_special = 0
        while n_special < len(tokens) and (
            tokens[n_special] in SPECIAL_TOKENS or tokens[n_special].startswith("[CLS_")
        ):
            n_special += 1
        return cls(tokens, max(n_special, len(SPECIAL_TOKENS)))


def _in_id_order(vocab: dict[str, int], file: Path) -> list[str]:
    tokens = [token for token, _ in sorted(vocab.items(), key=lambda entry: entry[1])]
    if sorted(vocab.values()) != list(range(len(tokens))):
        raise DataError(f"{file}: token ids are not 0 to {len(tokens) - 1} without gaps")
    return tokens


def _template(name: str) -> list[dict]:
    kind = 0 if name == "A" else 1
    return [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": name, "type_id": kind}},
        {"SpecialToken": {"id": "[SEP]", "type_id": kind}},
    ]


class MultiFieldVocabulary(dict[str, Vocabulary]):
    """{field name: Vocabulary}, stored as `folder/tokenizers/<field>/`."""

    def save(self, folder: str | Path) -> None:
        for name, vocabulary in self.items():
            vocabulary.save(Path(folder) / "tokenizers" / name)

    @classmethod
    def load(cls, folder: str | Path) -> "MultiFieldVocabulary":
        """Read all fields below `folder/tokenizers` (or `folder` itself, when that is the tokenizers folder).

        A folder without them may hold multifield_vocab.json, as older ones do; `save` writes it in today's layout.
        """
        base = Path(folder)
        base = base / "tokenizers" if (base / "tokenizers").is_dir() else base
        if not base.is_dir():
            raise DataError(f"{folder}: {'is a file, not' if base.exists() else 'no such folder:'} a tokenizer folder")
        found = {
            path.name: Vocabulary.load(path)
            for path in sorted(base.iterdir())
            if any((path / name).exists() for name in FILES)
        }
        if not found and (base / OLDER_FILE).exists():
            found = _all_in_one(base / OLDER_FILE)
        if not found:
            raise DataError(f"{folder}: holds no tokenizers/<field>/tokenizer.json and no {OLDER_FILE}")
        return cls(found)

    def prefix_ids(self, tokens: Sequence[str] | None) -> tuple[int, ...]:
        """Token ids that stand before the genes of every cell: those of `tokens`, or of [CLS] alone.

        Raises DataError when a vocabulary lacks one of them, or has it under another id than the others.
        """
        ids = {name: vocabulary.ids(tokens or ["[CLS]"]).tolist() for name, vocabulary in self.items()}
        for name, found in ids.items():
            missing = [token for token in tokens or () if token not in self[name]]
            if missing:
                special = [token for token in self[name].tokens if token.startswith("[")]
                raise DataError(
                    f"tokenizer.prepend_tokens: the vocabulary of '{name}' has no {', '.join(missing)}; its tokens in brackets are "
                    f"{', '.join(special[:8])}{', ...' if len(special) > 8 else ''}"
                )
            first, expected = next(iter(ids.items()))
            if found != expected:
                raise DataError(
                    f"tokenizer.prepend_tokens: {', '.join(tokens or ())} have the ids {expected} in the vocabulary of '{first}' and "
                    f"{found} in that of '{name}'; one position of a cell must mean the same in all fields"
                )
        return tuple(next(iter(ids.values())))


def _all_in_one(file: Path) -> dict[str, Vocabulary]:
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: is not JSON ({error})") from None
    if not isinstance(stored, dict) or not all(isinstance(tokens, list | dict) for tokens in stored.values()):
        raise DataError(f"{file}: must map each field to its tokens in id order")
    return {
        name: Vocabulary._leading_special(tokens if isinstance(tokens, list) else _in_id_order(tokens, file))
        for name, tokens in stored.items()
    }
