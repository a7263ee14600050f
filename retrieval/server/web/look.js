// Draws what is around the images: the controls, and what stands where there are none.

import { blanks } from "./hits.js";
import { drawSizes, explain, finest } from "./sizes.js";
import { another, byImage, state } from "./state.js";

const $ = (id) => document.getElementById(id);

export function drawControls(run) {
  const { index, measured } = state;
  const held = index.patch_sizes.filter((option) => option.in_index || byImage());
  const offered = (size) => held.some((option) => option.patch_size === size);
  if (!offered(state.size)) state.size = finest(index);
  if (state.other && (!offered(state.other) || state.other === state.size)) state.other = another();
  const choose = (which) => (size) => {
    const before = state[which];
    state[which] = size;
    if (state.size === state.other) state[which === "size" ? "other" : "size"] = before;
    run();
  };
  const common = { byImage: byImage(), measured };
  drawSizes($("sizes"), index, { ...common, chosen: state.size, onChange: choose("size") });
  $("sizes-other").hidden = !state.other;
  if (state.other) drawSizes($("sizes-other"), index, { ...common, chosen: state.other, onChange: choose("other") });
  $("compare").checked = Boolean(state.other);
  $("compare").disabled = held.length < 2;
  $("cost").textContent = explain(index, state.size, byImage(), measured);
  const grid = index.image_size / state.size;
  const { image, named } = state;
  $("chip").hidden = !image;
  show($("chip-image"), image?.url, grid);
  $("classify-image").hidden = !named;
  $("drop-prompt").hidden = Boolean(named);
  $("drop").classList.toggle("filled", Boolean(named));
  show($("classify-image"), named?.url, grid);
  $("text").placeholder = image ? "Add words: like this, but …" : "Describe an image, or drop one here";
  for (const view of ["search", "classify"]) {
    $(`view-${view}`).hidden = view !== state.view;
    $(`tab-${view}`).setAttribute("aria-selected", view === state.view);
    $(`tab-${view}`).tabIndex = view === state.view ? 0 : -1;
  }
}

function show(frame, url, grid) {
  const image = frame.querySelector("img");
  if (!url) image.removeAttribute("src");
  else if (image.src !== new URL(url, location).href) image.src = url;
  frame.style.setProperty("--n", grid);
}

export function stale() {
  const lists = $("results").querySelectorAll(".hits");
  if ($("results").querySelector(".try") || !lists.length) $("results").replaceChildren(blanks(12));
  else lists.forEach((old) => old.classList.add("stale"));
}

export function button(text, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", onClick);
  return made;
}

export function empty(text) {
  const made = document.createElement("p");
  made.className = "empty";
  made.textContent = text;
  $("results").replaceChildren(made);
}
