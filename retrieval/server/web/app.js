// The page: what is looked for, at which patch sizes, and what came of it.

import { get, imageBlob, imageURL, Refused } from "./api.js";
import { forgetChosen, listenToChoice } from "./chosen.js";
import { classify, drawBars } from "./classify.js";
import { drawFilters, listenToFilters } from "./filters.js";
import { listenToDrops, listenToKeys } from "./gestures.js";
import { blankList, element } from "./hits.js";
import { button, drawControls, listenToDetails } from "./look.js";
import { openPart, listenToPart } from "./part.js";
import { drawProgress, watchProgress } from "./progress.js";
import { asWords, browse, PAGE, sample, search } from "./query.js";
import { empty, fresh, listenToMore, nothingMore, show, showOnce, stale } from "./results.js";
import { finest, format, named, sizeOf } from "./sizes.js";
import { addressOf, another, asked, byImage, filtered, forget, readAddress, setNamed, sizes, state, writeAddress } from "./state.js";
import { counted, countAlike, say } from "./status.js";
import { leave, listenToViewer, openById, openViewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const IDEAS = ["a happy cat", "something to eat", "a red vehicle", "bad weather", "making music", "time to celebrate"];
const LABELS = "animal\nfood\nvehicle\nbuilding\nplant\nperson\nsport\nclothing\nweather";

let indices = [];
let running = new AbortController();

// ---- what is shown --------------------------------------------------------------------------

async function run({ remember = true } = {}) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  $("notice").hidden = true;
  document.title = state.view === "search" && state.text ? `${state.text} – FlexiLiT` : "FlexiLiT";
  if (remember) writeAddress();
  drawControls(run);
  drawFilters();
  drawProgress();
  try {
    if (state.view === "classify") await runClassify(signal);
    else if (asked()) await runSearch(signal);
    else if (filtered()) await runBrowse(signal);
    else await runSample(signal);
  } catch (error) {
    if (error.name !== "AbortError") showNotice(error);
  }
}

async function runSearch(signal) {
  stale();
  const chosen = sizes(); // for all pages, though a finer one may come meanwhile
  const answers = await search(chosen, 0, signal);
  if (signal.aborted) return;
  if (byImage()) answers.forEach((answer) => { state.measured[sizeOf(answer, "query_")] = answer.ms.image; });
  const alike = button("", () => { state.distinct = false; run(); });
  const load = async (offset) => {
    const more = await search(chosen, offset, signal);
    countAlike(alike, more);
    return more;
  };
  countAlike(alike, answers);
  show(answers, { load, onOpen: openViewer, onError: showNotice });
  if (!answers[0].hits.length) empty(asWords(state.text) ? "No caption, name or other text holds these words." : filtered() ? "Nothing found within the filter." : "Nothing found. The index may be empty.");
  say(answers[0], answers.every((answer) => answer.found === false), alike);
  drawControls(run);
}

async function runBrowse(signal) {
  stale();
  const answers = await browse(0, signal);
  if (signal.aborted) return;
  show(answers, { load: (offset) => browse(offset, signal), onOpen: openViewer, onError: showNotice, scored: false });
  if (!answers[0].hits.length) empty("No image passes the filter.");
  $("status").textContent = `${answers[0].count.toLocaleString("en")} of ${counted()}`;
}

async function runSample(signal) {
  nothingMore();
  if (!$("results").children.length) $("results").replaceChildren(blankList(PAGE));
  const { hits } = await sample(signal);
  if (signal.aborted) return;
  if (!hits.length) {
    empty(state.index.indexing && !state.index.indexing.problem ? "The first photos will be here in a moment." : "This index holds no images yet.");
    $("status").textContent = "";
    return;
  }
  const naming = state.view === "classify";
  const others = button("Others", () => run({ remember: false }));
  $("status").replaceChildren(naming ? "No image at hand? Take one of these." : `Some of ${counted()}`, others);
  $("results").replaceChildren(...(naming ? [] : [ideas()]));
  showOnce(hits, naming ? nameIt : openViewer);
}

function ideas() {
  const list = document.createElement("ul");
  list.className = "try";
  for (const idea of IDEAS) {
    const item = document.createElement("li");
    item.append(button(idea, () => { $("text").value = state.text = idea; run(); }));
    list.append(item);
  }
  return list;
}

async function searchLike(hit) {
  forget();
  state.text = $("text").value = "";
  state.image = { hit, url: await imageURL(`${hit.image}?size=96`) };
  state.view = "search";
  window.scrollTo({ top: 0 });
  await run();
  $("text").focus({ preventScroll: true });
}

async function nameIt(hit) {
  try {
    setNamed(await imageBlob(`${hit.image}?size=640`));
  } catch (error) {
    return showNotice(error);
  }
  window.scrollTo({ top: 0, behavior: "smooth" });
  return run();
}

