"""What went wrong with a remote store: worth another attempt or not, and in words that name what to set."""

import errno
import os
import re
import sys

from bmfm_pipeline.errors import StorageError
from bmfm_pipeline.storage.uris import strip_userinfo

_TRANSIENT_ERRNOS = {errno.EBUSY, errno.EPIPE, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EIO)}
_TRANSIENT_CODES = {
    "500", "502", "503", "504", "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "Throttling",
    "ThrottlingException", "RequestLimitExceeded", "OperationAborted", "ConditionalRequestConflict",
}  # fmt: skip
_SHORTEST_SECRET = 8  # shorter ones, of test servers, occur in any text
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


class RemoteError(StorageError):
    """What a remote store holds could not be learned: it cannot be reached, refuses, or gives more than fits here."""


def endpoint() -> str:
    """The S3 server that the environment names, without credentials."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if os.environ.get(name):
            return strip_userinfo(os.environ[name])
    return "Amazon S3"


def code_of(error: BaseException) -> str:
    """The error code of the S3 server ('NoSuchBucket', '403'), or ''."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        seen = seen.__cause__
    return ""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may well succeed a moment later."""
    if code_of(error) in _TRANSIENT_CODES:
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return _is_network(error)


def _is_network(error: BaseException) -> bool:
    known: list[type] = []
    if botocore := sys.modules.get("botocore.exceptions"):
        if type(error) is botocore.HTTPClientError:  # around anything
            inner = error.kwargs.get("error")
            return isinstance(inner, Exception) and is_transient(inner)
        known += [botocore.ConnectionError, botocore.HTTPClientError]
        known += [botocore.IncompleteReadError, botocore.ResponseStreamingError]
        if isinstance(error, botocore.ProxyConnectionError | botocore.SSLError):
            return False
    if aiohttp := sys.modules.get("aiohttp"):
        known += [aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, aiohttp.ServerDisconnectedError]
    return isinstance(error, tuple(known))


def tells_secrets(error: BaseException) -> bool:
    """Whether the error's own text holds a key or a password."""
    return reason(error) != (" ".join(str(error).split()) or type(error).__name__)


def reason(error: BaseException) -> str:
    """The error in one line, without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    for name in _SECRETS:
        if len(os.environ.get(name, "")) >= _SHORTEST_SECRET:
            text = text.replace(os.environ[name], "***")
    return re.sub(r"://[^/@\s]+@", "://", text)


def in_words(error: BaseException, uri: str, doing: str, attempts: int) -> RemoteError:
    """A RemoteError: what was found, where, what to set."""
    where, code, said = strip_userinfo(str(uri)), code_of(error), reason(error)
    name = type(error).__name__
    if name in ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "ProfileNotFound"):
        return RemoteError(
            f"{where}: no usable credentials were found ({said}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, PermissionError) or code in ("403", "AccessDenied"):
        hint = {
            "InvalidAccessKeyId": "the access key is not known there",
            "SignatureDoesNotMatch": "the secret does not belong to the access key",
            "ExpiredToken": "the session token has expired",
            "RequestTimeTooSkewed": "the clock of this machine is wrong",
        }.get(code, f"this account may not {doing} it, the credentials are wrong, or it does not exist")
        return RemoteError(
            f"{where}: access refused by {endpoint()} ({code or said}): {hint}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "AWS_SESSION_TOKEN (or AWS_PROFILE), and the policy of the bucket"
        )
    if code in (
        "301",
        "307",
        "PermanentRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    ):
        return RemoteError(f"{where}: the bucket lies in another region ({said}); set AWS_DEFAULT_REGION to it")
    if is_transient(error):
        tried = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        return RemoteError(
            f"{where}: {endpoint()} could not be reached, or broke off, in {tried} ({said}); check the network, set AWS_ENDPOINT_URL_S3 "
            "to the address of the server where it is not Amazon's, and run the same command again: what was done already is kept"
        )
    return RemoteError(f"{where}: could not {doing}: {said}")
