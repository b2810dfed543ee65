"""Word-level vocabularies, one per field, stored as Hugging Face tokenizer folders."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bmfm_pipeline.errors import DataError

# Ids 0 to 4 in every vocabulary, as published checkpoints of this family have them.
SPECIAL_TOKENS = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")
UNK, SEP, PAD, CLS, MASK = range(5)
DEFAULT_VALUES = 50
# Where a folder keeps its tokens, the most telling file first.
FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


class Vocabulary:
    """Tokens of one field in id order; the first `n_special` of them are special.

    `ids` maps whole words exactly (case matters); unknown ones become [UNK] = 0.
    """

    def __init__(self, tokens: Sequence[str], n_special: int = len(SPECIAL_TOKENS)):
        self.tokens = list(tokens)
        self.n_special = n_special
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
        """Write `folder` so that transformers' PreTrainedTokenizerFast opens it."""
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
        return cls(tokens, max(n_special, len(SPECIAL_TOKENS)))

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
        """Read all fields below `folder/tokenizers` (or `folder` itself, when that is the tokenizers folder)."""
        base = Path(folder)
        base = base / "tokenizers" if (base / "tokenizers").is_dir() else base
        found = (
            {
                path.name: Vocabulary.load(path)
                for path in sorted(base.iterdir())
                if any((path / name).exists() for name in FILES)
            }
            if base.is_dir()
            else {}
        )
        if not found:
            raise DataError(f"{folder}: holds no tokenizers/<field>/tokenizer.json")
        return cls(found)


def build_vocabularies(genes: Sequence[str], n_values: int | None = None) -> MultiFieldVocabulary:
    """Vocabularies of `genes` (in this order) and of expression values 0 to `n_values` - 1 (50 when unset)."""
    values = [str(value) for value in range(n_values or DEFAULT_VALUES)]
    flags = ["0", "1"]
    words: Mapping[str, Sequence[str]] = {
        "genes": genes,
        "expressions": values,
        "label_expressions": values,
        "perturbations": flags,
    }
    return MultiFieldVocabulary({name: Vocabulary([*SPECIAL_TOKENS, *tokens]) for name, tokens in words.items()})
