"""What `zensical build --strict` does not check of the built site.

    python .ci/check_site.py site

Every link and image leads to a file of the site and to an anchor that is there, and no page fetches
anything from elsewhere (links that a reader may follow are fine). Exit status 1 lists the rest.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {
    ("link", "href"),
    ("img", "src"),
    ("script", "src"),
    ("iframe", "src"),
    ("source", "src"),
}


class Page(HTMLParser):
    """Anchors, links, and what a browser fetches to show the page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if not value:
                continue
            if name == "id":
                self.anchors.add(value)
            elif (tag, name) in FETCHED:
                self.fetched.add(value)
            elif name == "href":
                self.links.add(value)


def problems(site: Path) -> list[str]:
    """One line for each link or file that is wrong."""
    pages = {file: Page(file) for file in sorted(site.glob("*.html"))}
    found = []
    for file, page in pages.items():
        if file.name == "404.html":  # its links begin at the root of wherever the site stands
            continue
        for url in sorted(page.fetched | page.links):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                if url in page.fetched and parts.scheme != "data":
                    found.append(f"{file}: fetches {url}")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file.resolve()
            if target.is_dir():
                target = target / "index.html"
            if not target.is_file() or not target.is_relative_to(site.resolve()):
                found.append(f"{file}: {url} is not in the site")
            elif parts.fragment and target.suffix == ".html":
                there = pages[site / target.name].anchors
                if unquote(parts.fragment) not in there:
                    found.append(f"{file}: {url} has no such anchor")
    for file in site.rglob("*.css"):
        for piece in file.read_text(encoding="utf-8").split("url(")[1:]:
            if piece.strip("\"' ").startswith(("http:", "https:", "//")):
                found.append(f"{file}: fetches {piece[:60]}")
    return found


def main() -> None:
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or f"{sys.argv[1]}: every link leads somewhere, nothing from elsewhere")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
