// How far an index is that is still growing.

import { get } from "./api.js";
import { finest, sizeOf } from "./sizes.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);
const EVERY_MS = 3000; // while an index grows
const RESTING_MS = 10000; // while none does: a folder that is watched may have new photos

let timer = 0;

export function drawProgress() {
  const { indexing } = state.index;
  $("growing").hidden = !indexing;
  if (!indexing) return;
  $("growing-bar").hidden = Boolean(indexing.problem);
  $("growing-words").textContent = indexing.problem || inWords(indexing);
  $("growing-bar").max = indexing.total || 1;
  $("growing-bar").value = indexing.done;
}

function inWords(indexing) {
  const { done, total, seconds_left: left } = indexing;
  const size = sizeOf(indexing);
  if (!total) return "Indexing begins …";
  const number = (count) => count.toLocaleString("en");
  const finer = size && !state.index.patch_sizes.some((option) => sizeOf(option) === size && option.in_index);
  const what = finer && state.index.count ? "looked at more closely" : "indexed";
  return `${number(done)} of ${number(total)} photos ${what}${left > 0 ? `, ${time(left)} left` : ""}`;
}

const time = (seconds) =>
  seconds < 90 ? `${Math.ceil(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;

// Of an index that grows, what changes more than the bar.
const news = ({ generation, indexing }) => `${generation} ${indexing?.problem ?? !indexing}`;

// Asks again, for ever. onChange(before): the index at hand holds more now, begins to grow or will
// not grow any more; before: its finest patch size until now.
export function watchProgress(indices, onChange) {
  clearTimeout(timer);
  drawProgress();
  timer = setTimeout(async () => {
    try {
      if (document.hidden) return;
      const found = await get("v1/indices");
      const before = { news: news(state.index), finest: finest(state.index) };
      for (const index of found.indices) {
        const known = indices.find((one) => one.name === index.name);
        if (known) Object.assign(known, { indexing: undefined }, index);
      }
      if (news(state.index) !== before.news) onChange(before.finest);
    } catch {
      // the next time, perhaps
    } finally {
      watchProgress(indices, onChange);
    }
  }, state.index.indexing ? EVERY_MS : RESTING_MS);
}
