"""Redaction: user names, passwords, keys and tokens inside URIs, removed from what is shown or stored.

Whatever leaves the memory of a process passes through here: messages of errors, progress lines, logs, `config.yaml`,
the meta data of checkpoints, reports and trackers. Redacting twice changes nothing.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

# The user of these is a container or an account, without which the URI is another one: only its password is hidden.
_NAMED_BY_USER = ("abfs", "abfss", "hdfs", "viewfs")
_SECRET_NAME = re.compile(r"key|secret|token|passw|pwd|sig|cred|auth|sas|jwt", re.IGNORECASE)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*$")
_LONGEST_SCHEME = 32
# What follows a scheme: up to a blank, a quote or a tag, or to the next URI, be it the value of an option.
_AFTER_SCHEME = re.compile(r"""(?<=[A-Za-z0-9+.\-])://(?:(?!://)[^\s'"<>])+""")
# Digits behind the colon are a port. A password with a "/" that nobody has encoded ends at the last "@".
_USER = re.compile(r"([^/:@]*):(?!\d+(?:/|$))(?:[^/]*|.*)@|[^/:@]+@")
_OPTION = re.compile(r"([?&;])([\w.\-%]{1,64})=([^&;]*)")


def redact(text: str) -> str:
    """Hide the credentials of every URI inside a text.

    Args:
        text: any text, such as a URI, a message or a document.

    Returns:
        The text with `***` in place of users, passwords, and the values of options such as `secret_key` or `sig`.

    Example:
        >>> redact("cannot read 's3://KEY:SECRET@bucket/df.csv?region=eu-west-1&session_token=T'")
        "cannot read 's3://***@bucket/df.csv?region=eu-west-1&session_token=***'"
        >>> redact("abfs://container@account.dfs.core.windows.net/df.csv")
        'abfs://container@account.dfs.core.windows.net/df.csv'
    """
    return _AFTER_SCHEME.sub(_without_credentials, text)


def redacted(tree: Any) -> Any:
    """Copy plain data (mappings, lists, texts, numbers) with `redact` applied to every text, keys included."""
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, dict):
        return {redacted(key): redacted(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted(value) for value in tree]
    return tree


def is_redacted(uri: str) -> bool:
    """Say whether credentials of a URI have been replaced by `***`: nothing can be reached by it any more.

    Example:
        >>> is_redacted("s3://***@bucket/df.csv"), is_redacted("s3://bucket/***.csv")
        (True, False)
    """
    return "://" in uri and any(mark in uri for mark in (f"://{HIDDEN}@", f":{HIDDEN}@", f"={HIDDEN}"))


def _without_credentials(match: re.Match[str]) -> str:
    before = match.string[max(0, match.start() - _LONGEST_SCHEME) : match.start()]
    scheme = _SCHEME.search(before)
    place, mark, options = match[0].removeprefix("://").partition("?")
    user = _USER.match(place)
    if user and scheme and scheme[0].lower() in _NAMED_BY_USER:
        place = place if user[1] is None else f"{user[1]}:{HIDDEN}@{place[user.end() :]}"
    elif user:
        place = f"{HIDDEN}@{place[user.end() :]}"
    return "://" + _OPTION.sub(_without_value, f"{place}{mark}{options}")


def _without_value(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    decoded = unquote(value)
    is_secret = _SECRET_NAME.search(unquote(name)) or redact(decoded) != decoded
    return f"{mark}{name}={HIDDEN}" if is_secret and value else match[0]
