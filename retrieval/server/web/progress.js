// How far an index is that is still growing.

import { get } from "./api.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);
const EVERY_MS = 3000;

let timer = 0;

export function drawProgress() {
  const { done, total } = state.index.indexing ?? {};
  const growing = total > 0 && done < total;
  $("growing").hidden = !growing;
  if (!growing) return false;
  const number = (count) => count.toLocaleString("en");
  $("growing-words").textContent = `${number(done)} of ${number(total)} photos indexed`;
  $("growing-bar").max = total;
  $("growing-bar").value = done;
  return true;
}

// Asks again while an index grows. onChange(): the index at hand holds more now.
export function watchProgress(indices, onChange) {
  clearTimeout(timer);
  if (!drawProgress()) return;
  timer = setTimeout(async () => {
    try {
      const found = await get("v1/indices");
      const before = state.index.generation;
      for (const index of found.indices) {
        const known = indices.find((one) => one.name === index.name);
        if (known) Object.assign(known, { indexing: undefined }, index);
      }
      if (state.index.generation !== before) onChange();
    } catch {
      // the next time, perhaps
    }
    watchProgress(indices, onChange);
  }, EVERY_MS);
}
