"""The chat page in a real browser: answers are streamed, stopped and remembered; all is from one server."""

from __future__ import annotations

import re

import pytest

import llama_jax as lj
from llama_jax.serving.app import PAGE
from tests.serving import browser, http

SAID = "hello"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with http.serving(http.load(tmp_path_factory.mktemp("model")), api_key="secret") as running:
        yield running


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = browser.find()
    if path is None:
        pytest.skip("there is no Chromium; install the package chromium")
    with browser.opened(path, tmp_path_factory.mktemp("profile")) as page:
        yield page


def articles(page, kind):
    return page.run(f"[...document.querySelectorAll('article.{kind}')].map(x => x.textContent)")


def test_a_chat_in_a_browser(running, page):
    page.call("Page.navigate", url=running.url)
    page.until("document.readyState === 'complete' && document.getElementById('status').textContent")
    assert "the API key is missing or wrong" in page.run("document.getElementById('status').textContent")
    page.problems.clear()  # the browser's log has the 401
    for name, value in (("key", "secret"), ("temperature", "0"), ("tokens", "30")):
        page.run(f"document.getElementById('{name}').value = '{value}'")
    page.run("document.getElementById('text').focus()")
    page.type(f"{SAID}\n")
    page.until("document.getElementById('status').textContent.includes('per second')")
    talk = lj.Conversation(running.model, template="chatml")
    first = "".join(talk.say(SAID, max_new_tokens=30))
    assert (articles(page, "user"), articles(page, "assistant")) == ([SAID], [first])
    assert page.run("document.title") == http.NAME
    # The second turn sends the first with it.
    page.type("and\n")
    page.until("document.querySelectorAll('article.assistant').length === 2 && running === null")
    assert articles(page, "assistant") == [first, "".join(talk.say("and", max_new_tokens=30))]
    assert page.run("messages.map(m => m.role).join()") == "user,assistant,user,assistant"
    assert not page.problems
    assert {re.sub(r"^(http://[^/]+).*", r"\1", url) for url in page.requests if url[:4] == "http"} == {
        running.url
    }


def test_an_answer_is_stopped_and_an_error_shown(running, page):
    page.call("Page.navigate", url=running.url)
    page.until("document.readyState === 'complete' && typeof send === 'function'")
    page.run("document.getElementById('key').value = 'secret'")
    page.run("document.getElementById('tokens').value = '200'")
    page.run("document.getElementById('text').focus()")
    page.type("go\n")
    page.until("document.querySelector('article.assistant')?.textContent.length > 3")
    page.run("document.getElementById('send').click()")
    page.until("running === null")
    running.until_idle()
    assert page.run("document.getElementById('send').textContent") == "Send"
    assert articles(page, "error") == []
    page.run("document.getElementById('clear').click()")
    assert page.run("document.getElementById('log').childElementCount + messages.length") == 0
    page.run("document.getElementById('tokens').value = '9000'")
    page.type("<b>hi</b>\n")
    page.until("document.querySelector('article.error')?.textContent")
    assert "max_tokens is 9000" in articles(page, "error")[0]
    assert articles(page, "user") == ["<b>hi</b>"]


def test_the_page_names_nothing_outside_of_itself():
    text = PAGE.read_text()
    assert not re.search(r"https?://|//[a-z]|\bsrc=|@import|url\(", text)
