"""What a gene's expression is set to in silico: `KLF1=0`, `KLF1=MAX * 0.5, MAP2K6=X + 1`; parsed by a grammar of its own, never evaluated as code.

    perturbation := target ("," target)*        target := GENE [ "=" sum ]
    sum          := product (("+" | "-") product)*
    product      := factor (("*" | "/") factor)*
    factor       := ["-"] ( NUMBER | MAX | MIN | MEAN | X | "(" sum ")" )

MAX, MIN and MEAN are those of the gene over the cells of the input, X is the value of the cell itself.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from bmfm_pipeline.errors import ConfigError

WORDS = ("MAX", "MIN", "MEAN", "X")
_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)|([A-Za-z]+)|([-+*/()]))")
MOST_CHARACTERS, DEEPEST = 200, 20
# (the value of the cell, {MAX, MIN, MEAN of the gene}) -> what it is set to.
Rule = Callable[[float, dict[str, float]], float]


@dataclass(frozen=True)
class GeneChange:
    """One gene and what becomes of its value; `rule` None leaves the value as it is."""

    gene: str
    text: str
    rule: Rule | None


@dataclass(frozen=True)
class Change:
    """One perturbation in silico, of one gene or several. `name`: the genes joined by "_", as perturbations are called."""

    text: str
    genes: tuple[GeneChange, ...]

    @property
    def name(self) -> str:
        return "_".join(sorted(entry.gene for entry in self.genes))


def read_change(text: str) -> Change:
    """Parse `GENE=EXPRESSION`, several of them between commas, or a bare gene name. Raises ConfigError that points at what it cannot read."""
    parts = [part.strip() for part in text.split(",")]
    found = []
    for part in parts:
        gene, sign, expression = (word.strip() for word in part.partition("="))
        if not gene:
            raise ConfigError(f"--perturb {text!r}: names no gene; write GENE=0, or GENE=MAX * 0.5")
        found.append(GeneChange(gene, expression, parse(expression) if sign else None))
    genes = [entry.gene for entry in found]
    if twice := sorted({gene for gene in genes if genes.count(gene) > 1}):
        raise ConfigError(f"--perturb {text!r}: {', '.join(twice)} is named twice; name each gene once")
    return Change(text.strip(), tuple(found))


def parse(text: str) -> Rule:
    """The rule that an expression says. Raises ConfigError with the place of what it cannot read."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"expression of {len(text)} characters; {MOST_CHARACTERS} are the most")
    tokens = _tokens(text)
    rule, rest = _sum(tokens, text, 0)
    if rest:
        _refuse(text, rest[0])
    return rule


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """(kind, token, place) of each token; kind is number, word or sign."""
    found, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            _refuse(text, ("", text[at:].strip()[:1], at))
        kind = ("number", "word", "sign")[match.lastindex - 1]
        found.append((kind, match.group(match.lastindex), match.start(match.lastindex)))
        at = match.end()
    return found


def _refuse(text: str, token: tuple[str, str, int] | None) -> None:
    where = f"at {token[1]!r} (character {token[2] + 1})" if token else "at its end"
    raise ConfigError(
        f"expression {text!r}: cannot be read {where}; it has numbers, {', '.join(WORDS)}, + - * / and brackets, such as MAX * 0.5"
    )


def _sum(tokens, text: str, depth: int):
    return _from_the_left(("+", "-"), _product, tokens, text, depth)


def _product(tokens, text: str, depth: int):
    return _from_the_left(("*", "/"), _factor, tokens, text, depth)


def _from_the_left(signs: tuple[str, str], part, tokens, text: str, depth: int):
    """Parts with one of the signs between them, put together from the left; (rule, tokens that are left)."""
    left, rest = part(tokens, text, depth)
    while rest and rest[0][1] in signs:
        sign = rest[0][1]
        right, rest = part(rest[1:], text, depth)
        left = _both(sign, left, right, text)
    return left, rest


def _factor(tokens, text: str, depth: int):
    if not tokens or depth > DEEPEST:
        _refuse(text, tokens[0] if tokens else None)
    kind, token, _ = tokens[0]
    if token == "-":
        inner, rest = _factor(tokens[1:], text, depth + 1)
        return (lambda x, gene: -inner(x, gene)), rest
    if token == "(":
        inner, rest = _sum(tokens[1:], text, depth + 1)
        if not rest or rest[0][1] != ")":
            _refuse(text, rest[0] if rest else None)
        return inner, rest[1:]
    if kind == "number":
        number = float(token)
        return (lambda x, gene: number), tokens[1:]
    word = token.upper()
    if kind != "word" or word not in WORDS:
        _refuse(text, tokens[0])
    if word == "X":
        return (lambda x, gene: x), tokens[1:]
    return (lambda x, gene: gene[word]), tokens[1:]


def _both(sign: str, left: Rule, right: Rule, text: str) -> Rule:
    def rule(x: float, gene: dict[str, float]) -> float:
        a, b = left(x, gene), right(x, gene)
        if sign == "/":
            if b == 0:
                raise ConfigError(f"expression {text!r}: divides by 0")
            return a / b
        return a + b if sign == "+" else a - b if sign == "-" else a * b

    return rule


def value_of(change: GeneChange, x: float, gene: dict[str, float]) -> float:
    """What the gene's value becomes. Raises ConfigError where that is negative or no number."""
    value = x if change.rule is None else change.rule(x, gene)
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{change.gene}={change.text}: gives {value:g}, and expression is 0 or more")
    return value
