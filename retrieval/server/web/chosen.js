// Several images, chosen to be downloaded together.

import { followWithToken } from "./api.js";
import { idOf, state } from "./state.js";

const $ = (id) => document.getElementById(id);

let chosen = new Map(); // id -> hit
let most = 0; // images that the server puts into one ZIP

export const isChosen = (hit) => chosen.has(idOf(hit));

export function toggle(hit) {
  if (!chosen.delete(idOf(hit)) && chosen.size < most) chosen.set(idOf(hit), hit);
  draw();
}

export function choose(on) {
  document.body.classList.toggle("choosing", on);
  if (!on) chosen = new Map();
  draw();
}

// Downloads are of one index.
export function forgetChosen() {
  choose(false);
}

function draw() {
  const choosing = document.body.classList.contains("choosing") || chosen.size > 0;
  document.body.classList.toggle("choosing", choosing);
  $("choose").setAttribute("aria-pressed", choosing);
  $("chosen").hidden = !choosing;
  const full = chosen.size === most ? ", which is the most" : "";
  $("chosen-count").textContent = chosen.size ? `${chosen.size} chosen${full}` : "Choose images";
  $("chosen-download").hidden = !chosen.size;
  if (chosen.size) {
    const ids = [...chosen.keys()];
    const index = encodeURIComponent(state.index.name);
    $("chosen-download").href = ids.length === 1
      ? `${chosen.get(ids[0]).image}/file?download=true`
      : `/v1/indices/${index}/zip?ids=${ids.join(",")}`;
    $("chosen-download").download = ids.length === 1 ? "" : `${state.index.name}.zip`;
  }
  for (const item of document.querySelectorAll(".hit:not(.blank)")) {
    const is = chosen.has(item.dataset.id);
    item.classList.toggle("chosen", is);
    item.querySelector(".choice").checked = is;
  }
}

export function listenToChoice(limits) {
  most = limits.max_chosen;
  followWithToken($("chosen-download"));
  $("choose").addEventListener("click", () => choose($("choose").getAttribute("aria-pressed") !== "true"));
  $("chosen-clear").addEventListener("click", () => { choose(false); $("choose").focus(); });
}
