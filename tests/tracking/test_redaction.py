"""Secrets in URLs and headers are removed from every line that is shown or stored."""

import pytest

from tracking.redaction import redact

SECRET = "s3cret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://user:pw@host/x\nfailed", "at http://***@host/x failed"),
        ("http://user:s3cret@host:5000", "http://***@host:5000"),
        ("http://s3cret@host", "http://***@host"),
        ("http://user:pa/s3cret@host:5000/x", "http://***@host:5000/x"),
        ("http://user:12/s3cret@host", "http://***@host"),
        ("http://user:p@s3cret@host/x", "http://***@host/x"),
        ("http://user:p@/s3cret@host/x", "http://***@host/x"),
        ("http://user:p@a/s3cret@host/x", "http://***@host/x"),
        ("http://user:p?s3cret@host/x", "http://***"),
        ("http://user:p#s3cret@host/x", "http://***"),
        ("http://user:p[s3cret@host/x", "http://***@host/x"),
        ("postgresql+psycopg2://user:a/s3cret@[::1]:5432/db", "postgresql+psycopg2://***@[::1]:5432/db"),
        ("postgresql://host/db?password=s3cret", "postgresql://host/db?***"),
        ("http://host/?token=a@s3cret", "http://***"),
        ("http://host/x?s3cret", "http://host/x?***"),
        ("http://host/#/x?t=s3cret", "http://host/#/x?***"),
        ("s3://user:s3cret@bucket", "s3://***@bucket"),
        ("(Caused by x: 'http://u:s3cret@h/?a=s3cret')", "(Caused by x: 'http://***@h/?***')"),
        ("url: /api/2.0/x?experiment=1&token=s3cret (Caused", "url: /api/2.0/x?*** (Caused"),
        ("got Basic s3cretQ== and Bearer s3cret.a-b", "got Basic *** and Bearer ***"),
        ("authorization: basic s3cretQ==", "authorization: ***"),
        ("a basic model", "a basic model"),
        ("{'Authorization': 'Token s3cret', 'Accept': 'x'}", "{'Authorization': '***', 'Accept': 'x'}"),
        ('{\\"authorization\\": \\"s3cret\\", \\"a\\": 1}', '{\\"authorization\\": \\"***\\", \\"a\\": 1}'),
        ("Proxy-Authorization: Digest user=s3cret, response=s3cret\nHost: x", "Proxy-Authorization: *** Host: x"),
        ("Cookie: session=s3cret; a=s3cret", "Cookie: ***"),
        ("X-Api-Key: s3cret", "X-Api-Key: ***"),
        ("X-Amz-Security-Token: s3cret", "X-Amz-Security-Token: ***"),
        ("sqlite:////a b/mlflow.db", "sqlite:////a b/mlflow.db"),
        ("see http://host/x? and a@b.c", "see http://host/x? and a@b.c"),
        ("http://host/experiments/1, (http://host/#/runs)", "http://host/experiments/1, (http://host/#/runs)"),
        ("step 3: what? x = 1", "step 3: what? x = 1"),
    ],
)
def test_users_queries_and_headers_are_removed(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert SECRET not in shown


@pytest.mark.parametrize("password", ["with a s3cret", "quote's3cret", 's3"cret', "a/b c@s3cret", "(s3cret)"])
def test_the_tracking_uri_is_recognised_whatever_its_password_contains(
    password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"postgresql://user:{password}@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert redact(uri) == "postgresql://***@host/db"
    assert redact(f"cannot reach {uri} now") == "cannot reach postgresql://***@host/db now"
