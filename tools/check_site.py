"""Checks of the built site: its files, then its pages in a browser. A problem names the file and the remedy.

    python -m tools.check_site                   check _build/html
    python -m tools.check_site screenshots OUT   save every page at each width and theme, to look at

Blind to: a picture whose alternative text is long and wrong, addresses outside the site (it opens none), and
glue that a Sphinx warning has already removed from the page (build with -W).
"""

import argparse
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

SITE = Path("_build/html")
TARGETS = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src", "iframe": "src"}
DESCRIBE = (
    "say what a sighted reader concludes: on a page by ![text](file), in a notebook by the cell metadata "
    '{"mystnb": {"image": {"alt": "…"}}}'
)
IMAGE_NAME = re.compile(r"[\w./-]+\.(png|jpe?g|svg|gif|webp)", re.IGNORECASE)


def pages(html: Path) -> list[Path]:
    """The site's pages; the theme's own files and mere redirections are left out."""
    found = [path for path in sorted(html.rglob("*.html")) if _redirection(_soup(path)) is None]
    if not found:
        raise FileNotFoundError(f"{html}: no page here; run `make html` first")
    return [path for path in found if not {"_static", "_sources"} & set(path.relative_to(html).parts)]


def _redirection(soup: BeautifulSoup) -> str | None:
    tag = soup.find("meta", attrs={"http-equiv": re.compile("^refresh$", re.IGNORECASE)})
    return str(tag["content"]).partition("url=")[2] if tag else None


def check(html: Path) -> list[str]:
    """Problems that the files show: titles, alternative texts, links and anchors, glue without a value."""
    html = html.resolve()
    problems = list(_redirections(html))
    for path in pages(html):
        soup = _soup(path)
        found = [*_title(soup), *_images(soup), *_links(soup, path, html), *_glue(soup)]
        problems += [f"{path.relative_to(html)}: {problem}" for problem in found]
    return problems


def _soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def _redirections(html: Path) -> Iterator[str]:
    for path in sorted(html.glob("*.html")):
        target = _redirection(_soup(path))
        if target and (problem := _broken(target, path, html)):
            yield f"{path.name}: sends readers to {target!r}, {problem}"


def _title(soup: BeautifulSoup) -> Iterator[str]:
    title = soup.title.get_text(strip=True) if soup.title else ""
    if not title or title.startswith("<no title>"):
        yield "the page has no title; begin its source with a '# Title' line"


def _images(soup: BeautifulSoup) -> Iterator[str]:
    for image in soup.find_all("img"):
        alt, source = str(image.get("alt", "")).strip(), str(image.get("src", ""))
        if not _meaningful(alt, source):
            yield f"image {source} has no alternative text (alt={alt!r}); {DESCRIBE}"
    for drawing in soup.select("article svg, main svg"):
        if not (drawing.get("aria-hidden") == "true" or drawing.get("aria-label") or drawing.find("title")):
            yield "an inline svg has neither aria-label nor <title>; add one, or aria-hidden if it decorates"


def _meaningful(alt: str, source: str) -> bool:
    if alt in source or IMAGE_NAME.fullmatch(alt):  # also the empty text
        return False
    return len(re.findall(r"[^\W\d_]{2,}", alt)) >= 2


def _links(soup: BeautifulSoup, page: Path, html: Path) -> Iterator[str]:
    for tag in soup.find_all(list(TARGETS)):
        reference = tag.get(TARGETS[tag.name])
        if reference is not None and (problem := _broken(str(reference), page, html)):
            yield f"{_words(tag)} points at {reference!r}, {problem}"


def _words(tag: Tag) -> str:
    return f"<{tag.name}> {tag.get_text(' ', strip=True)[:40]!r}" if tag.name == "a" else f"<{tag.name}>"


def _broken(reference: str, page: Path, html: Path) -> str | None:
    """What is wrong with a reference from `page`, with the remedy; None for a good or an outside one."""
    url = urlsplit(reference)
    if url.scheme or url.netloc:
        return None
    if url.path.startswith("/"):
        return "which breaks when the site lives in a subfolder; write it relative to the page"
    target = (page.parent / unquote(url.path)).resolve() if url.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(html) or not target.is_file():
        return "which is not in the site; correct the link in the page's source, or add the file to _toc.yml"
    return _broken_anchor(unquote(url.fragment), target)


def _broken_anchor(anchor: str, target: Path) -> str | None:
    if not anchor or target.suffix != ".html" or anchor in _anchors(target, target.stat().st_mtime_ns):
        return None
    return f"but {target.name} has no id {anchor!r}; correct the anchor or label the heading with ({anchor})="


@cache  # pages point at each other; `modified` keeps the answer fresh
def _anchors(path: Path, modified: int) -> set[str]:
    soup = _soup(path)
    return {str(tag[key]) for key in ("id", "name") for tag in soup.find_all(attrs={key: True})}


def _glue(soup: BeautifulSoup) -> Iterator[str]:
    for tag in soup.select(".pasted-text"):
        text = tag.get_text(strip=True)
        if not text or text in {"nan", "None", "inf"}:
            yield f"a glued value came out as {text!r}; check the name and that its chapter ran"
        elif re.fullmatch(r"-?\d+\.\d{5,}(e[-+]?\d+)?", text):
            yield f"a glued value is unformatted ({text}); give it a format, such as :.2f"
    for tag in soup.select(".problematic, .system-message"):
        yield f"Sphinx could not read {tag.get_text(' ', strip=True)[:60]!r}; mend the markup in the source"
    for text in soup.find_all(string=re.compile(r"\{glue:")):
        if not text.find_parent(["code", "pre", "script"]):
            yield f"a glue role stands unrendered in {text.strip()[:60]!r}; close its backticks"


def main() -> int:
    from tools import browser  # here, so that the checks of the files need no browser

    parser = argparse.ArgumentParser(description="Check the built site.")
    parser.add_argument("action", nargs="?", choices=["check", "screenshots"], default="check")
    parser.add_argument("out", nargs="?", type=Path, help="folder for the screenshots")
    parser.add_argument("--html", type=Path, default=SITE)
    options = parser.parse_args()
    if options.action == "screenshots":
        if options.out is None:
            parser.error("screenshots needs a folder: python -m tools.check_site screenshots OUT")
        print(*browser.screenshots(options.html, options.out), sep="\n")
        return 0
    problems = [*check(options.html), *browser.check(options.html)]
    print(*problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FileNotFoundError as error:
        sys.exit(str(error))
