"""The base of every section: unknown keys are errors that say which key was probably meant."""

import difflib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bmfm_pipeline.errors import ConfigError

# Hydra's own keys: where they may stand is decided when targets are checked; sections do not keep them.
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")


class Section(BaseModel):
    """A section of a config. `legacy` maps old spellings to today's; each use is remembered in `notes_`."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())
    legacy: ClassVar[dict[str, str]] = {}

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
        known = [*cls.model_fields, *cls.legacy]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, 1, 0.6)
                hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(sorted(cls.model_fields))}"
                raise ValueError(f"unknown key '{name}'; {hint}")
        return values


def readable(error: ValidationError, section: str = "") -> ConfigError:
    """A pydantic error as one line per problem, each with the dotted path of its key."""
    lines = []
    for problem in error.errors():
        path = ".".join(
            str(part) for part in ([section] if section else []) + list(problem["loc"]) if part not in ("dict", "list")
        )
        message = problem["msg"].removeprefix("Value error, ")
        found = problem.get("input")
        shown = (
            f" (found {found!r})"
            if problem["type"] not in ("value_error",) and not isinstance(found, dict | list)
            else ""
        )
        lines.append(f"{path}: {message}{shown}" if path else message)
    return ConfigError("\n".join(dict.fromkeys(lines)))
