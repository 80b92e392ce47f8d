"""Names that are HTML or Markdown: they are shown as they are in report and card, and are neither run nor rendered."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from pruneofa.report.card import write_card
from pruneofa.report.report import write_report
from pruneofa.report.table import cell, code, code_block
from tests.report.example_run import example_events, example_inspection, example_recipe, example_results

SCRIPT = "<!--<script>alert(1)</script>"
IMAGE = '"><img src=x onerror=alert(1)>'
LINK = "[a](javascript:alert(1))`|\n```\n<b>"
HOSTILE = f"{SCRIPT}{IMAGE}{LINK}"


def hostile_run():
    """Hostile names of layers, tasks, models, data, versions and people."""
    results = example_results()
    results["versions"] = {HOSTILE: HOSTILE}
    results["tasks"][HOSTILE] = results["tasks"]["area"]
    results["recipe"]["name"] = HOSTILE
    recipe = example_recipe()
    recipe |= {
        "name": HOSTILE,
        "model": HOSTILE,
        "card": {"authors": HOSTILE, "version": HOSTILE, "base_model": HOSTILE},
    }
    recipe["corpus"] |= {"source": [HOSTILE], "config": HOSTILE, "column": HOSTILE}
    recipe["tasks"][HOSTILE] = recipe["tasks"]["area"] | {"data": HOSTILE}
    inspection = example_inspection()
    layer = next(iter(inspection["layers"].values()))
    inspection["layers"] |= {f"encoder.layer.0.{HOSTILE}.weight": layer, f"encoder.layer.07.{HOSTILE}": layer}
    return results, recipe, inspection


class Elements(HTMLParser):
    """Tags and attributes of a page, as a browser's parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.comments = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_comment(self, data):
        self.comments += 1


@pytest.fixture
def page(tmp_path):
    results, recipe, inspection = hostile_run()
    return write_report(
        tmp_path / "report.html", results=results, recipe=recipe, inspection=inspection, events=example_events()
    )


def test_no_name_becomes_an_element_of_the_report(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    own = text[: text.index("<script>")] + text[text.index("</script>", text.index("window.vegaEmbed=")) :]
    found = Elements(own)
    assert "img" not in found.tags and found.comments == 0
    assert "onerror" not in found.attributes
    assert found.tags.count("script") == 1  # the charts
    script = own[own.rindex("<script>") + 8 : own.rindex("</script>")]
    assert "<!--" not in script and "<script" not in script and "\\u003c!--\\u003cscript>" in script
    assert "&lt;!--&lt;script&gt;" in own


def test_the_charts_hold_the_names_as_they_are(page):
    text = page.read_text(encoding="utf-8")
    spec = re.search(r"layers: (\{.*\}), \};", text)[1]
    assert HOSTILE in json.dumps(json.loads(spec), ensure_ascii=False).encode().decode("unicode_escape")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
@pytest.mark.timeout(200)
def test_a_browser_draws_every_chart_and_runs_nothing(page, tmp_path):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=20000", "--dump-dom", page.as_uri()]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | {"HOME": str(tmp_path)})
    found = Elements(run.stdout[run.stdout.rindex("<main>") :])
    assert run.stdout.count('class="marks"') == 5, run.stderr[-500:]
    assert "img" not in found.tags and "onerror" not in found.attributes


def test_no_name_is_markup_in_the_card(tmp_path):
    markdown = pytest.importorskip("markdown_it")
    results, recipe, inspection = hostile_run()
    file = write_card(
        tmp_path, results=results, recipe=recipe, inspection=inspection, versions={HOSTILE: HOSTILE}, date="2026-01-01"
    )
    card = file.read_text(encoding="utf-8")
    body = card.split("\n---\n", 1)[1]
    html = markdown.MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    found = Elements(html)
    assert not {"script", "b", "iframe"} & set(found.tags) and found.comments == 0
    assert found.tags.count("img") == 1 and "onerror" not in found.attributes  # the figure
    assert not re.search(r'href="(?!https?://)', html)
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        widths = {row.count("<td") + row.count("<th") - row.count("<thead") for row in table.split("<tr>")[1:]}
        assert len(widths) == 1, table


@pytest.mark.parametrize("text", [HOSTILE, "|", "`", "``` a", "\\", "\\|", "a | b", "<", "&lt;", "[x]"])
def test_cells_and_code_are_read_back_as_they_were(text):
    markdown = pytest.importorskip("markdown_it")
    parser = markdown.MarkdownIt("commonmark", {"html": True}).enable("table")
    words = " ".join(text.split())
    for escaped in (cell(text), code(text)):
        tokens = parser.parse(f"| a | b |\n|---|---|\n| {escaped} | end |\n")
        cells = [token for token in tokens if token.type == "inline"][2:]
        assert len(cells) == 2
        shown = "".join(child.content for child in cells[0].children)
        assert shown.replace("\\|", "|") == words.replace("\\|", "|")
        assert {child.type for child in cells[0].children} <= {"text", "text_special", "code_inline"}
    [block] = parser.parse(code_block(text, "yaml"))
    assert (block.type, block.content) == ("fence", text + "\n")
