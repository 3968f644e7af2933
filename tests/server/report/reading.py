"""Pages as their readers have them."""

from __future__ import annotations

from html.parser import HTMLParser

from server.report.page import render


class Reader(HTMLParser):
    """Elements and text of a page; raises where tags do not close."""

    VOID = frozenset({"meta", "input", "img", "br", "link", "line", "circle", "path"})

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text.append(text)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(runs):
    """The page, after a look at its tags."""
    page = render(runs)
    Reader(page)
    return page
