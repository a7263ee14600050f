// What the visitor looks for, and the address that says so.

import { imageURL } from "./api.js";
import { isShowable } from "./columns.js";
import { finest, regionSizes, sizeOf } from "./sizes.js";

export const state = {
  view: "search",
  index: null, // as /v1/indices describes it
  text: "",
  image: null, // {blob, url} of a file, or {hit, url} of the index; box: the part that is meant
  regions: false, // parts of the index's images are searched
  where: {}, // a filter as the API takes it: column -> comparisons
  distinct: true, // near-duplicates are left out
  open: "", // id of the image that is shown large
  named: null, // {blob, url}: the image of the playground
  size: 0, // as sizes.js has it
  other: 0, // 0: not compared
  measured: {}, // ms by size, of the image at hand
};

export const idOf = (hit) => hit.image.split("/").pop(); // 64 bits are too many for a number
export const nameOf = (hit) => hit.caption || hit.key.split("/").pop() || "untitled";
export const byImage = () => (state.view === "classify" ? true : Boolean(state.image?.blob));
export const asked = () => Boolean(state.text || state.image);
export const filtered = () => Object.keys(state.where).length > 0;
export const sizes = () => [...new Set([state.size, state.other].filter(Boolean).map(answering))];
export const imagePath = (id) => `/v1/images/${encodeURIComponent(state.index.name)}/${id}`;

// Whether the index's parts are searched as they are, at their own sizes.
export const byParts = () => state.regions && !byImage();

// The size that answers in the place of another.
export function answering(size) {
  const held = byParts() ? regionSizes(state.index) : [size];
  return held.includes(size) ? size : Math.min(...held);
}

// The next coarser size, or the next finer one where there is none.
export function another() {
  const known = state.index.patch_sizes
    .filter((option) => (option.in_index || byImage()) && sizeOf(option) !== state.size)
    .map((option) => sizeOf(option));
  const coarser = known.filter((size) => size > state.size);
  return coarser.length ? Math.min(...coarser) : known.length ? Math.max(...known) : 0;
}

export function forget() {
  if (state.image) URL.revokeObjectURL(state.image.url);
  state.image = null;
  state.measured = {};
}

export function setNamed(blob) {
  if (state.named) URL.revokeObjectURL(state.named.url);
  state.named = { blob, url: URL.createObjectURL(blob) };
  state.measured = {};
}

// ---- the address ----------------------------------------------------------------------------

let first = null; // the index that needs no name

// The address of what is looked for, with some of it replaced: {open: id}, {like: id}, ...
export function addressOf(changes = {}) {
  const words = new URLSearchParams();
  const set = (name, value) => {
    if (name in changes) value = changes[name];
    if (value) words.set(name, value);
  };
  set("view", state.view === "search" ? "" : state.view);
  set("index", state.index === first ? "" : state.index.name);
  set("q", state.text);
  set("like", state.image?.hit ? idOf(state.image.hit) : "");
  set("part", state.image?.hit && state.image.box ? state.image.box.join(",") : "");
  set("where", filtered() ? JSON.stringify(state.where) : "");
  set("alike", state.distinct ? "" : "all");
  set("regions", state.regions ? "yes" : "");
  set("patch", state.size === finest(state.index) || state.size < 0 ? "" : state.size);
  set("tokens", state.size === finest(state.index) || state.size > 0 ? "" : -state.size);
  set("beside", state.other);
  set("open", state.open);
  return `${location.pathname}${words.size ? "?" : ""}${words}`;
}

export function writeAddress() {
  const address = addressOf();
  if (address !== location.pathname + location.search) history.pushState(null, "", address);
}

export async function readAddress(indices) {
  const words = new URLSearchParams(location.search);
  first = indices[0];
  state.view = words.get("view") === "classify" ? "classify" : "search";
  state.index = indices.find((index) => index.name === words.get("index")) ?? first;
  state.text = words.get("q") ?? "";
  state.where = readWhere(words.get("where"));
  state.distinct = words.get("alike") !== "all";
  state.regions = words.get("regions") === "yes" && state.index.region_sizes.length > 0;
  state.open = readId(words.get("open"));
  const known = (size) => state.index.patch_sizes.some((option) => sizeOf(option) === size);
  const size = Number(words.get("patch")) || -Number(words.get("tokens"));
  state.size = known(size) ? size : finest(state.index);
  state.other = known(Number(words.get("beside"))) ? Number(words.get("beside")) : 0;
  const like = readId(words.get("like"));
  const keep = !like && state.image?.blob; // a file has no address
  if (!keep) forget();
  if (like) {
    const image = imagePath(like);
    state.image = { hit: { image }, url: await imageURL(`${image}?size=96`), box: readBox(words.get("part")) };
  }
}

function readBox(text) {
  const box = (text ?? "").split(",").map(Number);
  const [left, top, right, bottom] = box;
  return box.length === 4 && left >= 0 && left < right && right <= 1 && top >= 0 && top < bottom && bottom <= 1 ? box : null;
}

const readId = (text) => (/^\d+$/.test(text ?? "") ? text : "");

function readWhere(text) {
  try {
    const where = JSON.parse(text ?? "{}");
    const { columns } = state.index;
    const known = ([name, tests]) => Object.hasOwn(columns, name) && isShowable(name, columns[name], tests);
    return Object.fromEntries(Object.entries(where ?? {}).filter(known));
  } catch {
    return {};
  }
}
