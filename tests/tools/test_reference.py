"""docs/reference.md matches the code."""

import re

from nanogpt.params import flatten, load_params
from tests.conftest import BUILT_IN, REPOSITORY, committed_params
from tools.reference import METRIC_NOTES, PAGE, metrics, page


def test_the_page_is_as_the_code_has_it() -> None:
    texts = [(REPOSITORY / PAGE).read_text(encoding="utf-8"), page()]
    if load_params(REPOSITORY / "params.yaml") != committed_params():  # a user's own, whose values it need not have
        texts = [re.sub(r"^(\| `\w+\.\w+` \|) `.*?` \|", r"\1", text, flags=re.MULTILINE) for text in texts]
    assert texts[0] == texts[1], "run `python -m tools reference`"


def test_the_built_in_experiment_has_the_keys_and_comments_of_params_yaml() -> None:
    keys_and_comments = (
        re.findall(r"^ *(\w+:|#).*?(#.*)?$", path.read_text(encoding="utf-8"), re.MULTILINE)
        for path in (BUILT_IN, REPOSITORY / "params.yaml")
    )
    assert next(keys_and_comments) == next(keys_and_comments), "change tests/params.yaml as you changed params.yaml"


def test_every_key_and_every_metric_is_there() -> None:
    text = page()
    assert [key for key in flatten(committed_params()) if f"| `{key}` |" not in text] == []
    assert set(metrics()) == METRIC_NOTES.keys()
