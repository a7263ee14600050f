// A part of the image to search with: a rectangle drawn over it, or moved by the arrow keys.

import { imageURL } from "./api.js";
import { layOver, placeOf } from "./overlay.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);
const LARGE = 1024; // pixels
const LEAST = 0.02; // of a side; a smaller rectangle is a click
const STEP = 0.05; // of an arrow key
const FIRST = [0.25, 0.25, 0.75, 0.75];

let box = null;

export async function openPart() {
  const { image } = state;
  const source = image.blob ? image.url : await imageURL(`${image.hit.image}?size=${LARGE}`);
  if (state.image !== image) return; // it was removed meanwhile
  box = image.box ?? null;
  $("part-image").src = source;
  $("part").showModal();
  $("part-stage").focus();
  draw();
}

function draw() {
  $("part-box").hidden = !box;
  if (box) layOver($("part-box"), $("part-image"), box);
}

const clamp = (value) => Math.max(0, Math.min(1, value));

// Where in the picture a pointer is.
function pointOf(event) {
  const { left, top, width, height } = placeOf($("part-image"));
  const stage = $("part-stage").getBoundingClientRect();
  return [clamp((event.clientX - stage.left - left) / width), clamp((event.clientY - stage.top - top) / height)];
}

const between = ([x, y], [u, v]) => [Math.min(x, u), Math.min(y, v), Math.max(x, u), Math.max(y, v)];

function listenToPointer() {
  const stage = $("part-stage");
  let from = null;
  stage.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button) return; // one finger, or the left button
    from = pointOf(event);
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!from || !event.isPrimary) return;
    const drawn = between(from, pointOf(event));
    box = drawn[2] - drawn[0] > LEAST && drawn[3] - drawn[1] > LEAST ? drawn : null;
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, (event) => { if (event.isPrimary) from = null; });
}

function listenToArrows() {
  const ways = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
  $("part-stage").addEventListener("keydown", (event) => {
    const way = ways[event.key];
    if (!way && event.key !== "Enter") return;
    event.preventDefault(); // of Enter: the button that gets the focus back would open this again
    if (!way) return $("part-search").click();
    const [left, top, right, bottom] = box ?? FIRST;
    const [x, y] = way;
    if (!box) box = FIRST;
    else if (event.shiftKey) box = [left, top, clamp(Math.max(left + STEP, right + x)), clamp(Math.max(top + STEP, bottom + y))];
    else {
      const dx = Math.max(-left, Math.min(1 - right, x));
      const dy = Math.max(-top, Math.min(1 - bottom, y));
      box = [left + dx, top + dy, right + dx, bottom + dy];
    }
    draw();
  });
}

// onChange(): the part has changed.
export function listenToPart(onChange) {
  const take = (chosen) => {
    state.image.box = chosen?.map((side) => Number(clamp(side).toFixed(3))) ?? null;
    $("part").close();
    onChange();
  };
  $("chip-image").addEventListener("click", openPart);
  listenToPointer();
  listenToArrows();
  $("part-image").addEventListener("load", () => {
    const { src } = $("part-image");
    if (src !== state.image?.url) URL.revokeObjectURL(src); // of one fetched with a token
    draw();
  });
  new ResizeObserver(draw).observe($("part-stage"));
  $("part-whole").addEventListener("click", () => take(null));
  $("part-search").addEventListener("click", () => take(box));
  $("part-close").addEventListener("click", () => $("part").close());
}
