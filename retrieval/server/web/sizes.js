// The patch-size control: what each size costs here, and which one is chosen.

export const format = (ms) =>
  ms >= 9950 ? `${Math.round(ms / 1000)} s` : ms >= 995 ? `${(ms / 1000).toFixed(1)} s` : ms >= 9.95 ? `${Math.round(ms)} ms` : `${ms.toFixed(1)} ms`;

// options: [{patch_size, in_index, gflops, ms}]. byImage: a file is encoded; else the cost is that
// of indexing 1,000 images. measured: {patch_size: ms} of the image at hand.
export function drawSizes(fieldset, index, { chosen, byImage, measured, onChange }) {
  const box = fieldset.querySelector(".options");
  fieldset.querySelector("legend small").textContent = byImage ? "time to read the image" : "time to index 1,000 images";
  const had = box.contains(document.activeElement);
  box.replaceChildren();
  for (const option of index.patch_sizes.filter((one) => byImage || one.in_index)) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    input.type = "radio";
    input.name = fieldset.id;
    input.value = option.patch_size;
    input.checked = option.patch_size === chosen;
    input.addEventListener("change", () => onChange(option.patch_size));
    const cells = document.createElement("span");
    cells.className = "cells";
    cells.style.setProperty("--n", Math.min(10, index.image_size / option.patch_size));
    const name = document.createElement("b");
    name.textContent = option.patch_size;
    const time = document.createElement("small");
    const one = measured[option.patch_size] ?? option.ms;
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
  const option = index.patch_sizes.find((other) => other.patch_size === size);
  if (!option) return "";
  const tokens = (index.image_size / size) ** 2;
  const pieces = `${tokens.toLocaleString("en")} patches, ${option.gflops.toPrecision(3)} GFLOPs`;
  if (!byImage) return `${pieces} an image. Indexing 1,000: ${format(1000 * option.ms)}.`;
  if (measured[size] !== undefined) return `${pieces}, read in ${format(measured[size])}.`;
  return `${pieces}, about ${format(option.ms)}.`;
}

// The size to begin with: the finest of the index.
export function finest(index) {
  return Math.min(...index.patch_sizes.filter((option) => option.in_index).map((option) => option.patch_size));
}
