"""Drives the page in headless Chromium, prints what was seen as JSON.

Run by tests/test_interop_page.py in Playwright's environment: page_driver.py WAY URL PICTURE WIDTH
"""

import json
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Request, sync_playwright

CHROMIUM = "/usr/bin/chromium"
HEIGHT = 844

Seen = dict[str, Any]
Way = Callable[[Page, str, str], Seen]


def after(page: Page, act: Callable[[], object], path: str = "/v1/search") -> list[str]:
    """Captions of the images, once those are there that an action brings."""
    with page.expect_response(lambda answer: path in answer.url):
        act()
    return found(page)


def found(page: Page, list_: str = "#results") -> list[str]:
    """Captions of the images, once there are new ones."""
    page.wait_for_selector("#results .stale", state="detached")
    page.wait_for_selector(f"{list_} .hits > .hit:not(.blank)")
    page.wait_for_load_state("networkidle")
    return page.locator(f"{list_} .hit .caption").all_inner_texts()


def ids(page: Page, selector: str) -> list[int]:
    """Of images."""
    script = "items => items.map(item => Number(item.dataset.id))"
    return page.locator(selector).evaluate_all(script)


def images_shown(page: Page) -> int:
    """Images whose pixels have arrived."""
    script = "[...document.querySelectorAll('.hit img')].filter(i => i.naturalWidth > 0).length"
    until(page, f"{script} > 5")
    return page.evaluate(script)


def until(page: Page, condition: str) -> bool:
    """Whether it came true within five seconds. Playwright's own waiting evaluates within the page,
    which its content security policy forbids."""
    for _ in range(100):
        if page.evaluate(condition):
            return True
        page.wait_for_timeout(50)
    return False


def top_of_images(page: Page) -> float:
    return page.evaluate("document.querySelector('.hit .frame').getBoundingClientRect().top")


def focused(page: Page, part: str = "") -> str:
    return page.evaluate(f"document.activeElement{part}") or ""


def query(page: Page, words: str) -> Seen:
    """The body of the request that some words lead to."""
    with page.expect_request("**/v1/search") as request:
        page.fill("#text", words)
    found(page)
    return request.value.post_data_json


def ask(page: Page, url: str, picture: str) -> Seen:
    """Words, words to leave out, an image dropped, patch sizes, names."""
    seen: Seen = {}
    page.goto(url)
    page.wait_for_selector("#results .hit img")
    seen["sample"] = page.locator("#results .hit").count()
    seen["pictures"] = images_shown(page)
    seen["hint"] = page.inner_text("#hint")
    seen["details_at_first"] = page.is_visible("#controls")

    seen["words"] = after(page, lambda: page.fill("#text", "a happy cat"))  # typing searches
    seen["left_out"] = page.inner_text("#status button")
    seen["shown"] = after(page, lambda: page.click("#status button"))
    seen["none_left_out"] = page.is_hidden("#status button")
    page.click("#filter")
    after(page, lambda: page.check("#distinct"))
    seen["alike"] = after(page, lambda: page.uncheck("#distinct"))
    page.keyboard.press("Escape")
    seen["filter_closed"] = [page.is_hidden("#filters"), focused(page, ".id")]
    seen["top"] = top_of_images(page)
    seen["less"] = query(page, "cat - fence")
    seen["less_hint"] = page.inner_text("#hint")
    seen["quoted"] = query(page, '"face" smile')
    seen["quoted_found"] = found(page)
    seen["quoted_hint"] = page.inner_text("#hint")
    seen["by_words"] = page.locator(".hit .worded").count()
    page.fill("#text", '"no such words"')
    page.wait_for_selector("#results .empty")
    seen["quoted_nothing"] = page.inner_text("#results .empty")
    seen["hyphen"] = query(page, "t-shirt")
    after(page, lambda: page.fill("#text", "a happy cat"))

    page.click("#details")
    seen["top_with_details"] = top_of_images(page)
    seen["cost_of_words"] = page.inner_text("#cost")
    seen["sizes_in_sight"] = page.evaluate(
        """[...document.querySelectorAll('#sizes label')].every(label => {
        const {left, right, width} = label.getBoundingClientRect();
        return width > 0 && left >= 0 && right <= innerWidth; })"""
    )
    seen["words_at_48"] = after(page, lambda: page.locator("#sizes label", has_text="48").click())
    page.check("#compare")
    page.wait_for_selector(".columns section:nth-child(2) .hit")
    seen["beside"] = [found(page, f".columns section:nth-child({n})") for n in (1, 2)]
    page.go_back()
    page.wait_for_selector(".columns", state="detached")
    found(page)
    seen["address"] = page.url.partition("?")[2]
    page.reload()
    page.wait_for_selector("#results .hit")
    seen["details_remembered"] = page.is_visible("#controls")

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
    after(page, page.locator("#sizes label", has_text="20").first.click)  # no index has it

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


