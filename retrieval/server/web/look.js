// Draws what is around the images: the controls, the words under the box, the sizes' costs.

import { asWords, isMarked, parseWords } from "./query.js";
import { drawSizes, explain, finest, named as nameOfSize, regionSizes, sideAt, sizeOf } from "./sizes.js";
import { another, answering, byImage, byParts, state } from "./state.js";

const $ = (id) => document.getElementById(id);

export function drawControls(run) {
  const { index, measured } = state;
  const held = index.patch_sizes.filter((option) => option.in_index || byImage());
  const free = byImage() && index.budgets; // a file is read within any
  const offered = (size) => (free && size < 0) || held.some((option) => sizeOf(option) === size);
  if (!offered(state.size)) state.size = finest(index);
  if (state.other && (!offered(state.other) || state.other === state.size)) state.other = another();
  const choose = (which) => (size) => {
    const before = state[which];
    state[which] = size;
    if (state.size === state.other) state[which === "size" ? "other" : "size"] = before;
    run();
  };
  const options = byParts() ? held.filter((option) => regionSizes(index).includes(sizeOf(option))) : held;
  const two = Boolean(state.other) && options.length > 1;
  const common = { options, byImage: byImage(), measured };
  drawSizes($("sizes"), index, { ...common, chosen: answering(state.size), onChange: choose("size") });
  $("sizes-other").hidden = !two;
  if (two) drawSizes($("sizes-other"), index, { ...common, chosen: answering(state.other), onChange: choose("other") });
  $("compare").checked = two;
  $("compare").disabled = options.length < 2;
  $("cost").textContent = byParts() ? `Indexed parts: ${options.map((option) => nameOfSize(sizeOf(option)).toLowerCase()).join(", ")}.` : explain(index, state.size, byImage(), measured);
  const grid = sideAt(index, state.size);
  $("tokens-of").hidden = !free;
  $("tokens").value = held.some((option) => sizeOf(option) === state.size) ? "" : -state.size;
  const { image, named } = state;
  $("regions").hidden = !index.region_sizes.length;
  $("regions").setAttribute("aria-pressed", state.regions);
  $("chip-image").classList.toggle("part", Boolean(image?.box));
  $("chip").hidden = !image;
  show($("chip-image"), image?.url, grid);
  $("classify-image").hidden = !named;
  $("drop-prompt").hidden = Boolean(named);
  $("drop").classList.toggle("filled", Boolean(named));
  show($("classify-image"), named?.url, grid);
  $("text").placeholder = image ? "Add words: like this, but …" : "Describe an image, or drop one here";
  drawHint();
  for (const view of ["search", "classify"]) {
    $(`view-${view}`).hidden = view !== state.view;
    $(`tab-${view}`).setAttribute("aria-selected", view === state.view);
    $(`tab-${view}`).tabIndex = view === state.view ? 0 : -1;
  }
  document.body.classList.toggle("naming", state.view === "classify");
}

// What a minus and quotes do, or have done.
function drawHint() {
  const { wanted, unwanted } = parseWords(state.text);
  const quoted = (text) => `“${text}”`;
  const said = [];
  if (unwanted.length) said.push(`Looking for ${wanted ? quoted(wanted) : "anything"}${state.image ? " like the image" : ""}, away from ${unwanted.map(quoted).join(" and ")}.`);
  if (asWords(state.text)) said.push("Captions, names and other texts are searched for these words.");
  if (state.regions && isMarked(state.text)) said.push("Parts are found by what they show: quotes look for no words here.");
  if (state.image?.box) said.push("Searching with a part of your image.");
  if (!said.length) said.push(`A minus leaves something out: cat - fence${state.index.words && !state.regions ? '; quotes look for words: "red bike"' : ""}`);
  $("hint").textContent = said.join(" ");
}

function show(frame, url, grid) {
  const image = frame.querySelector("img");
  if (!url) image.removeAttribute("src");
  else if (image.src !== new URL(url, location).href) image.src = url;
  frame.style.setProperty("--n", grid);
  frame.dataset.fit = state.index.fit;
}

export function button(text, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", onClick);
  return made;
}

// ---- patch sizes, costs and similarities: for those who ask, who are remembered -------------

function setDetails(on) {
  document.body.classList.toggle("details", on);
  $("details").setAttribute("aria-pressed", on);
}

export function listenToDetails() {
  setDetails(localStorage.getItem("details") === "yes" || state.other !== 0 || state.size !== finest(state.index));
  $("details").addEventListener("click", () => {
    const on = $("details").getAttribute("aria-pressed") !== "true";
    localStorage.setItem("details", on ? "yes" : "no");
    setDetails(on);
  });
}
