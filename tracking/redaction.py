"""Drops what is secret from a text before it is shown or kept: the users and queries of addresses, and headers."""

import os
import re

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"]+")
_QUERY = re.compile(r"\?[^\s'\")]*=[^\s'\")]*")  # of an address whose beginning stands elsewhere
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
    """Text in which *** stands for the user part and the query of each address, and for the value of secret headers.

    MLFLOW_TRACKING_URI is recognised as a whole, whatever characters its password holds.
    """
    own = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "://" in own:
        text = text.replace(own, _address(own))
    text = _HEADER.sub(lambda found: f"{found[1]}{found[2]}{found[3] or ''}***", text)
    text = _ADDRESS.sub(lambda found: _address(found[0]), text)
    return _SCHEME.sub(r"\1 ***", _QUERY.sub("?***", text))


def _address(address: str) -> str:
    """One address without user part and query. Where an @ leaves it open which part is which, only the scheme stays.

    Not by urllib, which takes a slash in a password for the beginning of the path, and shows what follows it.
    """
    scheme, _, rest = address.partition("://")
    user, at, place = rest.rpartition("@")
    if re.search(r"[?#]", user):  # of a password, or what precedes an @ in a query
        return f"{scheme}://***"
    place, question, query = place.partition("?")
    closing = ")" if query.endswith(")") else ""  # of the sentence around it
    hidden = "***" if query.removesuffix(closing) else ""
    return f"{scheme}://{'***' if at else ''}{at}{place}{question}{hidden}{closing}"
