"""Names of the ways in which a cell's embedding is taken from a model: first_token, pooling_layer, mean_pooling, a position, or several joined."""

from collections.abc import Sequence
from typing import Any

from bmfm_pipeline.errors import ConfigError, did_you_mean

METHODS = ("first_token", "pooling_layer", "mean_pooling")
JOINED_BY = "+"
Pooling = str | int | list[str | int]


def read_pooling(word: Any) -> Pooling:
    """A method, a position counted from 0, or a list of them: `first_token`, `3`, `first_token+mean_pooling`. Raises ConfigError."""
    parts = word if isinstance(word, list | tuple) else str(word).split(JOINED_BY)
    found = [_one(part) for part in parts]
    if not found:
        raise ConfigError("pooling: an empty list; name at least one method")
    return found[0] if len(found) == 1 and not isinstance(word, list | tuple) else found


def _one(part: Any) -> str | int:
    text = str(part).strip()
    if text in METHODS:
        return text
    if text.isdigit():
        return int(text)
    if text.removeprefix("-").isdigit():
        raise ConfigError(f"pooling: {text} would count from the end of a batch; name a position from 0")
    known = f"there are {', '.join(METHODS)}, a position from 0, or several joined with {JOINED_BY}"
    raise ConfigError(f"pooling: unknown method '{text}'; {did_you_mean(text, METHODS, known)}")


def pooling_name(pooling: Pooling) -> str:
    """How files and obsm keys call it: first_token, position_3, first_token+mean_pooling."""
    parts = pooling if isinstance(pooling, list) else [pooling]
    return JOINED_BY.join(f"position_{part}" if isinstance(part, int) else part for part in parts)


def named_poolings(words: Sequence[Any]) -> dict[str, Pooling]:
    """{name: pooling} in the order given, each once."""
    return {pooling_name(pooling): pooling for pooling in map(read_pooling, words)}


def atoms(poolings: Sequence[Pooling]) -> list[str | int]:
    """The methods that these are made of, each once: what is computed."""
    return list(dict.fromkeys(part for entry in poolings for part in (entry if isinstance(entry, list) else [entry])))
