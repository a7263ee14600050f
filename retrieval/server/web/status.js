// The line above the images: what they are the best of, what is not shown, how long it took.

import { element } from "./hits.js";
import { format } from "./sizes.js";
import { filtered, state } from "./state.js";

const $ = (id) => document.getElementById(id);

// How many were left out on the pages so far, and the way to them.
export function countAlike(made, answers) {
  const count = Math.max(...answers.map((answer) => answer.near_duplicates));
  made.textContent = `Show ${count.toLocaleString("en")} near-duplicate${count === 1 ? "" : "s"}`;
  made.hidden = !count;
}

export function say({ ms, warning }, nothing, alike) {
  const names = { text: "words", image: "image", search: "search" };
  const steps = Object.keys(names).filter((step) => ms[step] > 0).map((step) => `${names[step]} ${format(ms[step])}`);
  const times = element("span", "detail", `${format(ms.total)}: ${steps.join(", ")}`);
  const best = filtered() ? "within the filter" : `of ${counted()}`;
  const missing = element("span", "missing", state.regions && warning ? `${warning}.` : "");
  $("status").replaceChildren(nothing ? `Nothing like this here. The nearest ${best}:` : `Best ${best}`, alike, missing, times);
}

export const counted = () => `${state.index.count.toLocaleString("en")} images`;
