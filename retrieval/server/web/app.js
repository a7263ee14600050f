// The page: what is looked for, at which patch sizes, and what came of it.

import { get, imageBlob, imageURL, post, Refused, toBase64 } from "./api.js";
import { classify, drawBars } from "./classify.js";
import { listenToDrops, listenToKeys } from "./gestures.js";
import { blanks, drawHits } from "./hits.js";
import { button, drawControls, empty, stale } from "./look.js";
import { format } from "./sizes.js";
import { another, asked, byImage, forget, readAddress, setNamed, sizes, state, writeAddress } from "./state.js";

const $ = (id) => document.getElementById(id);
const PAGE = 24;
const IDEAS = ["a happy cat", "something to eat", "a red vehicle", "bad weather", "making music", "time to celebrate"];
const LABELS = "animal\nfood\nvehicle\nbuilding\nplant\nperson\nsport\nclothing\nweather";

let indices = [];
let running = new AbortController();

// ---- what is asked --------------------------------------------------------------------------

async function query(size, offset) {
  const held = state.index.patch_sizes.find((option) => option.patch_size === size)?.in_index;
  const body = { index: state.index.name, k: PAGE, offset };
  const terms = [];
  if (state.image?.blob) {
    terms.push({ image: await toBase64(state.image.blob) });
    body.query_patch_size = size;
    if (held) body.index_patch_size = size;
  } else {
    body.index_patch_size = size;
    if (state.image) terms.push({ id: state.image.hit.image.split("/").pop() });
  }
  if (state.text) terms.push({ text: state.text });
  return terms.length === 1 ? { ...body, ...terms[0] } : { ...body, mix: terms };
}

async function ask(offset, signal) {
  const bodies = await Promise.all(sizes().map((size) => query(size, offset)));
  return Promise.all(bodies.map((body) => post("v1/search", body, signal)));
}

// ---- search ---------------------------------------------------------------------------------

async function run({ remember = true } = {}) {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  hideNotice();
  if (remember) writeAddress(indices[0]);
  drawControls(run);
  try {
    if (state.view === "classify") await runClassify(signal);
    else if (asked()) await runSearch(signal);
    else await showSample(signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) console.error(error);
    showNotice(error instanceof Refused ? error.message : "Something went wrong on this page.");
  }
}

async function runSearch(signal) {
  stale();
  const answers = await ask(0, signal);
  if (signal.aborted) return;
  note(answers);
  $("results").replaceChildren(...(answers.length === 2 ? [columns(answers)] : [list(answers[0])]));
  if (!answers[0].hits.length) empty("Nothing found. The index may be empty.");
  setMore(answers);
  say(answers);
  drawControls(run);
}

function list(answer, elsewhere = null) {
  const made = document.createElement("ol");
  made.className = "hits";
  drawHits(made, answer.hits, { best: fullMeter(made, answer), elsewhere, onPick: pick });
  return made;
}

// The first page's best similarity fills the meter, on later pages too.
function fullMeter(made, answer) {
  made.dataset.best ??= answer.hits[0]?.similarity > 0 ? answer.hits[0].similarity : 1;
  return Number(made.dataset.best);
}

function columns(answers) {
  const box = document.createElement("div");
  box.className = "columns";
  const ids = answers.map((answer) => new Set(answer.hits.map((hit) => hit.image)));
  const shared = [...ids[0]].filter((id) => ids[1].has(id)).length;
  answers.forEach((answer, n) => {
    const column = document.createElement("section");
    const title = document.createElement("h2");
    const size = answer.query_patch_size ?? answer.patch_size;
    title.textContent = `Patch ${size}`;
    const detail = document.createElement("small");
    const read = answer.ms.image ? `read in ${format(answer.ms.image)}, ` : "";
    detail.textContent = `${read}${shared} of ${answer.hits.length} in both`;
    const legend = document.createElement("small");
    const dot = document.createElement("span");
    dot.className = "only";
    dot.textContent = "●";
    legend.append(dot, " only here");
    title.append(detail, legend);
    column.append(title, list(answer, ids[1 - n]));
    box.append(column);
  });
  return box;
}

function setMore(answers) {
  const offset = answers.map((answer) => answer.next_offset).find((next) => next !== null);
  $("more").hidden = offset === undefined || $("results").querySelector(".empty") !== null;
  $("more").onclick = async () => {
    $("more").disabled = true;
    try {
      const { signal } = running;
      const next = await ask(offset, signal);
      const lists = [...$("results").querySelectorAll(".hits")];
      const from = lists[0].children.length;
      next.forEach((answer, n) => {
        drawHits(lists[n], answer.hits, { best: fullMeter(lists[n], answer), onPick: pick });
      });
      setMore(next);
      lists[0].children[from]?.querySelector("button").focus({ preventScroll: true });
    } catch (error) {
      if (error.name !== "AbortError") showNotice(error.message);
    }
    $("more").disabled = false;
  };
}

function note(answers) {
  if (!byImage()) return;
  answers.forEach((answer) => {
    state.measured[answer.query_patch_size] = answer.ms.image;
  });
}

