"""The HTML page of a plan: well formed, self-contained, escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from llama_jax.plan.page import page
from llama_jax.plan.table import budget
from tests.plan.plans import PLAN, TOO_LARGE

VOID = {"meta", "br", "img"}


class Checker(HTMLParser):
    """Asserts that tags are closed in order, and collects attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text):
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return checker


def test_it_loads_nothing_and_shows_every_number():
    text = page(PLAN, budget(PLAN), "llama2_70b.toml")
    checker = read(text)
    names = {name for name, _ in checker.attributes}
    assert not names & {"src", "href"}
    assert not re.search(r"https?:|url\(|@import|<script", text)
    for shown in ("14.00 s", "attention kernels: 3.00 s", "78.0 GB", "waited for", "chip-hours", "fusion.7"):
        assert shown in checker.text
    assert "Does not fit" not in checker.text


def test_names_are_escaped():
    text = page(PLAN, budget(PLAN), "<script>&")
    assert "&lt;script&gt;&amp;" in text
    assert "a&lt;b" in text
    read(text)


def test_bars_fill_their_whole():
    text = page(PLAN, budget(PLAN), "run")
    memory, time = re.findall(r"<svg.*?</svg>", text)
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="22" style="fill:var\(--c', time)]
    assert abs(sum(widths) - 1000) < 0.1
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="22" style="fill:var\(--c', memory)]
    assert abs(sum(widths) - 1000 * 78 / 95) < 0.1
    over = read(page(TOO_LARGE, budget(TOO_LARGE), "run")).text
    assert "Does not fit: 13.0 GB a chip too much." in over
