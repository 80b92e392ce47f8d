"""The site that `make docs` builds: the recipe of the Makefile, run on a copy of what it reads."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
READ = ("docs", "recipes", "results", "benchmarks", "src")
API = ("Engine", "Engine.from_pretrained", "Engine.predict", "Engine.encode")
TRAINING = (
    *("callbacks.PruningCallback", "callbacks.LockCallback", "prune.GradualPruner", "lock.PatternLock.capture"),
    *("schedule.cubic_sparsity", "schedule.rewound_lr", "masks.magnitude_mask", "distill.kd_loss"),
)


class Page(HTMLParser):
    """The ids, the links and what a browser would load by itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids |= {given["id"]} if given.get("id") else set()
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("link", "script", "img"):
            self.loaded += [given[name] for name in ("href", "src") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical")
    copy = tmp_path_factory.mktemp("copy")
    for name in READ:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in (
        *ROOT.glob("*.md"),
        *(ROOT / name for name in ("LICENSE", "Makefile", "constraints.txt", "zensical.toml")),
    ):
        shutil.copy(file, copy)
    made = subprocess.run(
        ["make", "-o", "install", f"VENV={sys.prefix}", "docs"], cwd=copy, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return copy / "build/site"


def test_the_api_page_has_the_public_names(site: Path) -> None:
    found = Page((site / "docs/api/index.html").read_text(encoding="utf-8"))
    wanted = {*(f"pruneofa.{name}" for name in API), *(f"pruneofa.train.{name}" for name in TRAINING)}
    assert wanted <= found.ids


def test_every_page_by_question_is_in_the_navigation(site: Path) -> None:
    links = {link.strip("./") for link in Page((site / "index.html").read_text(encoding="utf-8")).links}
    assert {f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")} <= links


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 25
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else ():
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path}: {link}"
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].ids, f"{path}: {link}"


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        assert not [url for url in Page(html).loaded if re.match(r"(https?:)?//", url)], path
