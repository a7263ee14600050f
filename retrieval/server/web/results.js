// Lists of images that grow as the visitor scrolls: one, or two side by side.

import { blankList, blanks, drawHits, element } from "./hits.js";
import { meterOf, PAGE } from "./query.js";
import { format, named, sizeOf } from "./sizes.js";

const $ = (id) => document.getElementById(id);

let feed = null; // what is shown: {load, offset, lists, draw, onError}

// answers: the first page, one per list. load(offset): a promise of the next ones.
// scored: whether similarities are drawn.
export function show(answers, { load, onOpen, onError, scored = true }) {
  const lists = answers.map(() => element("ol", "hits"));
  const meters = answers.map((answer) => (scored ? meterOf(answer) : null));
  const shown = answers.map((answer) => new Set(answer.hits.map((hit) => hit.image)));
  const draw = (list, n, hits, elsewhere) =>
    drawHits(list, hits, { meter: meters[n], elsewhere, onOpen });
  lists.forEach((list, n) => draw(list, n, answers[n].hits, answers.length === 2 ? shown[1 - n] : null));
  $("results").replaceChildren(answers.length === 2 ? columns(answers, lists, shown) : lists[0]);
  feed = { load, lists, draw, onError, offset: nextOf(answers), busy: null };
  mark();
}

export function showOnce(hits, onOpen) {
  const list = element("ol", "hits");
  drawHits(list, hits, { onOpen });
  $("results").append(list);
  nothingMore();
}

export function nothingMore() {
  feed = null;
  mark();
}

const nextOf = (answers) => answers.map((answer) => answer.next_offset).find((next) => next !== null);

function mark() {
  $("more").hidden = feed?.offset === undefined;
  watcher.unobserve($("more"));
  if (!$("more").hidden) watcher.observe($("more")); // anew: it may be in sight already
}

// The next page. Whether there was one.
export function grow() {
  const mine = feed;
  if (mine?.offset === undefined) return Promise.resolve(false);
  mine.busy ??= append(mine).finally(() => { mine.busy = null; });
  return mine.busy;
}

async function append(mine) {
  const places = mine.lists.map((list) => {
    const made = blanks(PAGE);
    list.append(...made);
    return made;
  });
  try {
    const answers = await mine.load(mine.offset);
    if (mine !== feed) return false;
    places.flat().forEach((place) => place.remove());
    answers.forEach((answer, n) => mine.draw(mine.lists[n], n, answer.hits, null));
    mine.offset = nextOf(answers);
    mark();
    return answers.some((answer) => answer.hits.length > 0);
  } catch (error) {
    places.flat().forEach((place) => place.remove());
    if (error.name !== "AbortError") mine.onError(error);
    return false;
  }
}

const watcher = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) grow();
}, { rootMargin: "700px" });

export function listenToMore() {
  $("more").addEventListener("click", async () => {
    const list = feed?.lists[0];
    const from = list?.children.length;
    if (await grow()) list.children[from]?.querySelector("a").focus({ preventScroll: true });
  });
}

function columns(answers, lists, shown) {
  const box = element("div", "columns");
  const shared = [...shown[0]].filter((image) => shown[1].has(image)).length;
  answers.forEach((answer, n) => {
    const column = element("section");
    const title = element("h2", "", named(sizeOf(answer, "query_") || sizeOf(answer)));
    const read = answer.ms.image ? `read in ${format(answer.ms.image)}, ` : "";
    const legend = element("small");
    legend.append(element("span", "only", "●"), " only here");
    title.append(element("small", "", `${read}${shared} of ${answer.hits.length} in both`), legend);
    column.append(title, lists[n]);
    box.append(column);
  });
  return box;
}

// ---- while there is nothing yet, or never will be -------------------------------------------

export function stale() {
  const lists = $("results").querySelectorAll(".hits");
  if ($("results").querySelector(".try") || !lists.length) $("results").replaceChildren(blankList(PAGE));
  else lists.forEach((old) => old.classList.add("stale"));
}

export function fresh() {
  $("results").querySelectorAll(".stale").forEach((old) => old.classList.remove("stale"));
  if ($("results").querySelector(".blank")) $("results").replaceChildren();
}

export function empty(text) {
  $("results").replaceChildren(element("p", "empty", text));
  nothingMore();
}