def look(page: Page, url: str, picture: str) -> Seen:
    """An image large, by keyboard; similar ones; tabs; filters; scrolling; downloads."""
    seen: Seen = {}
    page.goto(f"{url}/?q=rain&alike=all")
    seen["words"] = found(page)
    page.focus("#text")  # to the second image
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#viewer[open]")
    page.wait_for_selector("#viewer-facts dt:text-is('File')")
    seen["large"] = [page.inner_text("#viewer-name")]
    seen["facts"] = page.locator("#viewer-facts dt:visible").all_inner_texts()
    until(page, "document.getElementById('viewer-image').naturalWidth > 0")
    seen["opened"] = page.url
    for _ in range(12):  # the focus stays within, or leaves the page for the browser's own
        page.keyboard.press("Tab")
        inside = "document.activeElement.closest('#viewer') !== null"
        seen["trapped"] = page.evaluate(f"{inside} || document.activeElement === document.body")
        if not seen["trapped"]:
            break
    page.keyboard.press("ArrowRight")
    until(page, f"location.href !== {json.dumps(seen['opened'])}")
    seen["large"].append(page.inner_text("#viewer-name"))
    page.keyboard.press("Escape")
    page.wait_for_url(lambda address: "open=" not in address)
    seen["focus"] = focused(page, ".querySelector('.caption').textContent")

    other = page.context.new_page()  # a link to an image, in another tab
    other.goto(page.locator(".hit > a").nth(3).evaluate("link => link.href"))
    other.wait_for_selector("#viewer[open]")
    seen["in_a_tab"] = other.inner_text("#viewer-name")
    with other.expect_download() as file:
        other.click("#viewer-download")
    seen["file"] = [file.value.suggested_filename, Path(file.value.path()).stat().st_size]
    seen["like_it"] = after(other, lambda: other.click("#viewer-similar"))
    seen["like_address"] = other.url.partition("?")[2]
    other.go_back()
    other.wait_for_selector("#viewer[open]")
    other.close()

    seen["long"] = page.locator("#results .hit").count()
    for _ in range(100):
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(50)
        if page.is_hidden("#more"):
            break
    page.wait_for_selector(".blank", state="detached")
    seen["longer"] = page.locator("#results .hit").count()
    page.evaluate("window.scrollTo(0, 0)")

    page.click("#filter")
    style = page.locator(".by-choice", has_text="Style").locator("label").first
    seen["style"] = style.locator("span").inner_text()
    seen["in_style"] = after(page, style.click)
    day = page.locator(".by-date input")
    after(page, lambda: fill_day(day.nth(0), "2024-03-01"))
    seen["in_march"] = after(page, lambda: fill_day(day.nth(1), "2024-03-31"))
    seen["chips"] = page.locator("#filter-chips button").all_inner_texts()
    seen["where"] = page.url.partition("?")[2]
    seen["browsed"] = after(page, lambda: page.fill("#text", ""), "/images?where=")
    seen["status"] = page.inner_text("#status")
    page.reload()
    seen["again"] = found(page)
    page.click("#filter")
    page.click("#filter-clear")
    page.wait_for_selector(".try")
    page.click("#filter")

    page.click("#choose")
    for number in (0, 1, 2):
        page.locator(".hit > a").nth(number).click()
    page.locator(".hit > a").nth(1).click()  # not that one after all
    seen["chosen"] = page.inner_text("#chosen-count")
    with page.expect_download() as download:
        page.click("#chosen-download")
    with zipfile.ZipFile(download.value.path()) as archive:
        seen["zip"] = [
            download.value.suggested_filename,
            archive.testzip(),
            len(archive.namelist()),
        ]
    page.click("#chosen-clear")
    seen["bar_gone"] = page.is_hidden("#chosen")
    return seen


