// How far an index is that is still growing.

import { get } from "./api.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);
const EVERY_MS = 3000;

let timer = 0;

export function drawProgress() {
  const { done, total, patch_size: size, seconds_left: left } = state.index.indexing ?? {};
  const growing = total > 0 && done < total;
  $("growing").hidden = !growing;
  if (!growing) return false;
  const number = (count) => count.toLocaleString("en");
  const finer = size && !state.index.patch_sizes.some((option) => option.patch_size === size && option.in_index);
  const what = finer && state.index.count ? "looked at more closely" : "indexed";
  $("growing-words").textContent = `${number(done)} of ${number(total)} photos ${what}${left > 0 ? `, ${time(left)} left` : ""}`;
  $("growing-bar").max = total;
  $("growing-bar").value = done;
  return true;
}

const time = (seconds) =>
  seconds < 90 ? `${Math.ceil(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;

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
