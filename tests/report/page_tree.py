"""A page as a tree, parsed by the standard library alone: what the tests read facts from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "br", "img", "hr", "input"}
_LOADING = ("src", "href", "srcset", "data", "action", "xlink:href")


@dataclass
class Node:
    """An element: its tag, attributes, and children in order (elements and text)."""

    tag: str
    attributes: dict[str, str]
    children: "list[Node | str]" = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def text(self) -> str:
        """All text inside, as written."""
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self) -> "Iterator[Node]":
        """Every element inside, in document order."""
        for child in self.children:
            if isinstance(child, Node):
                yield child
                yield from child.walk()

    def all(self, tag: str = "", kind: str = "", **attributes: str) -> "list[Node]":
        """Every element inside of this tag, class and attributes."""
        return [
            node
            for node in self.walk()
            if (not tag or node.tag == tag)
            and (not kind or kind in node.classes)
            and all(node.attributes.get(name) == value for name, value in attributes.items())
        ]

    def one(self, tag: str = "", kind: str = "", **attributes: str) -> "Node":
        """The only element inside of this tag, class and attributes."""
        found = self.all(tag, kind, **attributes)
        assert len(found) == 1, (tag, kind, attributes, len(found))
        return found[0]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in _VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, (tag, [node.tag for node in self.open])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(html: str) -> Node:
    """The tree of a page; fails where tags do not balance or anything would be loaded or run."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.open == [parser.root], [node.tag for node in parser.open]
    nodes = list(parser.root.walk())
    ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in nodes:
        for name, value in node.attributes.items():
            assert not name.startswith("on"), (node.tag, name)
            if name in _LOADING:
                assert value[:1] == "#" and value[1:] in ids, (node.tag, name, value)
    assert not re.search(r"url\(|@import|https?:|<(iframe|object|embed|img)", html)
    numbers = re.findall(r'\bd="[^"]*"|="-?\w+%?"', html)
    assert not {"nan", "inf"} & set(re.findall(r"[A-Za-z]+", " ".join(numbers)))
    return parser.root


def section_ids(page: Node) -> list[str]:
    """The sections in order."""
    return [node.attributes["id"] for node in page.all("section")]
