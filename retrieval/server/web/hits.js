// Draws images that were found, and lets the arrow keys walk among them.

import { imageURL } from "./api.js";
import { isChosen, toggle } from "./chosen.js";
import { isWhole } from "./overlay.js";
import { addressOf, idOf, nameOf } from "./state.js";

const ROOM = 0.82; // of a frame's sides, for a drawing: as the style sheet has it
export const THUMBNAIL = devicePixelRatio > 1 ? 512 : 320; // pixels

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// hits: as the server gives them. meter: a promise of similarity -> 0 to 1; null draws none.
// elsewhere: images of the other list, null without one. onOpen(hit, item): one was clicked.
export function drawHits(list, hits, { meter = null, elsewhere = null, onOpen }) {
  list.append(...hits.map((hit) => {
    const item = element("li", "hit");
    item.hit = hit;
    item.dataset.id = idOf(hit);
    const link = element("a");
    link.href = addressOf({ open: idOf(hit) });
    link.append(frame(hit), element("span", "caption", nameOf(hit)));
    if (meter) link.append(score(hit, meter, elsewhere && !elsewhere.has(hit.image)));
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return; // a new tab
      event.preventDefault();
      if (document.body.classList.contains("choosing")) toggle(hit);
      else onOpen(hit, item);
    });
    for (const event of ["mouseenter", "focusin", "mouseleave", "focusout"]) {
      item.addEventListener(event, () => showTwins(item.dataset.id, event === "mouseenter" || event === "focusin"));
    }
    item.append(link, choice(hit));
    return item;
  }));
}

function frame(hit) {
  const made = element("span", "frame");
  const image = element("img");
  image.alt = ""; // the link's text names it
  image.loading = "lazy";
  image.decoding = "async";
  const path = `${hit.image}?size=${THUMBNAIL}`;
  const release = () => URL.revokeObjectURL(image.src); // of one fetched with a token
  const lost = () => { release(); made.replaceChildren(element("span", "lost", "no image")); };
  image.addEventListener("error", lost);
  image.addEventListener("load", () => {
    release();
    const part = hit.box && !isWhole(hit.box);
    const look = fit(image);
    made.classList.add(part && look === "photo" ? "long" : look); // all of it, and so all of its part
    if (part) made.append(boxOver(image, look === "drawing" ? ROOM : 1, hit.box));
  });
  imageURL(path).then((url) => {
    if (url !== path) image.loading = "eager"; // it is here already
    image.src = url;
  }, lost);
  made.append(image);
  return made;
}

// How an image fills its square: a photo covers it; one that is very long, or stands on white as
// drawings do, is shown whole.
function fit(image) {
  const side = 12;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0, side, side);
  const { data } = pen.getImageData(0, 0, side, side);
  const isWhite = (n) => Math.min(data[4 * n], data[4 * n + 1], data[4 * n + 2]) > 240;
  const white = [...Array(side * side).keys()].filter(isWhite);
  const corners = [0, side - 1, side * (side - 1), side * side - 1].filter(isWhite);
  if (4 * white.length > side * side || corners.length > 2) return "drawing";
  const shape = image.naturalWidth / image.naturalHeight;
  return shape > 0.55 && shape < 1.9 ? "photo" : "long";
}

// room: the share of the frame's sides that the image may fill.
function boxOver(image, room, [left, top, right, bottom]) {
  const { naturalWidth, naturalHeight } = image;
  const scale = (100 * room) / Math.max(naturalWidth, naturalHeight);
  const [width, height] = [naturalWidth * scale, naturalHeight * scale];
  const made = element("span", "box");
  made.style.left = `${(100 - width) / 2 + left * width}%`;
  made.style.top = `${(100 - height) / 2 + top * height}%`;
  made.style.width = `${(right - left) * width}%`;
  made.style.height = `${(bottom - top) * height}%`;
  return made;
}

function score(hit, meter, only) {
  const made = element("span", "score");
  const bar = element("span", "meter");
  const part = element("i");
  bar.append(part);
  made.append(bar, element("span", "detail", hit.similarity.toFixed(3)));
  if (hit.words) bar.replaceWith(element("span", "worded", "in its words"));
  meter.then((scale) => {
    if (scale) part.style.setProperty("--part", scale(hit.similarity));
    else bar.remove();
  }, () => bar.remove());
  if (only) {
    const dot = element("span", "only", "●");
    dot.title = "only in this list";
    made.append(dot);
  }
  return made;
}

function choice(hit) {
  const box = element("input", "choice");
  box.type = "checkbox";
  box.checked = isChosen(hit);
  box.setAttribute("aria-label", `Choose ${nameOf(hit)}`);
  box.addEventListener("change", () => toggle(hit));
  return box;
}

function showTwins(id, shown) {
  for (const other of document.querySelectorAll(".columns .hit")) {
    other.classList.toggle("twin", shown && other.dataset.id === id);
  }
}

// What stands where images will be.
export function blanks(count) {
  return Array.from({ length: count }, () => {
    const item = element("li", "hit blank");
    item.setAttribute("aria-hidden", "true");
    item.append(element("span", "frame"), element("span", "caption", "\u00a0"));
    return item;
  });
}

export function blankList(count) {
  const list = element("ol", "hits");
  list.append(...blanks(count));
  return list;
}

// Arrow keys: left and right by one, up and down by a row.
export function walk(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 0, ArrowDown: 0 };
  const here = document.activeElement;
  if (!(event.key in steps) || !here?.matches(".hit > a")) return;
  const cards = [...here.closest(".hits").querySelectorAll(".hit > a")];
  const top = cards[0].getBoundingClientRect().top;
  const columns = cards.filter((card) => card.getBoundingClientRect().top === top).length;
  const step = steps[event.key] || (event.key === "ArrowUp" ? -columns : columns);
  const next = cards[cards.indexOf(here) + step];
  event.preventDefault();
  if (next) next.focus();
  else if (event.key === "ArrowUp") document.getElementById("text").focus();
}
