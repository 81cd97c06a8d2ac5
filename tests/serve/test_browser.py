"""The page in a real browser: a Chromium that is installed, as by Debian's package `chromium`."""

import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from memjax.serve import bank as served
from tests.serve.bench import SCRIPT, TEXTS, make_bank, server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUESTION = "Which number belongs to the red house?"
TIMES = re.compile(r"^(no word|first word after \d+\.\d\d s) · \d+\.\d\d s in all$")
SECONDS = 300  # a busy machine may take long to compile
COLOURS = "blue green grey white black".split()
PICTURES = os.environ.get("MEMJAX_PICTURES")  # a folder to keep screenshots in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    more = {f"notes/{i}.txt": f"Note {i}: the {c} house has number {i}.\n" for i, c in enumerate(COLOURS)}
    with server(make_bank(tmp_path_factory.mktemp("browser"), TEXTS | more, layers=3)) as port:
        yield port


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=1000 * SECONDS)
    with sync_playwright() as playwright:
        # no sandbox: Chromium has none where it is root, as in a container; it sees nothing but our page
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def complaints():
    return []


@pytest.fixture
def page(browser, port, complaints):
    """The page, freshly opened; a complaint of the browser fails the test, and so does a request to anywhere else."""
    context = browser.new_context(base_url=f"http://127.0.0.1:{port}")
    context.set_default_timeout(1000 * SECONDS)
    page, asked = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto("/")
    expect(page).to_have_title("texts.bank")
    yield page
    context.close()
    assert not complaints
    assert {url.split("/")[2] for url in asked} == {f"127.0.0.1:{port}"}


@pytest.fixture
def answer(monkeypatch):
    """What the model "says" from now on, for an untrained one has nothing to say; the second piece waits for `go`."""
    go, real = threading.Event(), served.ask

    def pieces():
        yield "It is "
        assert go.wait(SECONDS)
        yield "1234567."

    monkeypatch.setattr(served, "ask", lambda *a, **o: real(*a, **o)._replace(answer=pieces()))
    yield go
    go.set()


def ask(page, question=QUESTION):
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def asked(page, question=QUESTION):
    ask(page, question)
    expect(page.locator("#times")).to_have_text(TIMES)


def picture(page, name):
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


def test_the_answer_is_shown_as_it_comes(page, answer):
    ask(page)
    expect(page.locator("#answer")).to_have_text("It is ")
    expect(page.locator("#times")).to_have_text("reading …")
    assert page.locator("#passages li").count() == 2
    answer.set()
    expect(page.locator("#times")).to_have_text(TIMES)
    assert page.locator("#answer").text_content() == "It is 1234567."


def test_another_question_takes_the_place_of_the_first(page, answer):
    ask(page)
    expect(page.locator("#answer")).to_have_text("It is ")
    ask(page, "And the grey one?")
    expect(page.locator("#answer")).to_have_text("")
    answer.set()
    expect(page.locator("#times")).to_have_text(TIMES)
    assert page.locator("#answer").text_content() == "It is 1234567."


def test_passages_and_heat_map(page):
    assert re.fullmatch(r"8 documents, \d+ tokens, 3 router layers", page.locator("#holds").inner_text())
    asked(page)
    found = page.request.post("/api/ask", data={"question": QUESTION}).json()
    assert page.locator("#answer").text_content() == found["answer"]

    shown = page.locator("#passages li")
    assert shown.count() == len(found["passages"]) == 2
    for one, passage in zip(shown.all(), found["passages"], strict=True):
        assert one.locator(".file").inner_text() == passage["citation"]
        assert f"score {passage['score']:.3f}" in one.inner_text()
        marked = [piece["text"] for piece in passage["excerpt"] if piece["marked"]]
        assert one.locator("mark").all_inner_texts() == marked
        if one.locator("details").count():
            one.locator("summary").click()
            assert one.locator("pre").text_content() == passage["text"]

    assert "house" in page.locator("mark").all_inner_texts()

    citations = [d["citation"] for d in found["routing"]["documents"]]
    said = lambda score: "not chosen" if score is None else f"score {score:.3f}"  # noqa: E731
    expected = [
        (f"{citation} · layer {layer} · {said(score)}", score)
        for layer, row in enumerate(found["routing"]["scores"], start=1)
        for citation, score in zip(citations, row, strict=True)
    ]
    cells = page.locator("#heat i")
    assert [cell.get_attribute("title") for cell in cells.all()] == [title for title, _ in expected]
    colours = cells.evaluate_all("all => all.map((c) => getComputedStyle(c).backgroundColor)")
    colour_of = {score: colour for (_, score), colour in zip(expected, colours, strict=True)}
    assert None in colour_of and len(set(colour_of.values())) == len(colour_of)  # another score, another colour
    rows = [row.split("\t")[-4:] for row in page.locator("#body tr").all_inner_texts()]
    text = lambda score: "–" if score is None else f"{score:.3f}"  # noqa: E731
    columns = zip(*found["routing"]["scores"], strict=True)
    assert rows == [[c, *map(text, scores)] for c, scores in zip(citations, columns, strict=True)]
    assert page.locator("#heat .read").count() == page.locator("#body .read").count() == 2
    cells.first.hover()
    assert page.locator("#cell").inner_text() == cells.first.get_attribute("title")


def test_markup_of_documents_is_text(page, complaints):
    asked(page, "A house, and document title script")
    text = page.locator("main").inner_text()
    assert sorted(TEXTS)[1] in text and SCRIPT in text
    assert page.title() == "texts.bank" and page.locator("main script, main img").count() == 0

    # And if some did get in, it would do nothing.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img id=evil src=x onerror=\"document.title=3\">')")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title=4'}))")
    page.wait_for_function("() => evil.complete")
    assert page.title() == "texts.bank"
    assert complaints and all("Content Security Policy" in line for line in complaints)
    complaints.clear()


def test_what_goes_wrong_is_said(page, complaints):
    page.route("**/api/ask", lambda route: route.abort())
    ask(page)
    expect(page.get_by_role("alert")).to_have_text("the server does not answer")
    page.unroute("**/api/ask")
    ask(page, "why " * 96)
    expect(page.get_by_role("alert")).to_have_text("question: has 385 tokens, the model's window is 384")
    assert page.locator("#answered").is_hidden() and page.locator("#found").is_hidden()
    assert len(complaints) == 2 and all("Failed to load resource" in line for line in complaints)
    complaints.clear()
    asked(page)
    assert page.locator("#error").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_fits_its_window(page, answer, scheme, width):
    answer.set()
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    asked(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(247, 247, 245)"
    assert light == (scheme == "light")
    picture(page, f"{scheme}-{width}")