async function runClassify(signal) {
  nothingMore();
  if (!state.named) {
    $("bars").replaceChildren();
    return runSample(signal);
  }
  const answers = await classify(state.index.name, state.named.blob, sizes(), signal);
  if (signal.aborted) return;
  $("results").replaceChildren();
  if (!answers) {
    $("bars").replaceChildren();
    $("status").textContent = "List what it could be, and see which label fits best.";
    return;
  }
  answers.forEach((answer) => { state.measured[sizeOf(answer)] = answer.ms.image; });
  drawBars(answers);
  const [answer, other] = answers;
  const { ms } = answer;
  const times = element("span", "detail", `${named(sizeOf(answer))}: image read in ${format(ms.image)}, answered in ${format(ms.total)}`
    + (other ? ` · thin bars, ${named(sizeOf(other)).toLowerCase()}: read in ${format(other.ms.image)}` : ""));
  const nothing = answers.every((answer) => answer.found === false);
  $("status").replaceChildren(...(nothing ? ["None of these labels fits."] : []), times);
  drawControls(run);
}

function showNotice(error) {
  if (!(error instanceof Refused)) console.error(error);
  const text = error instanceof Refused ? error.message : "Something went wrong on this page.";
  $("notice").replaceChildren(text, button("Try again", () => run({ remember: false })));
  $("notice").hidden = false;
  fresh();
}

// ---- what the visitor does ------------------------------------------------------------------

function take(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    showNotice(new Refused("This file is no image. Allowed: JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF."));
    return;
  }
  if (state.view === "classify") setNamed(file);
  else {
    forget();
    state.text = $("text").value = "";
    state.image = { blob: file, url: URL.createObjectURL(file) };
  }
  run();
}

function setView(view) {
  if (view === "classify" && !state.named && state.image?.blob) setNamed(state.image.blob);
  state.view = view;
  state.measured = {};
  forgetChosen();
  $("results").replaceChildren();
  run();
}

// Takes up the address; whether it asks for something else than before.
async function openAddress() {
  const before = state.index && addressOf({ open: "" });
  await readAddress(indices);
  $("index").value = state.index.name;
  $("text").value = state.text;
  const changed = addressOf({ open: "" }) !== before;
  if (changed && state.image?.blob) forget();
  return changed;
}

async function showOpened() {
  if (!state.open) return leave();
  try {
    await openById(state.open);
  } catch (error) {
    leave();
    showNotice(error);
  }
}

let typing = 0;
function soon(action, ms) {
  clearTimeout(typing);
  typing = setTimeout(action, ms);
}

function listen(limits) {
  const takeWords = () => { state.text = $("text").value.trim(); run(); };
  const takeFile = (event) => { take(event.target.files[0]); event.target.value = ""; };
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    takeWords();
  });
  $("text").addEventListener("input", () => soon(() => { if (state.text !== $("text").value.trim()) takeWords(); }, 220));
  $("labels").addEventListener("input", () => { $("set").value = ""; soon(run, 350); });
  $("set").addEventListener("change", () => run());
  for (const id of ["file", "classify-file"]) $(id).addEventListener("change", takeFile);
  $("chip-remove").addEventListener("click", () => { forget(); run(); $("text").focus(); });
  $("compare").addEventListener("change", (event) => { state.other = event.target.checked ? another() : 0; run(); });
  $("tokens").addEventListener("change", (event) => {
    const count = Math.round(Number(event.target.value));
    if (count > 0) state.size = -count;
    run();
  });
  $("index").addEventListener("change", (event) => {
    state.index = indices.find((index) => index.name === event.target.value);
    state.where = {};
    state.regions &&= state.index.region_sizes.length > 0;
    forget();
    forgetChosen();
    $("results").replaceChildren();
    run();
    watchProgress(indices, grown);
  });
  $("home").addEventListener("click", (event) => {
    event.preventDefault();
    forget();
    state.text = $("text").value = "";
    state.where = {};
    state.other = 0;
    setView("search");
  });
  for (const view of ["search", "classify"]) $(`tab-${view}`).addEventListener("click", () => setView(view));
  listenToKeys(setView);
  listenToDrops(take);
  listenToViewer(searchLike, (hit) => searchLike(hit).then(openPart));
  listenToPart(run);
  listenToFilters(run);
  listenToChoice(limits);
  listenToMore();
  listenToDetails();
  window.addEventListener("refused", (event) => showNotice(event.detail));
  window.addEventListener("popstate", async () => {
    if (await openAddress()) await run({ remember: false });
    await showOpened();
  });
}

function grown(before) {
  if (state.size === before) state.size = finest(state.index);
  drawControls(run);
  if (state.view === "search" && !asked() && !filtered() && $("results").querySelectorAll(".hit").length < PAGE) run({ remember: false });
}

async function start() {
  $("results").replaceChildren(blankList(PAGE));
  $("status").textContent = "Opening the index …"; // the page may be here before the server is
  try {
    const found = await get("v1/indices");
    indices = found.indices;
    $("index").replaceChildren(...indices.map((index) => new Option(index.name, index.name)));
    $("index").parentElement.hidden = indices.length < 2;
    $("set").replaceChildren(new Option("my labels above", ""), ...found.class_sets.map((set) =>
      new Option(`${set.name} (${set.count.toLocaleString("en")})`, set.name)));
    $("sets").hidden = !found.class_sets.length;
    $("labels").value = LABELS;
    await openAddress();
    listen(found.limits);
    watchProgress(indices, grown);
    await run({ remember: false });
    await showOpened();
  } catch (error) {
    $("notice").replaceChildren(error.message, button("Try again", () => location.reload()));
    $("notice").hidden = false;
    fresh();
  }
}

start();
