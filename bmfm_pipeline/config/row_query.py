"""Conditions on the rows of a table, as text: columns, comparisons, `in`, `and`, `or`, `not`. Read by a grammar, never run as code."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from bmfm_pipeline.errors import ConfigError, did_you_mean

_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
# Text between quotes stays as it is; a name between backticks may have blanks.
_PARTS = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|`([^`]+)`""")
LONGEST = 4000
ALLOWED = "column names (`between backticks` where they have blanks), values, == != < <= > >=, in, not in, and, or, not, brackets"


class RowQuery:
    """A condition such as `Species == "Homo sapiens" and not Tumor in ["yes"]`, in the words of pandas.

    `columns` are those of the table; a row is a mapping of them, None where a value is missing: no comparison holds there but `!=` and
    `not in`. Raises ConfigError for anything that is no such condition; `place` is the key that messages name.
    """

    def __init__(self, text: str, columns: list[str], place: str):
        self.text, self.place, self._columns = text, place, columns
        self._known: dict[str, str] = {}
        if len(text) > LONGEST:
            raise self._refused(f"it has {len(text)} characters, more than {LONGEST}")
        try:
            tree = ast.parse(_PARTS.sub(self._without_backticks, text.strip()), mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise self._refused(f"it cannot be read ({getattr(error, 'msg', error)})") from None
        self._holds = self._condition(tree.body)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return bool(self._holds(row))

    def _without_backticks(self, found: re.Match) -> str:
        if found[1] is not None:
            return found[1]
        name = f"column_{len(self._known)}_"
        self._known[name] = found[2]
        return name

    def _condition(self, node: ast.AST) -> Callable[[Mapping[str, Any]], bool]:
        if isinstance(node, ast.BoolOp):
            parts, how = [self._condition(value) for value in node.values], all if isinstance(node.op, ast.And) else any
            return lambda row: how(part(row) for part in parts)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
            parts = [self._condition(node.left), self._condition(node.right)]
            how = all if isinstance(node.op, ast.BitAnd) else any
            return lambda row: how(part(row) for part in parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
            part = self._condition(node.operand)
            return lambda row: not part(row)
        if isinstance(node, ast.Compare):
            return self._compared(node)
        if isinstance(node, ast.Name):
            part = self._value(node)
            return lambda row: str(part(row)).lower() in ("true", "yes", "1", "1.0")
        raise self._refused(f"'{_shown(node)}' is no condition")

    def _compared(self, node: ast.Compare) -> Callable[[Mapping[str, Any]], bool]:
        values = [node.left, *node.comparators]
        parts = []
        for how, left, right in zip(node.ops, values, values[1:], strict=False):
            if isinstance(how, ast.In | ast.NotIn) or (
                isinstance(how, ast.Eq | ast.NotEq) and isinstance(right, ast.List | ast.Tuple)
            ):
                if not isinstance(right, ast.List | ast.Tuple):
                    raise self._refused(f"what follows `in` must be a list, found '{_shown(right)}'")
                members = [self._constant(entry) for entry in right.elts]
                parts.append((self._value(left), _member(isinstance(how, ast.NotIn | ast.NotEq), members)))
            elif type(how) in _COMPARISONS:
                parts.append(self._pair(how, left, right))
            else:
                raise self._refused("`is` compares no values; write ==")
        return lambda row: all(holds(row, value(row)) for value, holds in parts)

    def _pair(self, how: ast.cmpop, left: ast.AST, right: ast.AST):
        compare, other = _COMPARISONS[type(how)], self._value(right)
        differs = isinstance(how, ast.NotEq)
        ordered = not isinstance(how, ast.Eq | ast.NotEq)

        def holds(row: Mapping[str, Any], value: Any) -> bool:
            against = other(row)
            if value is None or against is None:
                return differs
            value, against = _alike(value, against)
            if ordered and isinstance(value, str) != isinstance(against, str):
                raise ConfigError(
                    f"{self.place}: {self.text!r} compares {value!r} with {against!r}: one is text and one a number"
                )
            return compare(value, against)

        return self._value(left), holds

    def _value(self, node: ast.AST) -> Callable[[Mapping[str, Any]], Any]:
        if isinstance(node, ast.Name):
            name = self._known.get(node.id, node.id)
            if name not in self._columns:
                hint = did_you_mean(name, self._columns, f"its columns are {', '.join(self._columns)}")
                raise self._refused(f"the table has no column '{name}'; {hint}")
            return lambda row: row[name]
        value = self._constant(node)
        return lambda row: value

    def _constant(self, node: ast.AST) -> Any:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node, sign = node.operand, -1
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool):
            return node.value if sign == 1 or isinstance(node.value, str) else -node.value
        raise self._refused(f"'{_shown(node)}' is no column and no value")

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(f"{self.place}: {self.text[:200]!r} is refused: {why}; allowed are {ALLOWED}")


def _shown(node: ast.AST) -> str:
    return ast.unparse(node)[:80]


def _alike(value: Any, other: Any) -> tuple[Any, Any]:
    """Both as they are compared: yes and no of a table are text, true and false of a query too."""
    if isinstance(other, bool) and isinstance(value, str):
        return value.lower(), str(other).lower()
    if isinstance(value, str) and isinstance(other, int | float) and not isinstance(other, bool):
        return value, str(other) if isinstance(other, int) else other
    return value, other


def _member(negated: bool, members: list[Any]):
    def holds(row: Mapping[str, Any], value: Any) -> bool:
        inside = value is not None and any(a == b for a, b in (_alike(value, entry) for entry in members))
        return inside != negated

    return holds
