"""The base of every section: unknown keys are errors that say which key was probably meant."""

import re
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bmfm_pipeline.errors import ConfigError, did_you_mean

# Hydra's own keys: where they may stand is decided when targets are checked; sections do not keep them.
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
# What pydantic adds to the place of a key whose value may have one of several types.
_BRANCH = re.compile(r"(dict|list|tuple|literal|union|constrained-\w+|function-\w+)(\[.*\])?|int|float|str|bool")
_SIMPLER = {
    "model_type": "a mapping of keys is needed",
    "dict_type": "a mapping of keys is needed",
    "list_type": "a list is needed",
    "missing": "is required",
}


class Absent(NamedTuple):
    """A key of bmfm_targets that this version does not offer: the values that mean "off", and what to do instead."""

    off: tuple = (None,)
    instead: str = "remove it"


class Section(BaseModel):
    """A section of a config.

    `legacy` maps old spellings to today's. `absent` are keys of existing configs whose work this version does not do: accepted
    where they are off, refused where they would be silently ignored.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())
    legacy: ClassVar[dict[str, str]] = {}
    absent: ClassVar[dict[str, Absent]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {name: value for name, value in values.items() if name not in HYDRA_KEYS}
        for old, new in cls.legacy.items():
            if old in values:
                if new in values and values[new] not in (None, values[old]):
                    raise ValueError(
                        f"'{old}' is the older spelling of '{new}', and both are given with different values; keep one"
                    )
                values[new] = values.pop(old)
        for name in cls.absent.keys() & values.keys():
            value = values.pop(name)
            if value not in cls.absent[name].off:
                raise ValueError(
                    f"'{name}' is a key of bmfm_targets that this version does not offer (found {value!r}); {cls.absent[name].instead}"
                )
        known = [*cls.model_fields, *cls.legacy]
        for name in values:
            if name not in known:
                hint = did_you_mean(name, known, f"known keys: {', '.join(sorted(cls.model_fields))}")
                raise ValueError(f"unknown key '{name}'; {hint}")
        return values


def readable(error: ValidationError, section: str = "") -> ConfigError:
    """A pydantic error as one line per key, each with its dotted path, what is wrong and what was found."""
    problems: dict[str, list[str]] = {}
    found: dict[str, str] = {}
    for problem in error.errors():
        parts = [section] if section else []
        parts += [str(part) for part in problem["loc"] if not _BRANCH.fullmatch(str(part))]
        path = ".".join(parts)
        message = _SIMPLER.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
        problems.setdefault(path, []).append(message)
        value = problem.get("input")
        if problem["type"] not in ("value_error", "missing") and not isinstance(value, dict | list):
            found[path] = f" (found {value!r})"
    lines = []
    for path, messages in problems.items():
        text = ", or: ".join(dict.fromkeys(messages)) + found.get(path, "")
        lines.append(f"{path}: {text}" if path else text)
    return ConfigError("\n".join(lines))