def parts(page: Page, url: str, picture: str) -> Seen:
    """Parts of images: found, mapped, and drawn on an image to search with."""
    seen: Seen = {}
    page.goto(f"{url}/?q=rain&alike=all")
    found(page)
    after(page, lambda: page.click("#regions"))
    seen["found"] = ids(page, "#results .hit")
    seen["address"] = page.url.partition("?")[2]
    until(page, "document.querySelectorAll('.hit .box').length > 5")
    seen["framed"] = ids(page, ".hit:has(.box)")
    page.locator(".hit:has(.box) > a").nth(0).click()
    page.wait_for_selector("#viewer[open]")
    page.wait_for_selector("#viewer-box:not([hidden])")
    seen["asked"] = page.inner_text("#viewer-where legend")
    seen["plain"] = page.locator("#viewer-where b:visible").all_inner_texts()
    page.evaluate("document.getElementById('details').click()")
    for size in ("48", "24"):
        with page.expect_response("**/v1/map") as answer:
            page.locator("#viewer-where label", has_text=size).click()
        seen[f"at {size}"] = answer.value.json()["similarities"]
        until(page, "!document.getElementById('viewer-map').hidden")
    seen["over"] = page.evaluate(
        """['viewer-map', 'viewer-image'].map(id => document.getElementById(id)
        .getBoundingClientRect()).every(({left, right}) => left >= 0 && right <= innerWidth)"""
    )
    seen["range"] = page.inner_text("#viewer-map-range")
    page.locator("#viewer-where label", has_text="Off").click()
    seen["off"] = page.is_hidden("#viewer-map")

    page.click("#viewer-part")
    page.wait_for_selector("#part[open]")
    until(page, "document.getElementById('part-image').naturalWidth > 0")
    for key in ("ArrowRight", "ArrowRight", "Shift+ArrowDown"):  # the first one makes a rectangle
        page.keyboard.press(key)
    with page.expect_request("**/v1/search") as request:
        page.click("#part-search")
    seen["by_part"] = request.value.post_data_json
    found(page)
    seen["hint"] = page.inner_text("#hint")
    seen["part_address"] = page.url.partition("?")[2]
    seen["compared"] = page.is_enabled("#compare")  # parts are indexed at one size
    page.reload()
    found(page)
    seen["again"] = ids(page, "#results .hit")
    page.click("#chip-image")
    page.wait_for_selector("#part-box:not([hidden])")
    stage = page.locator("#part-stage").bounding_box()
    assert stage is not None
    page.mouse.move(stage["x"] + stage["width"] / 2, stage["y"] + stage["height"] / 2)
    page.mouse.down()
    page.mouse.move(stage["x"] + stage["width"], stage["y"] + stage["height"], steps=3)
    page.mouse.up()
    with page.expect_request("**/v1/search") as request:
        page.focus("#part-stage")
        page.keyboard.press("Enter")
    seen["drawn"] = request.value.post_data_json["box"]
    found(page)
    page.click("#chip-image")
    with page.expect_request("**/v1/search") as request:
        page.click("#part-whole")
    seen["whole"] = request.value.post_data_json
    found(page)
    page.click("#chip-image")
    page.click("#part-close")
    seen["closed"] = [page.is_hidden("#part"), focused(page, ".id")]
    page.click("#chip-remove")
    seen["quoted"] = query(page, '"rain"')
    seen["quoted_hint"] = page.inner_text("#hint")
    return seen


def fill_day(input_: Any, day: str) -> None:
    input_.fill(day)
    input_.dispatch_event("change")


