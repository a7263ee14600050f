// Where in the image that is shown large the words are: a map over it, coarse or fine.

import { post } from "./api.js";
import { element } from "./hits.js";
import { layOver } from "./overlay.js";
import { parseWords, unmarked } from "./query.js";
import { idOf, state } from "./state.js";

const $ = (id) => document.getElementById(id);
const COLOUR = [255, 84, 0];
const MOST = 0.8; // opacity
const WINDOWS = [3, 5]; // a side; each is read as an image of its own, which words were trained on

let size = 0; // the patch size of maps, which stays from image to image; 0: none is drawn
let asking = new AbortController();

const words = () => (state.view === "search" ? unmarked(parseWords(state.text).wanted) : "");

// hit: what is shown large; null: nothing any more.
export function drawMap(hit) {
  asking.abort();
  $("viewer-map").hidden = true;
  $("viewer-map-range").textContent = "";
  const sizes = state.index.map_patch_sizes;
  $("viewer-where").hidden = !hit || !words() || !sizes.length;
  if ($("viewer-where").hidden) return;
  if (!sizes.includes(size)) size = 0;
  $("viewer-where").querySelector("legend").textContent = `Where is “${words()}”?`;
  $("viewer-where").querySelector(".options").replaceChildren(...[0, ...sizes].map((one) => option(one, hit)));
  if (size) ask(hit);
}

function option(one, hit) {
  const ends = [0, size, Math.min(...state.index.map_patch_sizes), Math.max(...state.index.map_patch_sizes)];
  const label = element("label", ends.includes(one) ? "" : "detail");
  const input = element("input");
  input.type = "radio";
  input.name = "viewer-where";
  input.checked = one === size;
  input.addEventListener("change", () => { size = one; drawAgain(hit); });
  label.append(input);
  if (one) {
    const cells = element("span", "cells");
    cells.style.setProperty("--n", Math.min(10, state.index.image_size / one));
    label.append(cells);
    label.title = `Windows read by patches of ${one} pixels`;
  }
  label.append(...names(one));
  return label;
}

// Numbers are for those who ask for details; others choose between the ends.
function names(one) {
  if (!one) return [element("b", "", "Off")];
  const sizes = state.index.map_patch_sizes;
  const fine = one === Math.min(...sizes) ? "Fine" : "";
  const plain = sizes.length === 1 ? "On" : one === Math.max(...sizes) ? "Coarse" : fine;
  return [element("b", "detail", String(one)), element("b", "plain", plain)];
}

function drawAgain(hit) {
  asking.abort();
  $("viewer-map").hidden = true;
  $("viewer-map-range").textContent = "";
  if (size) ask(hit);
}

async function ask(hit) {
  asking = new AbortController();
  const { signal } = asking;
  try {
    $("viewer-map-range").textContent = "Looking …";
    const asked = { index: state.index.name, id: idOf(hit), text: words(), patch_size: size, windows: WINDOWS };
    const { similarities } = await post("v1/map", asked, signal);
    if (!signal.aborted) draw(similarities);
  } catch (error) {
    if (error.name !== "AbortError") $("viewer-map-range").textContent = error.message;
  }
}

// What is most like the words is covered most, what is least like them not at all.
function draw(rows) {
  const map = $("viewer-map");
  [map.width, map.height] = [rows[0].length, rows.length];
  const values = rows.flat();
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const pen = map.getContext("2d");
  const pixels = pen.createImageData(map.width, map.height);
  values.forEach((value, n) => {
    const share = (value - least) / (most - least || 1);
    pixels.data.set([...COLOUR, 255 * MOST * share], 4 * n);
  });
  pen.putImageData(pixels, 0, 0);
  map.hidden = false;
  place();
  const range = `From ${least.toFixed(2)} (clear) to ${most.toFixed(2)} (full colour), cosines`;
  $("viewer-map-range").replaceChildren(
    element("span", "detail", range),
    element("span", "plain", "The stronger the colour, the more like the words."),
  );
}

function place() {
  if (!$("viewer-map").hidden) layOver($("viewer-map"), $("viewer-image"));
}

export function listenToMap() {
  new ResizeObserver(place).observe($("viewer-stage"));
  $("viewer-image").addEventListener("load", place);
}
