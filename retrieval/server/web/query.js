// From what the visitor looks for to the bodies of requests.

import { get, post, toBase64 } from "./api.js";
import { asFields, regionSizes, sizeOf } from "./sizes.js";
import { filtered, idOf, state } from "./state.js";

export const PAGE = 24; // images of one page
const LESS = -0.5; // weight of what is left out
const WORDS = 0.5; // of words beside vectors
const QUOTES = /[“”„‟«»「」『』]/g;

// "cat - fence": what to look for, and what to stay away from. A minus within a word is none, nor
// is one within quotes.
export function parseWords(text) {
  const parts = ` ${text} `.split(/\s[-\u2212]+\s*(?=(?:[^"]*"[^"]*")*[^"]*$)/).map((part) => part.trim());
  return { wanted: parts[0], unwanted: parts.slice(1).filter(Boolean) };
}

// Whether words are looked for as they stand in captions and names: some are in quotes, or end in an
// asterisk. As `marked` in retrieval/words/asked.py.
export const asWords = (text) => state.index.words && !state.regions && isMarked(text);

export function isMarked(text) {
  const plain = text.replace(QUOTES, '"');
  return /"[^"]*[\p{L}\p{N}_][^"]*"|[\p{L}\p{N}_]\*(?![\p{L}\p{N}_])/u.test(plain);
}

// As the model reads it: without the marks that are for words.
export const unmarked = (text) => (isMarked(text) ? text.replace(QUOTES, "").replace(/["*]/g, "").trim() : text);

async function terms() {
  const { wanted, unwanted } = parseWords(state.text);
  const read = (text) => (state.regions ? unmarked(text) : text);
  const found = [];
  const part = state.image?.box ? { box: state.image.box } : {};
  if (state.image?.blob) found.push({ image: await toBase64(state.image.blob), ...part });
  else if (state.image) found.push({ id: idOf(state.image.hit), ...part });
  if (wanted) found.push({ text: read(wanted) });
  return [...found, ...unwanted.map((text) => ({ text: read(text), weight: LESS }))];
}

// Whether what is searched has vectors at a size.
function isHeld(size) {
  if (state.regions) return regionSizes(state.index).includes(size);
  return state.index.patch_sizes.find((option) => sizeOf(option) === size)?.in_index;
}

async function body(size, offset) {
  const asked = { index: state.index.name, k: PAGE, offset, deduplicate: state.distinct };
  if (filtered()) asked.where = state.where;
  if (state.regions) asked.regions = true; // which similarities of whole images do not measure
  else asked.background = true;
  if (asWords(state.text)) asked.words = WORDS;
  if (size < 0) {
    asked.max_tokens = -size;
  } else if (state.image?.blob) {
    asked.query_patch_size = size;
    if (isHeld(size)) asked.index_patch_size = size;
  } else if (isHeld(size)) {
    asked.index_patch_size = size;
  }
  const parts = await terms();
  return parts.length === 1 && !parts[0].weight ? { ...asked, ...parts[0] } : { ...asked, mix: parts };
}

// One answer per patch size.
export async function search(sizes, offset, signal) {
  const bodies = await Promise.all(sizes.map((size) => body(size, offset)));
  return Promise.all(bodies.map((one) => post("v1/search", one, signal)));
}

const ofIndex = (what) => `v1/indices/${encodeURIComponent(state.index.name)}/${what}`;

// What the filter alone lets through.
export async function browse(offset, signal) {
  const where = encodeURIComponent(JSON.stringify(state.where));
  return [await get(`${ofIndex("images")}?where=${where}&k=${PAGE}&offset=${offset}`, signal)];
}

export const sample = (signal) => get(`${ofIndex("sample")}?n=${PAGE}`, signal);
export const columns = () => get(ofIndex("columns"));

// ---- the meter ------------------------------------------------------------------------------

const scales = new Map();

function scaleAt(size) {
  const path = `${ofIndex("scale")}?${new URLSearchParams(asFields(size))}`;
  const key = `${path} ${state.index.generation}`;
  if (!scales.has(key)) {
    const found = get(path);
    found.catch(() => scales.delete(key));
    scales.set(key, found);
  }
  return scales.get(key);
}

// A promise of similarity -> 0 to 1; of null where nothing can be said. Words: from the best hits
// of nonsense to those of ordinary words. An image: from images at random to the image itself.
export async function meterOf(answer) {
  const { wanted, unwanted } = parseWords(state.text);
  const image = state.image ? 1 : 0;
  const words = (wanted ? 1 : 0) - LESS * unwanted.length;
  const { background } = answer;
  const scale = words ? await scaleAt(sizeOf(answer)) : { words: 0, luck: 0 };
  if (background === null || scale.words === null) return null;
  const none = (words * scale.luck) / (image + words);
  const full = (image * (1 - background) + words * scale.words) / (image + words);
  if (full <= none) return null;
  return (similarity) => Math.max(0, Math.min(1, (similarity - background - none) / (full - none)));
}
