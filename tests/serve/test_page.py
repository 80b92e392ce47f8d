"""The page: it fetches nothing from elsewhere, and in a browser it does what it says."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.serve.conftest import Server

HTML = {"accept": "text/html,*/*"}


def test_a_browser_gets_the_page_and_others_the_health(client):
    page = client.get("/", headers=HTML)
    assert page.headers["content-type"].startswith("text/html") and "<h1>pruneofa</h1>" in page.text
    assert client.get("/", headers={"accept": "*/*"}).content == b""


def test_the_page_needs_no_other_server(client):
    page = client.get("/", headers=HTML)
    assert not re.findall(r"(?:https?:)?//[a-z]|@import|url\(|<script src|<img", page.text)
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.fixture(scope="module")
def server(folders):
    names = [f"{name}={folder}" for name, folder in folders.items()]
    with Server(*names) as started:
        yield started


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


# By model: what is typed, and what the result has to show.
TRIED = {
    "vectors": ({"query": "the king", "texts": "a queen\nwater"}, ".row", 2),
    "topics": ({"text": "a great film"}, ".row", 3),
    "ranks": ({"query": "who", "texts": "the king\nwater\nmusic"}, ".row", 3),
    "entities": ({"text": "𝒦ing the king of music and the queen of film"}, "mark", None),
    "answers": ({"query": "who", "text": "the king of music"}, "mark", 1),
    "words": ({"text": "the [MASK] of music"}, ".row", 5),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_task_can_be_tried_with_the_keyboard_alone(server, browser, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 900, "height": 1000})
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    pictures = os.environ.get("PRUNEOFA_SCREENSHOTS")
    for model, (typed, shown, count) in TRIED.items():
        page.select_option("#model", model)
        last = list(typed)[-1]
        page.wait_for_selector(f"#field-{last}")
        page.wait_for_function("name => info.model_id === name", arg=model)
        for name, text in typed.items():
            page.fill(f"#field-{name}", text)
        page.focus(f"#field-{last}")
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") != "BUTTON":  # a field that may stay empty
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#result {shown}")
        found = page.locator(f"#result {shown}")
        assert found.count() == count if count is not None else found.count() > 0
        if shown == "mark" and model == "entities":
            for word in found.all():
                assert word.inner_text().split("PER")[0].split("LOC")[0].strip() in typed["text"]
        if pictures:
            page.screenshot(path=Path(pictures) / f"{scheme}-{model}.png", full_page=True)
    page.wait_for_selector("#live dd")
    assert "Tokens/s" in page.inner_text("#live")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 600) == (scheme == "light")
    assert problems == []
    context.close()


def test_what_goes_wrong_is_said_on_the_page(server, browser):
    page = browser.new_page()
    page.goto(server.url)
    page.select_option("#model", "words")
    page.wait_for_function("() => info && info.model_id === 'words'")
    page.fill("#field-text", "no mask")
    page.click("button")
    assert "has no [MASK]" in page.wait_for_selector("#result .error").inner_text()
    page.close()


def test_a_key_is_asked_for(folders, browser):
    with Server(folders["topics"], PRUNEOFA_API_KEY="secret") as locked:
        page = browser.new_page()
        page.goto(locked.url)
        assert "asks for a key" in page.wait_for_selector("#result .error").inner_text()
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#field-text")
        page.fill("#field-text", "a great film")
        page.click("button")
        page.wait_for_selector("#result .row")
        page.close()
