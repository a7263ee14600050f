// One image large: the image, what is known of it, and what can be done with it.

import { followWithToken, get, imageURL } from "./api.js";
import { isChosen, toggle } from "./chosen.js";
import { describe, labelOf } from "./columns.js";
import { element, THUMBNAIL } from "./hits.js";
import { drawMap, listenToMap } from "./map.js";
import { isWhole, layOver } from "./overlay.js";
import { grow } from "./results.js";
import { addressOf, idOf, imagePath, nameOf, state } from "./state.js";

const $ = (id) => document.getElementById(id);
const LARGE = 1024; // pixels, the server's largest thumbnail
const SWIPE = 50; // pixels of a finger's way

let here = null; // {hit, item, urls}: what is shown, its place in a list if it has one, its images
let entered = false; // whether opening it added a step to the history

// hit: as a search gives it. item: its place in a list; arrow keys go on from there.
export function openViewer(hit, item = null, { remember = true } = {}) {
  const was = $("viewer").open;
  state.open = idOf(hit);
  if (remember) {
    if (was) history.replaceState(history.state, "", addressOf());
    else history.pushState(null, "", addressOf());
    entered ||= !was;
  }
  release();
  here = { hit, item, known: hit, pixels: "", urls: [] };
  draw();
  if (was) return;
  $("viewer").showModal();
  $("viewer").focus(); // not its first button, which would look chosen
}

// The image that the address names.
export async function openById(id) {
  const item = [...document.querySelectorAll(".hit")].find((one) => one.dataset.id === id);
  const hit = item?.hit ?? await get(`${imagePath(id)}/about`);
  openViewer(hit, item ?? null, { remember: false });
}

function closed() {
  const item = here?.item;
  release();
  here = null;
  drawMap(null);
  $("viewer-image").removeAttribute("src");
  if (item?.isConnected) item.querySelector("a").focus();
  if (!state.open) return; // the address has changed already
  state.open = "";
  if (entered) history.back();
  else history.replaceState(null, "", addressOf());
  entered = false;
}

// Images that were fetched with a token stay in memory until their addresses are given back.
function release() {
  here?.urls.forEach((url) => URL.revokeObjectURL(url));
}

// Called where the address has lost its image.
export function leave() {
  state.open = "";
  entered = false;
  if ($("viewer").open) $("viewer").close();
}

async function move(step) {
  if (!here?.item) return;
  const beside = () => (step < 0 ? here.item.previousElementSibling : here.item.nextElementSibling);
  if (step > 0 && !beside()?.hit && !(await grow())) return;
  const next = here && beside();
  if (!next?.hit) return;
  next.scrollIntoView({ block: "nearest" });
  openViewer(next.hit, next);
}

// ---- drawing --------------------------------------------------------------------------------

function draw() {
  const { hit, item } = here;
  drawImage(hit);
  $("viewer-name").textContent = nameOf(hit);
  $("viewer-similar").href = addressOf({ open: "", q: "", like: idOf(hit) });
  const file = `${imagePath(idOf(hit))}/file`;
  $("viewer-original").href = file;
  $("viewer-download").href = `${file}?download=true`;
  drawChoice();
  drawMap(hit);
  drawBox();
  drawFacts(hit);
  get(`${imagePath(idOf(hit))}/about`).then((about) => {
    if (here?.hit !== hit) return;
    here.known = { ...hit, ...about, similarity: hit.similarity };
    drawFacts(here.known);
  }, () => {});
  $("viewer-back").disabled = !item?.previousElementSibling;
  $("viewer-on").disabled = !item?.nextElementSibling && $("more").hidden;
  $("viewer-back").hidden = $("viewer-on").hidden = !item;
}