function say(answers) {
  const steps = ["text", "image", "search"].filter((step) => answers[0].ms[step] > 0);
  const names = { text: "words", image: "image", search: "search" };
  const detail = steps.map((step) => `${names[step]} ${format(answers[0].ms[step])}`).join(" · ");
  $("status").textContent = `Best of ${state.index.count.toLocaleString("en")} images in ${format(answers[0].ms.total)} (${detail})`;
}

async function showSample(signal) {
  $("more").hidden = true;
  if (!$("results").children.length) $("results").replaceChildren(blanks(12));
  const { hits } = await get(`v1/indices/${encodeURIComponent(state.index.name)}/sample?n=18`);
  if (signal.aborted) return;
  const again = button("Others", () => run({ remember: false }));
  $("status").replaceChildren(`Some of ${state.index.count.toLocaleString("en")} images. Pick one to find more like it.`, again);
  const ideas = document.createElement("ul");
  ideas.className = "try";
  for (const idea of IDEAS) {
    const item = document.createElement("li");
    item.append(button(idea, () => { $("text").value = idea; state.text = idea; run(); }));
    ideas.append(item);
  }
  const images = document.createElement("ol");
  images.className = "hits";
  drawHits(images, hits, { onPick: pick });
  $("results").replaceChildren(ideas, images);
  if (!hits.length) empty("This index holds no images yet.");
}

async function pick(hit) {
  if (state.view === "classify") {
    const blob = await imageBlob(`${hit.image}?size=640`);
    setNamed(blob);
    window.scrollTo({ top: 0, behavior: "smooth" });
    return run();
  }
  forget();
  state.text = $("text").value = "";
  state.image = { hit, url: await imageURL(`${hit.image}?size=96`) };
  await run();
  window.scrollTo({ top: 0, behavior: "smooth" });
}

// ---- the playground -------------------------------------------------------------------------

async function runClassify(signal) {
  $("more").hidden = true;
  if (!state.named) {
    $("bars").replaceChildren();
    await showSample(signal);
    $("results").querySelector(".try")?.remove();
    $("status").firstChild.textContent = "No image at hand? Take one of these. ";
    return;
  }
  const answers = await classify(state.index.name, state.named.blob, sizes(), signal);
  if (signal.aborted) return;
  $("results").replaceChildren();
  if (!answers) {
    $("bars").replaceChildren();
    $("status").textContent = "List what it could be, and see which label fits best.";
    return;
  }
  answers.forEach((answer) => { state.measured[answer.patch_size] = answer.ms.image; });
  drawBars(answers);
  const [{ ms, patch_size: size }, other] = answers;
  $("status").textContent = `Patch ${size}: image read in ${format(ms.image)}, answered in ${format(ms.total)}`
    + (other ? ` · thin bars, patch ${other.patch_size}: read in ${format(other.ms.image)}` : "");
  drawControls(run);
}

// ---- drawing --------------------------------------------------------------------------------

function showNotice(text) {
  $("notice").replaceChildren(text, button("Try again", () => run({ remember: false })));
  $("notice").hidden = false;
  $("results").querySelectorAll(".stale").forEach((old) => old.classList.remove("stale"));
  if ($("results").querySelector(".blank")) $("results").replaceChildren();
}

function hideNotice() {
  $("notice").hidden = true;
}

// ---- what the visitor does ------------------------------------------------------------------

function take(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    showNotice("This file is no image. Allowed: JPEG, PNG, WebP, GIF, BMP and TIFF.");
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
  $("results").replaceChildren();
  run();
}

async function openAddress() {
  await readAddress(indices);
  $("index").value = state.index.name;
  $("text").value = state.text;
}

let typing = 0;
function onType() {
  clearTimeout(typing);
  typing = setTimeout(() => {
    if (state.text === $("text").value.trim()) return;
    state.text = $("text").value.trim();
    run();
  }, 220);
}

function listen() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    state.text = $("text").value.trim();
    run();
  });
  $("text").addEventListener("input", onType);
  $("labels").addEventListener("input", () => {
    clearTimeout(typing);
    $("set").value = "";
    typing = setTimeout(run, 350);
  });
  $("set").addEventListener("change", () => run());
  $("file").addEventListener("change", (event) => { take(event.target.files[0]); event.target.value = ""; });
  $("classify-file").addEventListener("change", (event) => { take(event.target.files[0]); event.target.value = ""; });
  $("chip-remove").addEventListener("click", () => { forget(); run(); $("text").focus(); });
  $("compare").addEventListener("change", (event) => { state.other = event.target.checked ? another() : 0; run(); });
  $("index").addEventListener("change", (event) => {
    state.index = indices.find((index) => index.name === event.target.value);
    forget();
    $("results").replaceChildren();
    run();
  });
  $("home").addEventListener("click", (event) => {
    event.preventDefault();
    forget();
    state.text = $("text").value = "";
    state.other = 0;
    setView("search");
  });
  for (const view of ["search", "classify"]) $(`tab-${view}`).addEventListener("click", () => setView(view));
  listenToKeys(setView);
  listenToDrops(take);
  window.addEventListener("popstate", async () => { await openAddress(); run({ remember: false }); });
}

async function start() {
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
    listen();
    await run({ remember: false });
  } catch (error) {
    $("notice").replaceChildren(error.message, button("Try again", () => location.reload()));
    $("notice").hidden = false;
  }
}

start();
