"""Drives the page through what a real server is seldom in: an index that grows, odd columns.

The server's answers are changed on their way. Run as page_driver.py is.
"""

import json
from collections.abc import Callable
from typing import Any

from page_driver import Seen, after, found, main
from playwright.sync_api import Page

EVERY_MS, RESTING_MS = 3000, 10_000  # the page asks how far the index is


def change(page: Page, path: str, how: Callable[[Any], None]) -> None:
    """The server's answers, as JSON, changed in place."""

    def answer(route: Any) -> None:
        response = route.fetch()
        body = response.json()
        how(body)
        route.fulfill(response=response, json=body)

    page.route(path, answer)


def wait(page: Page, url: str, picture: str) -> Seen:
    """An index that grows, from its first moment until a finer patch size is there, and then by a
    photo that is new."""
    told = "the program that indexes has ended"
    states: list[Any] = [
        {"done": 0, "total": 0},
        {"done": 12, "total": 1500},
        {"done": 1500, "total": 1500},
        {"done": 1234, "total": 1500, "problem": told},
        {"done": 1234, "total": 1500},
        None,
        {"done": 1500, "total": 1501},
        None,
    ]
    number, finer = 0, states.index(None)

    def describe(body: Any) -> None:
        (index,) = body["indices"]
        index["indexing"] = states[number]
        if number < finer:  # only the coarsest so far
            index["generation"] = -1
            for option in index["patch_sizes"]:
                option["in_index"] = option["patch_size"] == 48

    def take(body: Any) -> None:
        if number == 0:
            body["hits"] = []

    change(page, "**/v1/indices", describe)
    change(page, "**/sample?*", take)
    page.clock.install()
    page.goto(url)
    page.wait_for_selector("#results .empty")
    seen: Seen = {"empty": page.inner_text("#results .empty"), "told": [], "bar": []}
    for number in range(len(states)):
        if number:
            with page.expect_response("**/v1/indices"):
                page.clock.run_for(EVERY_MS if states[number - 1] else RESTING_MS)
            page.wait_for_timeout(50)
        if states[number]:
            seen["told"].append(page.inner_text("#growing-words"))
            seen["bar"].append(page.is_visible("#growing-bar"))
        if number == 1:  # a page that is open, with words, at the coarsest
            after(page, lambda: (page.fill("#text", "rain"), page.clock.run_for(300)))
    page.wait_for_selector("#growing", state="hidden")
    with page.expect_request("**/v1/search") as request:
        page.fill("#text", "rain and wind")
        page.clock.run_for(300)
    seen["patch_size"] = request.value.post_data_json["index_patch_size"]
    seen["address"] = page.url.partition("?")[2]
    return seen


def odd(page: Page, url: str, picture: str) -> Seen:
    """Addresses that no field writes; places as texts and at the equator; days of another zone."""
    day = 86_400 * 10**9

    def place(body: Any) -> None:
        body["hits"][0]["columns"].update(latitude="59.9 N", longitude="10.7 E")
        body["hits"][1]["columns"].update(latitude=0, longitude=10.5)

    def date(body: Any) -> None:
        ends = {"least": "2024-01-01T00:00:00", "greatest": "2024-02-01T20:00:00"}
        column = {"name": "modified", "type": "int64", "kind": "date", "values": [], **ends}
        body["columns"].append(column)

    def describe(body: Any) -> None:
        body["limits"]["max_chosen"] = 2
        body["indices"][0]["columns"]["modified"] = "int64"

    change(page, "**/v1/search", place)
    change(page, "**/columns", date)
    change(page, "**/v1/indices", describe)
    page.route("**/about", lambda route: route.abort())
    seen: Seen = {}
    kept: Seen = {"style": {"in": ["flat"]}, "modified": {">=": day}}
    page.goto(f"{url}/?where={json.dumps(kept)}")
    page.wait_for_selector("#notice button")  # the server has no such column
    seen["kept"] = page.locator("#filter-chips button").all_inner_texts()
    dropped: Seen = {"style": {"in": 5}, "drawn_on": {"=": "2024-01-01"}, "modified": {"<": "x"}}
    page.goto(f"{url}/?alike=all&where={json.dumps({**dropped, 'constructor': {'in': [1]}})}")
    found(page)
    seen["dropped"] = page.locator("#filter-chips button").all_inner_texts()
    after(page, lambda: page.fill("#text", "rain"))
    seen["places"] = []
    for number in (0, 1):
        page.locator(".hit > a").nth(number).click()
        page.wait_for_selector("#viewer[open]")
        seen["places"].append(page.inner_text("#viewer-facts"))
        page.keyboard.press("Escape")
        page.wait_for_url(lambda address: "open=" not in address)
    page.click("#filter")
    page.wait_for_selector(".by-date")
    days = page.locator(".by-date input")
    seen["last_days"] = days.evaluate_all("all => all.map(one => one.max)")
    page.click("#filter")
    page.click("#choose")
    for number in range(3):
        page.locator(".hit > a").nth(number).click()
    seen["chosen"] = page.inner_text("#chosen-count")
    return seen


if __name__ == "__main__":
    main({"wait": wait, "odd": odd})
