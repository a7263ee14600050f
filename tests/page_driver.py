"""Drives the page in headless Chromium, prints what was seen as JSON.

Run by tests/test_interop_page.py in Playwright's environment: page_driver.py URL PICTURE WIDTH
"""

import json
import sys
from typing import Any

from playwright.sync_api import Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"


def found(page: Page, list_: str = "#results") -> list[str]:
    """Captions of the pictures, once there are new ones."""
    page.wait_for_selector(f"{list_} .hits:not(.stale) .hit .score")
    page.wait_for_load_state("networkidle")
    return page.locator(f"{list_} .hit .caption").all_inner_texts()


def pictures_shown(page: Page) -> int:
    """Pictures whose pixels have arrived."""
    script = "[...document.querySelectorAll('.hit img')].filter(i => i.naturalWidth > 0).length"
    for _ in range(100):
        if page.evaluate(script) > 5:
            break
        page.wait_for_timeout(50)
    return page.evaluate(script)


def drive(page: Page, url: str, picture: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    page.goto(url)
    page.wait_for_selector("#results .hit img")
    seen["sample"] = page.locator("#results .hit").count()

    page.fill("#text", "a happy cat")  # typing alone searches
    seen["words"] = found(page)
    seen["pictures"] = pictures_shown(page)
    seen["cost_of_words"] = page.inner_text("#cost")
    page.locator("#sizes label", has_text="48").click()
    page.wait_for_selector("#sizes [value='48']:checked", state="attached")
    seen["words_at_48"] = found(page)
    page.check("#compare")
    page.wait_for_selector(".columns section:nth-child(2) .hit")
    seen["beside"] = [found(page, f".columns section:nth-child({n})") for n in (1, 2)]
    page.go_back()
    page.wait_for_selector(".columns", state="detached")
    seen["address"] = page.url.partition("?")[2]

    page.focus("#text")  # by keyboard: to the second picture, and search with it
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    seen["chosen"] = page.evaluate("document.activeElement.querySelector('.caption').textContent")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chip:not([hidden])")
    page.wait_for_selector("#results .stale", state="detached")
    seen["like_it"] = found(page)
    page.click("#chip-remove")

    # A file dropped on the page.
    data = page.evaluate_handle(
        """async (url) => { const blob = await (await fetch(url)).blob(), data = new DataTransfer();
        data.items.add(new File([blob], "query.png", {type: blob.type})); return data; }""",
        picture,
    )
    page.dispatch_event("#results", "drop", {"dataTransfer": data})
    page.wait_for_selector("#cost:has-text('read in')")
    seen["dropped"] = found(page)
    seen["cost_of_picture"] = page.inner_text("#cost")
    page.locator("#sizes label", has_text="20").first.click()  # no index has it
    page.wait_for_selector("#sizes [value='20']:checked", state="attached")
    found(page)

    page.click("#tab-classify")
    page.fill("#labels", "a cat, rain, the sun")
    page.wait_for_selector("#bars li:nth-child(3):last-child")
    seen["bars"] = page.locator("#bars .name").all_inner_texts()
    seen["shares"] = page.locator("#bars .number").all_inner_texts()

    page.click("#tab-search")
    page.click("#chip-remove")
    page.fill("#text", "x" * 900)  # more than this server takes
    page.wait_for_selector("#notice:not([hidden])")
    seen["notice"] = page.inner_text("#notice")
    seen["width"] = page.evaluate("document.documentElement.scrollWidth")
    return seen


def main() -> None:
    url, picture, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": width, "height": 800})
        errors: list[str] = []
        outside: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((url, "blob:")) else outside.append(request.url)
            ),
        )
        seen = drive(page, url, picture)
        browser.close()
    print(json.dumps({**seen, "errors": errors, "outside": outside}))


if __name__ == "__main__":
    main()
