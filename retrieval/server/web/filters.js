// Which images are looked at: by their columns, and without near-duplicates.

import { asksDays, dayOf, dayValue, labelOf } from "./columns.js";
import { element } from "./hits.js";
import { button } from "./look.js";
import { columns } from "./query.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);
const TYPING_MS = 350;

let drawn = ""; // the index whose fields are there
let change = () => {}; // what happens after a change

// ---- chips ----------------------------------------------------------------------------------

// What is asked of each column, a chip each, that a click removes.
export function drawFilters() {
  const chips = Object.entries(state.where).map(([name, tests]) => {
    const item = element("li");
    const chip = button(`${labelOf(name)}: ${inWords(name, tests)}`, () => set(name, null));
    chip.setAttribute("aria-label", `Remove the filter ${chip.textContent}`);
    item.append(chip);
    return item;
  });
  $("filter-chips").replaceChildren(...chips);
  $("distinct").checked = state.distinct;
  const count = chips.length;
  $("filter").textContent = count ? `Filter · ${count}` : "Filter";
  $("filter-clear").hidden = !count;
  if (!$("filters").hidden) drawFields();
}

function inWords(name, tests) {
  const type = state.index.columns[name];
  if (tests.in) return tests.in.join(" or ");
  if (tests.contains) return `“${tests.contains}”`;
  const isDay = asksDays(name, type);
  const read = (value, plus) => (isDay ? dayOf(value, type, plus) : value ?? "");
  const [from, to] = isDay ? [read(tests[">="], 0), read(tests["<"], -1)] : [read(tests[">="]), read(tests["<="])];
  return from !== "" && to !== "" ? `${from} to ${to}` : from !== "" ? `from ${from}` : `to ${to}`;
}

function set(name, tests) {
  const { [name]: _, ...others } = state.where;
  state.where = tests ? { ...others, [name]: tests } : others;
  change();
}

// ---- fields ---------------------------------------------------------------------------------

// A field per column; those that are there are kept, as the visitor may be in one of them.
async function drawFields() {
  const { index } = state;
  const which = `${index.name} ${index.generation}`;
  if (drawn !== which) {
    drawn = which;
    $("filter-fields").replaceChildren(element("p", "quiet", "Looking at the columns …"));
    let found;
    try {
      found = (await columns()).columns;
    } catch (error) {
      drawn = "";
      $("filter-fields").replaceChildren(element("p", "quiet", error.message));
      return;
    }
    if (drawn !== which) return;
    $("filter-fields").replaceChildren(...found.map(field));
    if (!found.length) $("filter-fields").append(element("p", "quiet", "This index has no columns to filter by."));
  }
  for (const made of $("filter-fields").querySelectorAll("fieldset")) made.update?.();
}

function field(column) {
  const made = element("fieldset", `field by-${column.kind}`);
  made.append(element("legend", "", labelOf(column.name)));
  ({ choice: choices, text: words, number: range, date: range })[column.kind](made, column);
  return made;
}

function choices(made, { name, values }) {
  const box = element("div", "values");
  const inputs = values.map(({ value, count }) => {
    const label = element("label");
    const input = element("input");
    input.type = "checkbox";
    input.addEventListener("change", () => {
      const wanted = values.filter((_, n) => inputs[n].checked).map((one) => one.value);
      set(name, wanted.length ? { in: wanted } : null);
    });
    label.append(input, element("span", "", value === "" ? "none" : String(value)), element("small", "", count.toLocaleString("en")));
    box.append(label);
    return input;
  });
  made.append(box);
  made.update = () => {
    const wanted = state.where[name]?.in ?? [];
    inputs.forEach((input, n) => { input.checked = wanted.includes(values[n].value); });
  };
}

function words(made, { name }) {
  const input = element("input");
  input.type = "search";
  input.placeholder = "contains";
  input.autocomplete = "off";
  input.setAttribute("aria-label", `${labelOf(name)} contains`);
  let typing = 0;
  input.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => set(name, input.value.trim() ? { contains: input.value.trim() } : null), TYPING_MS);
  });
  made.append(input);
  made.update = () => { if (document.activeElement !== input) input.value = state.where[name]?.contains ?? ""; };
}

function range(made, { name, type, kind, least, greatest }) {
  const isDate = kind === "date";
  const inputs = ["from", "to"].map((end) => {
    const input = element("input");
    input.type = kind;
    input.setAttribute("aria-label", `${labelOf(name)} ${end}`);
    if (isDate && !/^int/.test(type)) [input.min, input.max] = [least.slice(0, 10), greatest.slice(0, 10)]; // an integer's are days of UTC
    if (!isDate) [input.placeholder, input.step] = [end === "from" ? least : greatest, "any"];
    input.addEventListener("change", () => set(name, tests()));
    return input;
  });
  const tests = () => {
    const [from, to] = inputs.map((input) => input.value);
    if (!from && !to) return null;
    if (isDate) {
      return { ...(from && { ">=": dayValue(from, type) }), ...(to && { "<": dayValue(to, type, 1) }) };
    }
    return { ...(from && { ">=": Number(from) }), ...(to && { "<=": Number(to) }) };
  };
  const row = element("div", "range");
  row.append(inputs[0], element("span", "quiet", "to"), inputs[1]);
  made.append(row);
  made.update = () => {
    const asked = state.where[name] ?? {};
    const values = isDate
      ? [dayOf(asked[">="], type), dayOf(asked["<"], type, -1)]
      : [asked[">="] ?? "", asked["<="] ?? ""];
    inputs.forEach((input, n) => { if (document.activeElement !== input) input.value = values[n]; });
  };
}

// ---- what the visitor does ------------------------------------------------------------------

function open(on) {
  $("filters").hidden = !on;
  $("filter").setAttribute("aria-expanded", on);
  if (on) drawFields();
}

export function listenToFilters(onChange) {
  change = onChange;
  $("filter").addEventListener("click", () => open($("filters").hidden));
  $("filters").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    open(false);
    $("filter").focus();
  });
  $("filter-clear").addEventListener("click", () => { state.where = {}; $("filter").focus(); change(); });
  $("distinct").addEventListener("change", (event) => { state.distinct = event.target.checked; change(); });
  $("regions").addEventListener("click", () => { state.regions = !state.regions; change(); });
}
