"""Configs are kept with every result, so passwords and keys have no place in them; the environment has."""

import os
import re
from typing import Any

from bmfm_pipeline.errors import ConfigError

_SHAPES = re.compile(
    r"://[^/\s:@]+:[^/\s@]+@|[?&](?:X-Amz-Signature|X-Amz-Credential|sig|token|access_token)=|\bA(?:KIA|SIA)[0-9A-Z]{16}\b"
    r"|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bpnu_[A-Za-z0-9]{20,}"
)
# TOKENIZERS_PARALLELISM is none, and neither are files that hold a secret.
_NAMES = re.compile(r"(SECRET|PASSWORD|PASSWD|TOKEN(?!IZ)|API_?KEY|ACCESS_KEY)(?!.*_(FILE|PATH|DIR)$)", re.IGNORECASE)
_SHORTEST = 8  # shorter ones occur in any text


def refuse_secrets(values: Any) -> None:
    """ConfigError, without the value, where a text of nested dictionaries and lists holds a password, a key or a signed address.

    The values of environment variables with such names (AWS_SECRET_ACCESS_KEY, HF_TOKEN ...) count as well.
    """
    known = [value for name, value in os.environ.items() if len(value) >= _SHORTEST and _NAMES.search(name)]
    _look(values, "", known)


def _look(values: Any, name: str, known: list[str]) -> None:
    if isinstance(values, dict):
        for key, entry in values.items():
            _look(entry, f"{name}.{key}" if name else str(key), known)
    elif isinstance(values, list | tuple):
        for entry in values:
            _look(entry, name, known)
    elif isinstance(values, str) and (_SHAPES.search(values) or any(secret in values for secret in known)):
        raise ConfigError(
            f"{name}: holds a password, a key or a signed address. Configs are kept with results, so write the address without it, and set "
            "what it needs in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; HF_TOKEN)"
        )
