// What the visitor looks for, and the address that says so.

import { imageURL } from "./api.js";
import { finest } from "./sizes.js";

export const state = {
  view: "search",
  index: null, // as /v1/indices describes it
  text: "",
  image: null, // {blob, url} of a file, or {hit, url} of the index
  named: null, // {blob, url}: the image of the playground
  size: 0,
  other: 0, // 0: not compared
  measured: {}, // ms by patch size, of the image at hand
};

export const byImage = () => (state.view === "classify" ? true : Boolean(state.image?.blob));
export const asked = () => Boolean(state.text || state.image);
export const sizes = () => (state.other ? [state.size, state.other] : [state.size]);

// The next coarser size, or the next finer one where there is none.
export function another() {
  const known = state.index.patch_sizes
    .filter((option) => (option.in_index || byImage()) && option.patch_size !== state.size)
    .map((option) => option.patch_size);
  const coarser = known.filter((size) => size > state.size);
  return coarser.length ? Math.min(...coarser) : Math.max(0, ...known);
}

export function forget() {
  if (state.image?.blob) URL.revokeObjectURL(state.image.url);
  state.image = null;
  state.measured = {};
}

export function setNamed(blob) {
  if (state.named) URL.revokeObjectURL(state.named.url);
  state.named = { blob, url: URL.createObjectURL(blob) };
  state.measured = {};
}

export function writeAddress(first) {
  const words = new URLSearchParams();
  if (state.view !== "search") words.set("view", state.view);
  if (state.index !== first) words.set("index", state.index.name);
  if (state.text) words.set("q", state.text);
  if (state.image?.hit) words.set("like", state.image.hit.image.split("/").pop());
  if (state.size !== finest(state.index)) words.set("patch", state.size);
  if (state.other) words.set("beside", state.other);
  const address = `${location.pathname}${words.size ? "?" : ""}${words}`;
  if (address !== location.pathname + location.search) history.pushState(null, "", address);
}

export async function readAddress(indices) {
  const words = new URLSearchParams(location.search);
  state.view = words.get("view") === "classify" ? "classify" : "search";
  state.index = indices.find((index) => index.name === words.get("index")) ?? indices[0];
  state.text = words.get("q") ?? "";
  const known = (size) => state.index.patch_sizes.some((option) => option.patch_size === size);
  const size = Number(words.get("patch"));
  state.size = known(size) ? size : finest(state.index);
  state.other = known(Number(words.get("beside"))) ? Number(words.get("beside")) : 0;
  forget();
  const like = words.get("like");
  if (like && /^\d+$/.test(like)) {
    const image = `/v1/images/${encodeURIComponent(state.index.name)}/${like}`;
    state.image = { hit: { image }, url: await imageURL(`${image}?size=96`) };
  }
}
