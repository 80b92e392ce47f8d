import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURE = (ROOT / "docs/picture.svg").read_text(encoding="utf-8")
# Positions depend on the fonts of the machine that draws; texts, data and bars do not.
PARTS = r'<text[^>]*>([^<]*)</text>|aria-label="([^"]*)"|d="(M0,[^"]*)"'


@pytest.fixture(autouse=True)
def _scripts_import_each_other(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "results"))


def test_the_picture_is_what_the_committed_records_say() -> None:
    pytest.importorskip("vl_convert")
    drawn = runpy.run_path(str(ROOT / "results/picture.py"))["draw"]()
    assert re.findall(PARTS, PICTURE) == re.findall(PARTS, drawn), "run make readme-table"


def test_the_picture_is_legible_on_light_and_on_dark_pages() -> None:
    inks = set(re.findall(r'<text[^>]* fill="([^"]*)"', PICTURE))
    assert inks == {"currentColor"}
    assert "prefers-color-scheme:dark" in PICTURE


def test_the_readme_shows_the_picture_on_its_first_screen() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/picture.svg)" in "".join(readme.splitlines(keepends=True)[:12])


@pytest.mark.parametrize(
    ("marker", "script", "files"),
    [
        ("rows", "rows_table", ROOT / "results/rows.json"),
        ("lost", "lost_table", sorted((ROOT / "results").glob("minilm-*/results.json"), key=str)),
    ],
)
def test_the_tables_are_what_the_committed_records_say(marker, script, files) -> None:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    shown = page.partition(f"<!-- {marker}:begin -->\n")[2].partition(f"<!-- {marker}:end -->")[0]
    assert shown == runpy.run_path(str(ROOT / f"results/{script}.py"))["table"](files), "run make readme-table"
