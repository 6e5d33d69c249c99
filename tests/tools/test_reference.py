"""docs/reference.md matches the code."""

from nanogpt.params import flatten
from tests.conftest import REPOSITORY, committed_params
from tools.reference import METRIC_NOTES, PAGE, metrics, page


def test_the_page_is_as_the_code_has_it() -> None:
    remedy = "run `python -m tools reference`"
    assert (REPOSITORY / PAGE).read_text(encoding="utf-8") == page(), remedy


def test_every_key_and_every_metric_is_there() -> None:
    text = page()
    assert [key for key in flatten(committed_params()) if f"| `{key}` |" not in text] == []
    assert set(metrics()) == METRIC_NOTES.keys()
