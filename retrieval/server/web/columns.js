// How the columns of an index are called, and how their values read.

const NAMES = { key: "Path", file: "File name", modified: "File changed" };
const HIDDEN = new Set(["caption_modified"]);

export function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return NAMES[name] ?? words[0].toUpperCase() + words.slice(1);
}

const isDay = (text) => /^\d{4}-\d\d-\d\d(T|$)/.test(text);

// A value as a text, "" for one that says nothing.
export function describe(name, value) {
  if (value === null || value === undefined || value === "" || HIDDEN.has(name)) return "";
  if (name === "modified") return moment(new Date(value / 1e6), true);
  if (typeof value === "string" && isDay(value)) return moment(new Date(value.length > 10 ? value : `${value}T00:00`), value.length > 10);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return value.toLocaleString("en", { maximumFractionDigits: 6 });
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function moment(date, clock) {
  if (Number.isNaN(date.getTime())) return "";
  const day = { day: "numeric", month: "long", year: "numeric" };
  return date.toLocaleString("en-GB", clock ? { ...day, hour: "2-digit", minute: "2-digit" } : day);
}

const isNumber = (type) => /^(u?int|float|double|halffloat)/.test(type);

// Whether a column is asked by days.
export const asksDays = (name, type) => name === "modified" || !isNumber(type);

// Whether what is asked of a column is something that its field on the page can show.
export function isShowable(name, type, tests) {
  if (typeof tests !== "object" || !tests) return false;
  const isEnd = (value) => (isNumber(type) ? typeof value === "number" : /^\d{4}-\d\d-\d\d$/.test(value));
  const shown = {
    in: (values) => Array.isArray(values) && values.length > 0 && values.every((value) => ["string", "number", "boolean"].includes(typeof value)),
    contains: (text) => typeof text === "string" && text !== "",
    ">=": isEnd,
    [asksDays(name, type) ? "<" : "<="]: isEnd,
  };
  const asked = Object.keys(tests);
  const alone = asked.length === 1 || !("in" in tests || "contains" in tests);
  return asked.length > 0 && alone && asked.every((one) => Object.hasOwn(shown, one) && shown[one](tests[one]));
}

// A day, as <input type="date"> gives it, as a column's value; plus: days later.
export function dayValue(day, type, plus = 0) {
  const [year, month, number] = day.split("-").map(Number);
  const date = new Date(year, month - 1, number + plus);
  if (/^int/.test(type)) return date.getTime() * 1e6; // ns since 1970
  const two = (part) => String(part).padStart(2, "0");
  return `${String(date.getFullYear()).padStart(4, "0")}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

// The day of a column's value, as <input type="date"> wants it; "" for what is none.
export function dayOf(value, type, plus = 0) {
  if (value === undefined || !(isDay(value) || /^int/.test(type))) return "";
  const date = /^int/.test(type) ? new Date(value / 1e6) : new Date(`${value}T00:00`);
  const days = [date.getFullYear(), date.getMonth() + 1, date.getDate()].join("-");
  return dayValue(days, "", plus);
}
