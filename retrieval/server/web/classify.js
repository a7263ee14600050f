// Zero-shot playground: an image and labels, bars.

import { post, toBase64 } from "./api.js";
import { asFields } from "./sizes.js";

const $ = (id) => document.getElementById(id);

export function parseLabels(text) {
  const labels = text.split(/[\n,]/).map((label) => label.trim()).filter(Boolean);
  return [...new Set(labels)];
}

// One answer per patch size, the first one's order. Returns null when there is nothing to ask.
export async function classify(index, blob, sizes, signal) {
  const labels = parseLabels($("labels").value);
  const set = $("set").value;
  if (!blob || (!labels.length && !set)) return null;
  const image = await toBase64(blob);
  const what = set ? { class_set: set } : { labels };
  const asked = sizes.map((size) =>
    post("v1/classify", { index, image, ...asFields(size), k: set ? 12 : 200, ...what }, signal));
  return Promise.all(asked);
}

export function drawBars(answers) {
  const [first, other] = answers;
  const rows = first.labels.slice(0, 24).map(({ label, similarity, share }) => {
    const item = document.createElement("li");
    const name = document.createElement("span");
    name.className = "name";
    name.textContent = label;
    const number = document.createElement("span");
    number.className = "number";
    number.textContent = share === null ? similarity.toFixed(2) : `${Math.round(100 * share)}%`;
    number.title = `cosine ${similarity.toFixed(3)}`;
    item.append(name, meter(share ?? similarity), number);
    const twin = other?.labels.find((entry) => entry.label === label);
    if (twin) {
      const second = meter(twin.share ?? twin.similarity, "other");
      const value = number.cloneNode();
      value.textContent = twin.share === null ? twin.similarity.toFixed(2) : `${Math.round(100 * twin.share)}%`;
      item.append(second, value);
    }
    return item;
  });
  $("bars").replaceChildren(...rows);
}

function meter(part, extra = "") {
  const made = document.createElement("span");
  made.className = `meter ${extra}`;
  const filled = document.createElement("i");
  made.append(filled);
  requestAnimationFrame(() => filled.style.setProperty("--part", Math.max(0, Math.min(1, part))));
  return made;
}
