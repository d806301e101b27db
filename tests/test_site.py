"""The checks of the built site: what they find in pages made to be wrong, and in the book's own."""

import struct
import zlib
from pathlib import Path

import pytest

from tools import browser, check_site

GOOD = "<p id='here'>text</p><a href='#here'>up</a>"


def picture() -> bytes:
    """A grey PNG of one pixel."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\x80")) + chunk(b"IEND", b"")


def write_site(folder: Path, body: str, title: str = "A page", head: str = "") -> Path:
    """A site of two pages: `body` in book/index.html, and notebooks/01_a.html."""
    for name in ("book", "notebooks", "_images"):
        (folder / name).mkdir()
    (folder / "_images/ab12.png").write_bytes(picture())
    start = f"<!doctype html><html lang='en'><meta charset='utf-8'><link rel='icon' href='data:,'>{head}"
    page = f"{start}<title>{title}</title><main>{body}</main></html>"
    (folder / "book/index.html").write_text(page)
    other = f"{start}<title>Another</title><main><h2 id='part two'>Two</h2></main></html>"
    (folder / "notebooks/01_a.html").write_text(other)
    return folder


def image(alt: str) -> str:
    return f"<img src='../_images/ab12.png' {alt}>"


@pytest.mark.parametrize("body", [
    GOOD, image("alt='Accuracy falls below four bits'"), "<a href='../notebooks/01_a.html#part%20two'>2</a>",
    "<a href='https://example.org/x#y'>out</a><a href='mailto:a@b.c'>mail</a>",
    "<a href='javascript:void(0)'>script</a>",
    "<a href='../notebooks/01_a.html?v=1'>q</a><a href=''>self</a><a href='../book/'>folder</a>",
    "<span class='pasted-text'>84.2</span><span class='pasted-text'>float32</span>",
    "<svg aria-hidden='true'></svg><svg><title>Error against bits</title></svg>",
    "<code>{glue:text}`a`</code>",
])  # fmt: skip
def test_good_pages_pass(tmp_path, body):
    assert check_site.check(write_site(tmp_path, body)) == []


@pytest.mark.parametrize(("body", "problem"), [
    (image(""), "no alternative text (alt='')"), (image("alt=' '"), "no alternative text"),
    (image("alt='../_images/ab12.png'"), "no alternative text"), (image("alt='ab12.png'"), "no alternative"),
    (image("alt='figure1.svg'"), "no alternative text"), (image("alt='plot'"), "no alternative text"),
    ("<svg></svg>", "neither aria-label nor <title>"),
    ("<a href='gone.html'>x</a>", "'gone.html', which is not in the site"),
    ("<a href='../../outside.html'>x</a>", "not in the site"),
    ("<img src='x.png' alt='a good text'>", "not in the site"),
    ("<a href='/book/index.html'>x</a>", "write it relative to the page"),
    ("<a href='#gone'>x</a>", "index.html has no id 'gone'"),
    ("<a href='../notebooks/01_a.html#gone'>x</a>", "01_a.html has no id 'gone'"),
    ("<span class='pasted-text'> </span>", "came out as ''"),
    ("<span class='pasted-text'>nan</span>", "as 'nan'"),
    ("<span class='pasted-text'>0.84237894</span>", "is unformatted (0.84237894)"),
    ("<p>It is {glue:text}`a::b</p>", "a glue role stands unrendered"),
    ("<span class='problematic'>:ref:`x`</span>", "could not read ':ref:`x`'"),
])  # fmt: skip
def test_faults_are_named_with_their_file(tmp_path, body, problem):
    [line] = check_site.check(write_site(tmp_path, body))
    assert line.startswith("book/index.html: ")
    assert problem in line


@pytest.mark.parametrize("title", ["", " ", "&lt;no title&gt; — Book"])
def test_page_without_a_title_is_named(tmp_path, title):
    [line] = check_site.check(write_site(tmp_path, GOOD, title=title))
    assert "the page has no title" in line


@pytest.mark.parametrize(("target", "problems"), [("book/index.html", 0), ("book/gone.html", 1)])
def test_redirection_needs_a_target_and_no_title(tmp_path, target, problems):
    site = write_site(tmp_path, GOOD)
    (site / "index.html").write_text(f'<meta http-equiv="Refresh" content="0; url={target}" />')
    assert len(check_site.check(site)) == problems


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="make html"):
        check_site.check(tmp_path)


def test_missing_chromium_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get install .*apt\.txt"):
        browser.find_chromium()


FAULTS = {
    "<script>nothing.here()</script>": "script error: nothing is not defined",
    "<script>console.error('ouch')</script>": "console error: ouch",
    "<script src='gone.js'></script>": "console error: Failed to load resource",
    "<script src='http://example.invalid/a.js'></script>": "another machine for http://example.invalid/a.js",
    "<div class='big' style='width: 900px'>wide</div>": 'sideways at 360 px: <div class="big"> wide',
    "<script>if (localStorage.getItem('mode') + innerWidth == 'dark360') throw 'late'</script>": "late",
}
HARMLESS = "<div style='overflow-x: auto'><div style='width: 950px'>scrolls alone</div></div>"


def test_browser_finds_each_fault_once_and_no_other(tmp_path):
    lines = browser.check(write_site(tmp_path, HARMLESS + "".join(FAULTS)))
    assert len(lines) == len(FAULTS)
    for fault in FAULTS.values():
        [line] = [line for line in lines if fault in line]
        assert line.startswith("book/index.html: ")
    assert [line for line in lines if line.endswith("[phone dark]") and "late" in line]


def test_screenshots_of_every_page_and_width(tmp_path, monkeypatch):
    monkeypatch.setattr(browser, "THEMES", ("light",))
    saved = browser.screenshots(write_site(tmp_path, GOOD), tmp_path / "out")
    assert len(set(saved)) == 2 * len(browser.WIDTHS)
    widths = {struct.unpack(">I", path.read_bytes()[16:20])[0] for path in saved}
    assert widths == set(browser.WIDTHS.values())


@pytest.mark.slow
def test_files_of_the_book_are_in_order(site):
    assert check_site.check(site) == []


@pytest.mark.slow
def test_browser_has_nothing_to_complain_of(site):
    assert browser.check(site) == []