def check(page: Page, url: str, picture: str) -> Seen:
    """What axe finds, view by view."""
    import axe_playwright_python

    axe = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()
    seen: Seen = {}

    def look_at(view: str) -> None:
        page.evaluate(axe)
        result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        seen[view] = [
            [one["id"], one["nodes"][0]["html"][:200]] for one in result["violations"]
        ]  # fmt: skip

    page.goto(f"{url}/?alike=all")
    page.wait_for_selector("#results .hit img")
    look_at("sample")
    after(page, lambda: page.fill("#text", "rain - sun"))
    page.click("#details")
    page.check("#compare")
    page.wait_for_selector(".columns")
    page.click("#filter")
    page.wait_for_selector(".by-choice")
    found(page)
    look_at("search")
    page.click("#filter")
    page.click("#choose")
    page.locator(".hit > a").nth(0).click()
    look_at("choosing")
    page.click("#chosen-clear")
    page.locator(".hit > a").nth(1).click()
    page.wait_for_selector("#viewer-facts dt:text-is('File')")
    look_at("viewer")
    page.click("#viewer-part")
    page.wait_for_selector("#part[open]")
    look_at("part")
    page.keyboard.press("Escape")
    page.click("#chip-remove")
    after(page, lambda: page.fill("#text", "rain"))
    page.locator(".hit > a").nth(1).click()
    page.wait_for_selector("#viewer[open]")
    page.keyboard.press("Escape")
    page.wait_for_url(lambda address: "open=" not in address)
    page.click("#tab-classify")
    page.locator(".hit > a").nth(1).click()
    page.wait_for_selector("#bars li")
    look_at("naming")
    return seen


def enter(page: Page, url: str, picture: str) -> Seen:
    """A server that asks for a token, which no link and no <img> can bring."""
    seen: Seen = {}
    page.add_init_script(
        """window.held = new Set(); const {createObjectURL, revokeObjectURL} = URL;
        const keep = (url) => { held.add(url); return url; };
        URL.createObjectURL = (blob) => keep(createObjectURL(blob));
        URL.revokeObjectURL = (url) => { held.delete(url); revokeObjectURL(url); };"""
    )
    page.goto(f"{url}/?q=rain&alike=all")
    page.fill("#token-text", "sesame")
    page.keyboard.press("Enter")
    seen["words"] = found(page)
    seen["pictures"] = images_shown(page)
    page.locator(".hit > a").nth(0).click()
    page.wait_for_selector("#viewer-facts dt:text-is('File')")
    until(page, "document.getElementById('viewer-image').naturalWidth > 0")
    page.keyboard.press("ArrowRight")
    seen["held"] = [until(page, "held.size > 0 && held.size < 4")]  # of one image
    page.keyboard.press("Escape")
    seen["held"].append(until(page, "held.size === 0"))
    page.locator(".hit > a").nth(1).click()
    page.wait_for_selector("#viewer[open]")
    with page.expect_download() as file:
        page.click("#viewer-download")
    seen["file"] = [file.value.suggested_filename, Path(file.value.path()).stat().st_size]
    return seen


WAYS = {"ask": ask, "enter": enter, "look": look, "parts": parts, "check": check}


def main(ways: Mapping[str, Way]) -> None:
    way, url, picture, width = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    dark = "dark" if way == "check" and width < 600 else "light"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        context = browser.new_context(
            viewport={"width": width, "height": HEIGHT},
            bypass_csp=way == "check",  # axe runs within the page
            reduced_motion="reduce",
            color_scheme=dark,
            timezone_id="Pacific/Auckland",  # far east of UTC
        )
        errors: list[str] = []
        outside: list[str] = []

        def note(request: Request) -> None:
            if not request.url.startswith((url, "blob:")):
                outside.append(request.url)

        context.on("request", note)
        context.on("weberror", lambda error: errors.append(str(error.error)))
        seen = ways[way](context.new_page(), url, picture)
        browser.close()
    print(json.dumps({**seen, "errors": errors, "outside": outside}))


if __name__ == "__main__":
    main(WAYS)
