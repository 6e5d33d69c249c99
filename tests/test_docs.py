"""The pages: their links lead somewhere, and the errors that they quote are those of the code."""

import re
from functools import cache
from pathlib import Path

from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [path for path in [*PAGES, *(REPOSITORY / "docs").rglob("*.md")] if path.exists()]
CODE = [path for folder in ("nanogpt", "stages", "tracking", "tools") for path in (REPOSITORY / folder).rglob("*.py")]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@cache
def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_a_page_and_to_a_heading_of_it() -> None:
    wrong = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve() if target else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                wrong.append(f"{page.name}: {target}#{anchor}")
    assert wrong == []


def test_the_pages_that_code_and_parameters_name_exist() -> None:
    others = [REPOSITORY / "params.yaml", *(REPOSITORY / "presets").glob("*.yaml")]
    texts = [path.read_text(encoding="utf-8") for path in [*CODE, *others]]
    named = {name for text in texts for name in re.findall(r"\bdocs/[\w/-]+\.md", text)}
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


def test_errors_are_quoted_as_the_code_prints_them() -> None:
    """An ellipsis stands for what differs; what DVC, git and torch print is marked."""
    troubleshooting, team = ((REPOSITORY / f"docs/{name}.md").read_text() for name in ("troubleshooting", "team"))
    text = troubleshooting.partition("## A check says")[0] + team.partition("## When something fails")[2]
    cells = [row.split(" | ")[0] for row in text.splitlines() if row.startswith("| `")]
    quoted = [
        text
        for cell in cells
        if not cell.endswith(("(DVC)", "(git)", "(torch)"))
        for text in re.findall("`([^`]+)`", cell)
    ]
    pieces = {piece.strip(" ,;") for text in quoted for piece in text.split("…") if len(piece) > 12}
    code = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    texts = re.sub(r"\"\s*f?\"", "", code)  # a text that goes on in the next line
    assert len(pieces) > 20
    assert [piece for piece in pieces if piece not in texts] == []


def test_the_architecture_names_every_module_of_the_core() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    modules = [path.name for folder in ("nanogpt", "stages") for path in (REPOSITORY / folder).rglob("[a-z]*.py")]
    assert [name for name in modules if f"`{name}`" not in text and f"/{name}`" not in text] == []
