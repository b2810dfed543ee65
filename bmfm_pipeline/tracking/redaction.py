"""Secrets never leave: values under secret names, passwords in addresses, signed queries, known token shapes, secret environment values."""

import logging
import os
import re
from functools import lru_cache
from typing import Any

REDACTED = "[redacted]"
_SECRET_WORDS = {
    "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey", "authorization", "bearer",
}  # fmt: skip
_SECRET_PAIRS = ("api_key", "access_key", "secret_key", "private_key", "account_key", "signing_key", "encryption_key")
# Not passwords: hiding the working folder would make every address below it unreadable.
_FOLDERS_OF_A_SHELL = ("PWD", "OLDPWD")
# `tokenizer`, `token_scores`, `pad_token_id` and `mask_token` are words of this field, not secrets.
_SECRET_TOKENS = re.compile(
    r"^(token|.*(auth|access|api|session|refresh|bearer|security|identity|github|gitlab|hf|hub|slack)_?token)$"
)
_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"<>]+@")
_SIGNED = re.compile(
    r"(?P<name>[?&;](?:X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig|token|access_token|api_key|password)=)"
    r"[^&\s'\"<>]+",
    re.IGNORECASE,
)
_SHAPES = re.compile(
    r"\b(?:A(?:KIA|SIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{40,}|glpat-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}"
    r"|sk-[A-Za-z0-9_-]{20,}|xox[abpr]-[A-Za-z0-9-]{10,}|pnu_[A-Za-z0-9]{20,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{5,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----",
    re.DOTALL,
)
_ASSIGNED = re.compile(
    r"(?P<name>\b[A-Za-z0-9_.]*(?:password|passwd|secret|api_?key|access_?key|private_?key|(?:auth|access|session|refresh|api)_?token)"
    r"\s*=\s*)(?P<value>[^\s,;&'\"<>]+)",
    re.IGNORECASE,
)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a key, such as `storage.aws_secret_access_key`, names something that must not be shown."""
    last = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rsplit(".", 1)[-1]).lower().replace("-", "_").replace(" ", "_")
    return (
        bool(_SECRET_WORDS & set(last.split("_")))
        or any(pair in last for pair in _SECRET_PAIRS)
        or bool(_SECRET_TOKENS.match(last))
    )


def _environment_secrets() -> list[str]:
    """Values of environment variables with secret names, longest first; short ones would match by chance."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= 6 and name not in _FOLDERS_OF_A_SHELL and is_secret_name(name)
    }
    return sorted(values, key=len, reverse=True)


def redact_text(text: str) -> str:
    """`text` with every recognised secret replaced by [redacted]."""
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    text = _USERINFO.sub(rf"\g<scheme>{REDACTED}@", text)
    text = _SIGNED.sub(rf"\g<name>{REDACTED}", text)
    text = _ASSIGNED.sub(rf"\g<name>{REDACTED}", text)
    return _SHAPES.sub(REDACTED, text)


class RedactedLines(logging.Formatter):
    """Lines of a log without secrets, whichever library has put them there."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


def redact(value: Any, name: str = "") -> Any:
    """A copy of nested dictionaries and lists in which no secret is left; `name` is the key that holds `value`."""
    if isinstance(value, dict):
        return {key: redact(entry, f"{name}.{key}" if name else str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redact(entry, name) for entry in value]
    if value is None or isinstance(value, bool):
        return value
    if name and is_secret_name(name):
        return REDACTED
    return redact_text(value) if isinstance(value, str) else value
