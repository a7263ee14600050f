// Draws images that were found, and lets the arrow keys walk among them.

import { imageURL } from "./api.js";

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// hits: as /v1/search gives them. best: similarity of a full meter, null draws none.
// elsewhere: ids of the other list, null without one. onPick(hit): an image was chosen.
export function drawHits(list, hits, { best = null, elsewhere = null, onPick }) {
  for (const hit of hits) {
    const item = element("li");
    const button = element("button", "hit");
    button.type = "button";
    button.dataset.id = hit.image;
    const caption = hit.caption || hit.key;
    const frame = element("span", "frame");
    const image = element("img");
    image.alt = caption;
    image.loading = "lazy";
    image.decoding = "async";
    const lost = () => frame.replaceChildren(element("span", "lost", "no image"));
    image.addEventListener("error", lost);
    imageURL(`${hit.image}?size=320`).then((url) => (image.src = url), lost);
    frame.append(image);
    button.append(frame, element("span", "caption", caption));
    if (best !== null) {
      const score = element("span", "score");
      const meter = element("span", "meter");
      const part = element("i");
      part.style.setProperty("--part", Math.max(0, Math.min(1, hit.similarity / best)));
      meter.append(part);
      score.append(meter, element("span", "", hit.similarity.toFixed(3)));
      if (elsewhere && !elsewhere.has(hit.image)) {
        const only = element("span", "only", "●");
        only.title = "only in this list";
        score.append(only);
      }
      button.append(score);
    }
    button.title = `${caption} – search with this image`;
    button.addEventListener("click", () => onPick(hit));
    for (const event of ["mouseenter", "focus", "mouseleave", "blur"]) {
      button.addEventListener(event, () => showTwins(hit.image, event === "mouseenter" || event === "focus"));
    }
    item.append(button);
    list.append(item);
  }
}

function showTwins(id, shown) {
  for (const other of document.querySelectorAll(".columns .hit")) {
    other.classList.toggle("twin", shown && other.dataset.id === id);
  }
}

export function blanks(count) {
  const list = element("ol", "hits");
  for (let n = 0; n < count; n++) {
    const item = element("li");
    const card = element("div", "hit blank");
    card.append(element("span", "frame"), element("span", "caption", "\u00a0"));
    item.append(card);
    list.append(item);
  }
  return list;
}

// Arrow keys: left and right by one, up and down by a row.
export function walk(event) {
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 0, ArrowDown: 0 };
  const here = document.activeElement;
  if (!(event.key in steps) || !here?.classList.contains("hit")) return;
  const cards = [...here.closest(".hits").querySelectorAll("button.hit")];
  const top = cards[0].getBoundingClientRect().top;
  const columns = cards.filter((card) => card.getBoundingClientRect().top === top).length;
  const step = steps[event.key] || (event.key === "ArrowUp" ? -columns : columns);
  const next = cards[cards.indexOf(here) + step];
  event.preventDefault();
  if (next) next.focus();
  else if (event.key === "ArrowUp") document.getElementById("text").focus();
}
