"""Drives clip-retrieval's page in headless Chromium, prints what was seen as JSON.

Run by tests/test_interop_clip_front.py in Playwright's environment:
clip_front_driver.py PAGE SERVER PICTURE
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from page_driver import CHROMIUM
from playwright.sync_api import Page, Request, sync_playwright

Shown = list[dict[str, Any]]
FIGURES = """() => [...document.querySelector("clip-front").shadowRoot.querySelectorAll("figure")]
    .map(figure => [figure, figure.querySelector("img.pic")])
    .map(([figure, image]) => ({
        caption: image.title, under: figure.innerText.trim(), source: image.getAttribute("src"),
        seen: figure.style.display !== "none" && image.complete && image.naturalWidth > 0}))"""


def shown(page: Page) -> Shown:
    """The pictures of the page, once nothing changes any more."""
    before, now = None, page.evaluate(FIGURES)
    while now != before:
        page.wait_for_timeout(400)
        before, now = now, page.evaluate(FIGURES)
    return now


def after(page: Page, act: Callable[[], object]) -> Shown:
    """The pictures that an action brings."""
    with page.expect_response("**/knn-service"):
        act()
    return shown(page)


def scrolled(page: Page) -> Shown:
    """The pictures of the page, those that come on scrolling included."""
    before: Shown = []
    now = shown(page)
    while len(now) > len(before):
        page.mouse.wheel(0, 100_000)
        before, now = now, shown(page)
    page.mouse.wheel(0, -1_000_000)
    return shown(page)


def drive(page: Page, address: str, server: str, picture: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    page.goto(f"{address}?{urlencode({'back': server})}")
    page.wait_for_selector("option[value=drawings]", state="attached")
    seen["indexes"] = page.locator("select").first.locator("option").all_inner_texts()
    page.fill("#searchBar", "a happy cat")
    seen["distinct"] = after(page, lambda: page.press("#searchBar", "Enter"))
    near_duplicates = page.get_by_role("checkbox", name="Hide (near) duplicate images")
    seen["words"] = after(page, near_duplicates.uncheck)
    seen["scrolled"] = scrolled(page)

    third = page.locator("figure").nth(2)
    third.hover()
    seen["like_it"] = after(page, third.locator(".subImageSearch").click)
    second = page.locator("figure").nth(1)
    second.hover()
    seen["its_caption"] = after(page, second.locator(".subTextSearch").click)
    seen["file"] = after(page, lambda: page.set_input_files("#filechooser", picture))

    page.fill("#searchBar", "rain")
    seen["rain"] = after(page, lambda: page.click("#textSearch"))
    for label in ("Enable aesthetic scoring", "Search with multilingual clip", "Safe mode"):
        seen[label] = after(page, page.get_by_role("checkbox", name=label).click)
    with page.expect_download() as download:
        page.click("#download")
    seen["saved"] = json.loads(Path(download.value.path()).read_text())
    choose = page.locator("select").first.select_option
    seen["far"] = after(page, lambda: choose("far"))
    seen["far_scrolled"] = scrolled(page)

    # A search that somebody sent as an address, which names no index.
    page.goto(f"{address}?{urlencode({'back': server, 'query': 'rain'})}")
    page.wait_for_selector("figure")
    seen["address"] = shown(page)
    return seen


def main() -> None:
    address, server, picture = sys.argv[1:]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        errors: list[str] = []
        outside: list[str] = []
        asked: list[tuple[str, int, str]] = []  # path, status, body

        def note(request: Request) -> None:
            if request.url.startswith(server):
                answer = request.response()
                status = answer.status if answer else 0
                asked.append((request.url[len(server) :], status, request.post_data or ""))
            elif not request.url.startswith((address, "data:")):
                outside.append(request.url)

        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfinished", note)
        page.on("requestfailed", note)
        seen = drive(page, address, server, picture)
        browser.close()
    print(json.dumps({**seen, "errors": errors, "outside": outside, "asked": asked}))


if __name__ == "__main__":
    main()
