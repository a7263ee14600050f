// Keys, and images that are dropped or pasted.

import { walk } from "./hits.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);

// Between the views by arrow, to the words by /, down to the images, and among them.
export function listenToKeys(setView) {
  document.querySelector("nav").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    setView(state.view === "search" ? "classify" : "search");
    $(`tab-${state.view}`).focus();
  });
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    const writing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName);
    if (event.key === "/" && !writing && state.view === "search") { event.preventDefault(); $("text").focus(); }
    if (event.key === "ArrowDown" && document.activeElement === $("text")) {
      event.preventDefault();
      document.querySelector(".hit > a")?.focus();
      return;
    }
    walk(event);
  });
}

export function listenToDrops(take) {
  document.addEventListener("paste", (event) => take([...(event.clipboardData?.files ?? [])][0]));
  let depth = 0;
  const dragged = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragenter", (event) => { if (dragged(event)) { depth++; $("veil").hidden = false; } });
  document.addEventListener("dragleave", (event) => { if (dragged(event) && --depth <= 0) $("veil").hidden = true; });
  document.addEventListener("dragover", (event) => { if (dragged(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    if (!dragged(event)) return;
    event.preventDefault();
    depth = 0;
    $("veil").hidden = true;
    take(event.dataTransfer.files[0]);
  });
}
