// The patch-size control: what each size costs here, and which one is chosen.

export const format = (ms) =>
  ms >= 9950 ? `${Math.round(ms / 1000)} s` : ms >= 995 ? `${(ms / 1000).toFixed(1)} s` : ms >= 9.95 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;

// A size is one number, finer where it is smaller: a patch size, or minus so many tokens at most.
// of: "", or what stands before the names, such as "query_".
export const sizeOf = (answer, of = "") => answer[`${of}patch_size`] ?? -(answer[`${of}max_tokens`] ?? 0);
export const named = (size) => (size < 0 ? `At most ${-size} patches` : `Patch ${size}`);
export const asFields = (size) => (size < 0 ? { max_tokens: -size } : { patch_size: size });
export const byTokens = (index) => index.patch_sizes.some((option) => option.max_tokens !== null);
const tokensAt = (index, size) => (size < 0 ? -size : (index.image_size / size) ** 2);
// At which parts of the index's images are indexed.
export const regionSizes = (index) => index.region_sizes.map((size) => (byTokens(index) ? -size : size));
export const sideAt = (index, size) => (size < 0 ? Math.floor(Math.sqrt(-size)) : index.image_size / size);

// options: those offered, [{patch_size, max_tokens, in_index, gflops, ms}]. byImage: a file is encoded; else the
// cost is that of indexing 1,000 images. measured: ms by size, of the image at hand.
export function drawSizes(fieldset, index, { options, chosen, byImage, measured, onChange }) {
  const box = fieldset.querySelector(".options");
  const [title, about] = fieldset.querySelectorAll("legend > *");
  if (!fieldset.classList.contains("second")) title.textContent = byTokens(index) ? "Patches at most" : "Patch size";
  about.textContent = byImage ? "time to read the image" : "time to index 1,000 images";
  const had = box.contains(document.activeElement);
  box.replaceChildren();
  for (const option of options) {
    const label = document.createElement("label");
    const size = sizeOf(option);
    const input = document.createElement("input");
    input.type = "radio";
    input.name = fieldset.id;
    input.value = size;
    input.checked = size === chosen;
    input.addEventListener("change", () => onChange(size));
    const cells = document.createElement("span");
    cells.className = "cells";
    cells.style.setProperty("--n", Math.min(10, sideAt(index, size)));
    const name = document.createElement("b");
    name.textContent = Math.abs(size);
    const time = document.createElement("small");
    const one = measured[size] ?? option.ms;
    time.textContent = format(byImage ? one : 1000 * option.ms);
    label.title = byImage
      ? `${option.gflops} GFLOPs to encode the image`
      : `${format(1000 * option.ms)} to index 1,000 images`;
    label.append(input, cells, name, time);
    box.append(label);
    if (had && input.checked) input.focus();
  }
}

export function explain(index, size, byImage, measured) {
  const option = index.patch_sizes.find((other) => sizeOf(other) === size);
  const tokens = `${tokensAt(index, size).toLocaleString("en")} patches`;
  if (!option) return size < 0 && measured[size] !== undefined ? `${tokens} at most, read in ${format(measured[size])}.` : "";
  const pieces = `${tokens}${size < 0 ? " at most" : ""}, ${option.gflops.toPrecision(3)} GFLOPs`;
  if (!byImage) return `${pieces} an image. Indexing 1,000: ${format(1000 * option.ms)}.`;
  if (measured[size] !== undefined) return `${pieces}, read in ${format(measured[size])}.`;
  return `${pieces}, about ${format(option.ms)}.`;
}

// The size to begin with: the finest of the index.
export function finest(index) {
  return Math.min(...index.patch_sizes.filter((option) => option.in_index).map((option) => sizeOf(option)));
}
