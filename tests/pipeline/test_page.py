"""Pages as a browser shows them: MLflow's at the address that `make ui` prints, and that of a comparison."""

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.browser import dom, find, mlflow_page
from tests.conftest import BUILT_IN
from tests.pipeline.clones import Clone
from tests.runs import finished_attempt, scored_run, write_report
from tracking.run_name import run_name, setting

pytestmark = pytest.mark.pipeline

RATES, SEEDS = (0.01, 0.025, 0.04), (1337, 1338)


@pytest.fixture(scope="module")
def browser() -> str:
    found = find()
    if found is None:
        pytest.skip("no Chromium or Chrome here; `apt-get install chromium` brings one")
    return found


def six_runs(repository: Path) -> dict[str, dict[str, float]]:
    """Trains nothing, but leaves six runs as the stages do, of three settings and two seeds; name -> its cells."""
    committed = {"train.muon_learning_rate": 0.025, "train.seed": 1337}
    expected = {}
    for number, (rate, seed) in enumerate((rate, seed) for rate in RATES for seed in SEEDS):
        params = {"train.muon_learning_rate": rate, "train.seed": seed}
        tags = {"git.commit": "1a2b3c4d5", "setting": setting(params, committed, "", "1a2b3c4d5")}
        name = run_name("freed-tach", tags["setting"], seed, 1)
        fields = {"name": name, "params": params, "tags": tags}
        attempt = finished_attempt(repository, f"run{number}", model=f"{number}" * 64, **fields)
        shutil.rmtree(attempt / "models")
        losses = {"val_loss": 1.5 + number / 10, "excess": 0.5 + number / 10, "bits_per_byte": 0.6 + number / 100}
        metrics = {f"evaluate/{key}": value for key, value in losses.items()}
        report = write_report(repository, model=f"{number}" * 64, metrics=metrics)
        report.rename(report.with_name(f"evaluate-{number}.json"))
        cells = {f"metrics.`{key}`": value for key, value in losses.items()}
        expected[name] = cells | {f"params.`{key}`": float(value) for key, value in params.items()}
    return expected


VOID = {"br", "hr", "img", "input", "link", "meta"}  # elements without an end


class Table(HTMLParser):
    """The cells of the page's table: row -> column -> text. Their order in the page, and what follows them, vary."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: dict[str, dict[str, str]] = {}
        self._row, self._column, self._depth = "", "", 0  # of elements, in the present cell
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._row = found.get("row-id") or self._row
        if found.get("role") == "gridcell":
            self._column, self._depth = found.get("col-id") or "", 1
        elif self._depth and tag not in VOID:
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        self._depth -= bool(self._depth)

    def handle_data(self, text: str) -> None:
        if self._row and self._depth and text.strip():
            cells = self.rows.setdefault(self._row, {})
            cells[self._column] = cells.get(self._column, "") + text.strip()


def test_text_after_a_cell_is_not_read_as_its_own() -> None:
    cell = '<div row-id="1"><div role="gridcell" col-id="{}"><span>{}<br></span></div></div>'
    assert Table(cell.format("b", 2) + cell.format("a", 1) + "<p>6 runs</p>").rows == {"1": {"b": "2", "a": "1"}}


def test_the_page_opens_on_the_runs_with_their_names_losses_and_what_differs(browser: str, tmp_path: Path) -> None:
    """The only test that looks at MLflow's page: its view is kept in a form that MLflow does not promise."""
    expected, clone = six_runs(tmp_path), Clone(tmp_path)
    clone.tool("sync")
    with mlflow_page(clone) as address:
        rows = Table(dom(browser, address)).rows
    groups = [row for row in rows.values() if row["attributes.`Run Name`"].startswith("Group: ")]
    runs = [row for row in rows.values() if row not in groups]
    assert len(runs) == len(expected) == 6
    for name, columns in expected.items():
        (row,) = [row for row in runs if row["attributes.`Run Name`"].endswith(name)]
        assert {key: float(row[key]) for key in columns} == columns
    means = [row["metrics.`val_loss`"] for row in groups]  # each of two seeds; the best comes first
    assert means == ["1.55(average)", "1.75(average)", "1.95(average)"]


# Names in the page's title what is wider than its place: the page, or the table of the settings.
OVERFLOW = """<script>
  const wide = element => element.scrollWidth > element.clientWidth + 1;
  const places = [document.documentElement, document.querySelector(".scroll")];
  document.title = places.filter(wide).map(element => element.tagName + element.className).join(" ") || "all fits";
</script>"""


@pytest.mark.parametrize(("width", "title"), [(1280, "all fits"), (500, "DIVscroll")])
def test_a_comparison_fits_the_screen_and_draws_its_curves(
    browser: str, tmp_path: Path, width: int, title: str
) -> None:
    """The only test that finds a verdict beyond the edge of the page. On a phone the table alone is scrolled."""
    for rate in RATES:
        for seed in (1, 2, 3):
            params = {"train.muon_learning_rate": rate}
            scored_run(tmp_path, f"{rate}-{seed}", 1.9 + rate + seed / 1e3, seed=seed, params=params)
    text = BUILT_IN.read_text()
    (tmp_path / "params.yaml").write_text(text.replace("experiment: nanogpt ", "experiment: test/one experiment "))
    Clone(tmp_path).tool("compare", "--html", "page.html")
    page = tmp_path / "page.html"
    page.write_text(page.read_text() + OVERFLOW)
    shown = dom(browser, page.as_uri(), width)
    assert f"<title>{title}</title>" in shown
    assert shown.count("<polyline ") == 2 * len(RATES)  # by tokens, and by seconds
