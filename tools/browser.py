"""The built site in headless Chromium, served from this machine: every page, two widths, light and dark."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Route, sync_playwright

from tools.check_site import pages

WIDTHS = {"desktop": 1280, "phone": 360}
THEMES = ("light", "dark")
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run"]
OVERFLOW = """() => {
    const limit = document.documentElement.clientWidth;
    const clips = (e) => /(auto|scroll|hidden)/.test(getComputedStyle(e).overflowX);
    const scrolls = (e) => e && (clips(e) || scrolls(e.parentElement));
    if (document.documentElement.scrollWidth <= limit) return "";
    const wide = [...document.querySelectorAll("main *")].filter(
        (e) => e.getBoundingClientRect().right > limit + 1 && !scrolls(e.parentElement));
    const e = wide.at(-1);
    const name = (e) => `<${e.tagName.toLowerCase()} class="${e.getAttribute("class") || ""}">`;
    return e ? `${name(e)} ${(e.textContent || "").trim().slice(0, 40)}` : "the page's frame";
}"""


def find_chromium() -> str:
    """Path of the Chromium on this machine; FileNotFoundError says how to get one."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        raise FileNotFoundError(
            "no Chromium on the PATH; install the packages of apt.txt: "
            "sudo apt-get install $(sed 's/#.*//' apt.txt)"
        )
    return found


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(html: Path) -> Iterator[str]:
    """Serve a folder on a free local port; gives its address, with a slash at the end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(html))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser, without the sandbox only where root runs it (there it cannot have one)."""
    path = find_chromium()
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=FLAGS + ["--no-sandbox"] * root)


@contextmanager
def opened(browser: Browser, address: str, width: str, theme: str) -> Iterator[tuple[Page, set[str]]]:
    """A tab of one width and theme that never leaves `address`, and the set that gathers its problems."""
    problems: set[str] = set()
    size = {"width": WIDTHS[width], "height": 800}
    context = browser.new_context(viewport=size, color_scheme=theme)
    for key in ("mode", "theme"):  # where the theme remembers the reader's choice
        context.add_init_script(f"localStorage.setItem('{key}', '{theme}')")
    context.route(lambda url: not url.startswith((address, "data:", "blob:")), partial(_refuse, problems))
    page = context.new_page()
    page.on("pageerror", lambda error: problems.add(f"script error: {error}; mend the script or drop it"))
    page.on("console", lambda message: _hear(problems, address, message))
    try:
        yield page, problems
    finally:
        context.close()


def _refuse(problems: set[str], route: Route, request: Request) -> None:
    problems.add(f"asks another machine for {request.url}; keep a copy in the site, or turn the feature off")
    route.abort()


def _hear(problems: set[str], address: str, message: ConsoleMessage) -> None:
    url = message.location.get("url", "")
    refused = "Failed to load resource" in message.text and not url.startswith(address)
    if message.type == "error" and not refused:  # what was refused is counted above
        problems.add(f"console error: {message.text} ({url.removeprefix(address)}); mend what it names")


def visits(html: Path) -> Iterator[tuple[str, str, str, Page, set[str]]]:
    """(page name, width, theme, open tab, its problems so far) for every page of the site in turn."""
    names = [path.relative_to(html).as_posix() for path in pages(html)]
    with served(html) as address, chromium() as browser:
        for width, theme in product(WIDTHS, THEMES):
            with opened(browser, address, width, theme) as (page, problems):
                for name in names:
                    problems.clear()
                    page.goto(address + name, wait_until="load")
                    page.evaluate("() => document.fonts.ready.then(() => true)")
                    page.wait_for_timeout(150)  # late scripts speak up
                    yield name, width, theme, page, problems


def check(html: Path) -> list[str]:
    """Problems that only a browser shows: script errors, requests that leave the site, sideways scrolling."""
    found: dict[str, list[str]] = {}
    for name, width, theme, page, problems in visits(html):
        if WIDTHS[width] == min(WIDTHS.values()) and (wide := page.evaluate(OVERFLOW)):
            problems.add(f"scrolls sideways at {WIDTHS[width]} px: {wide}; wrap it or let it scroll alone")
        for problem in sorted(problems):
            found.setdefault(f"{name}: {problem}", []).append(f"{width} {theme}")
    return [f"{problem} [{', '.join(seen)}]" for problem, seen in found.items()]


def screenshots(html: Path, out: Path) -> list[Path]:
    """Save a picture of every page, full length, at each width and theme; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    saved = []
    for name, width, theme, page, _ in visits(html):
        saved.append(out / f"{name.removesuffix('.html').replace('/', '-')}__{width}__{theme}.png")
        page.screenshot(path=saved[-1], full_page=True)
    return saved