// A thumbnail first, which is here at once; the image's own file where it shows more.
async function drawImage(hit) {
  const image = $("viewer-image");
  const shown = here;
  const still = () => here === shown;
  const fetched = async (path) => {
    const url = await imageURL(path);
    if (still()) shown.urls.push(url);
    else URL.revokeObjectURL(url);
    return url;
  };
  const place = (url) => { if (still()) image.src = url; };
  $("viewer-stage").classList.remove("lost");
  image.alt = nameOf(hit);
  place(await fetched(`${hit.image}?size=${THUMBNAIL}`).catch(() => ""));
  try {
    await load(await fetched(`${hit.image}?size=${LARGE}`), place);
  } catch {
    if (still()) $("viewer-stage").classList.add("lost");
    return;
  }
  const needed = Math.max(image.clientWidth, image.clientHeight) * devicePixelRatio;
  if (!still() || needed <= LARGE) return;
  const original = await fetched(`${imagePath(idOf(hit))}/file`).then((url) => load(url, place)).catch(() => null);
  if (!original || !still()) return;
  here.pixels = `${original.naturalWidth.toLocaleString("en")} × ${original.naturalHeight.toLocaleString("en")}`;
  drawFacts(here.known);
}

async function load(url, place) {
  const waiting = new Image();
  waiting.src = url;
  await waiting.decode();
  place(url);
  return waiting;
}

// The part that was found, where parts were searched.
function drawBox() {
  const box = here?.hit.box;
  $("viewer-box").hidden = !box || isWhole(box);
  if (!$("viewer-box").hidden) layOver($("viewer-box"), $("viewer-image"), box);
}

function drawChoice() {
  $("viewer-choose").checked = isChosen(here.hit);
}

function drawFacts(hit) {
  const { latitude, longitude, ...others } = hit.columns ?? {};
  const isPlace = typeof latitude === "number" && typeof longitude === "number";
  const rows = [["Path", hit.key]];
  for (const [name, value] of Object.entries(isPlace ? others : hit.columns ?? {})) {
    const known = (name === "folder" || name === "file") && hit.key.includes(value);
    const text = known ? "" : describe(name, value);
    if (text) rows.push([labelOf(name), text]);
  }
  if (isPlace) rows.push(["Place", `${latitude.toFixed(5)}, ${longitude.toFixed(5)}`]);
  if (hit.bytes) rows.push(["File", [size(hit.bytes), here.pixels].filter(Boolean).join(", ")]);
  const facts = rows.flatMap(([name, text]) => [element("dt", "", name), element("dd", "", text)]);
  if (hit.similarity) facts.push(element("dt", "detail", "Similarity"), element("dd", "detail", hit.similarity.toFixed(3)));
  $("viewer-facts").replaceChildren(...facts);
}

const size = (bytes) =>
  bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;

// onSimilar(hit): images like it are wanted.
// onPart(hit): images like a part of it are.
export function listenToViewer(onSimilar, onPart) {
  const dialog = $("viewer");
  listenToMap();
  new ResizeObserver(drawBox).observe($("viewer-stage"));
  $("viewer-image").addEventListener("load", drawBox);
  dialog.addEventListener("close", closed);
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.type === "radio") return; // whose arrow keys choose
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      move(event.key === "ArrowLeft" ? -1 : 1);
    }
  });
  let began = null; // where a finger came down
  $("viewer-stage").addEventListener("touchstart", (event) => {
    began = event.touches.length === 1 ? event.touches[0] : null; // two fingers zoom
  }, { passive: true });
  $("viewer-stage").addEventListener("touchend", (event) => {
    const way = began ? event.changedTouches[0].clientX - began.clientX : 0;
    if (Math.abs(way) > SWIPE) move(way > 0 ? -1 : 1);
  });
  $("viewer-close").addEventListener("click", () => dialog.close());
  $("viewer-back").addEventListener("click", () => move(-1));
  $("viewer-on").addEventListener("click", () => move(1));
  $("viewer-choose").addEventListener("change", () => { toggle(here.hit); drawChoice(); });
  for (const link of [$("viewer-original"), $("viewer-download")]) followWithToken(link);
  const leaveFor = (search) => {
    const { hit } = here;
    here.item = null; // its list is about to go
    leave();
    search(hit);
  };
  $("viewer-part").addEventListener("click", () => leaveFor(onPart));
  $("viewer-similar").addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    leaveFor(onSimilar);
  });
}
