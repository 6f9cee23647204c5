"""Keeping passwords and tokens out of everything that is printed, logged or stored."""

from __future__ import annotations

import re

# Up to the last @: SQLAlchemy takes passwords with a slash in them, requests those with an @.
_USER_INFO = re.compile(r"(://)(?:[^\s/@:?#]*:\S*|[^\s/]*)@")
_SECRET_QUERY = re.compile(
    r"([?&][^=&\s]*(?:pass|pwd|secret|token|key|cred|sig|odbc_connect)[^=&\s]*=)[^&\s]*", re.IGNORECASE
)


def redact(text: str) -> str:
    """`text` with user names, passwords and secret query values of every URI in it replaced by ***."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))
