"""Removes secrets from text before it is shown or stored: credentials and queries of URLs, and secret headers."""

import os
import re

_URL = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"]+")
_QUERY = re.compile(r"\?[^\s'\")]*=[^\s'\")]*")  # of a URL whose beginning stands elsewhere
_SCHEME = re.compile(r"\b(Basic|Bearer) [\w.~+/=-]+")  # of an Authorization header
_HEADER = re.compile(
    r"""\b((?:Proxy-)?Authorization|(?:Set-)?Cookie|X-[\w-]*(?:Key|Token|Secret|Password))(\\?["']?\s*:\s*)"""
    r"""(?:(\\?["'])[^"']*?(?=\\?["'])|[^\n]+)""",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`without_secrets`, on one line."""
    return " ".join(without_secrets(text).split())


def without_secrets(text: str) -> str:
    """Replaces by *** the user part and the query of each URL, and the value of each secret header.

    MLFLOW_TRACKING_URI is recognised as a whole, whatever characters its password contains.
    """
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" in tracking_uri:
        text = text.replace(tracking_uri, _redact_url(tracking_uri))
    text = _HEADER.sub(lambda match: f"{match[1]}{match[2]}{match[3] or ''}***", text)
    text = _URL.sub(lambda match: _redact_url(match[0]), text)
    return _SCHEME.sub(r"\1 ***", _QUERY.sub("?***", text))


def _redact_url(url: str) -> str:
    """Removes user part and query. Where an @ makes it ambiguous which part is which, only the scheme stays.

    Not by urllib, which takes a slash in a password for the start of the path, and shows what follows it.
    """
    scheme, _, rest = url.partition("://")
    user, at, place = rest.rpartition("@")
    if re.search(r"[?#]", user):  # in a password, or a query that contains an @
        return f"{scheme}://***"
    place, question, query = place.partition("?")
    closing = ")" if query.endswith(")") else ""  # of the sentence around it
    hidden = "***" if query.removesuffix(closing) else ""
    return f"{scheme}://{'***' if at else ''}{at}{place}{question}{hidden}{closing}"
