"use strict";
// Shared by all views: the data, elements, numbers, colours, the theme. Text from records is set as textContent only.

const DATA = JSON.parse(document.getElementById("data").textContent);
const METRICS = new Map(DATA.metrics.map((m) => [m.key, m]));
const BOARDS = new Map(DATA.boards.map((b) => [b.id, b]));
const BADGES = {
  "two-phase": "tuned on another scenario by a signed study, then frozen",
  "paper": "a published recipe for this method and scenario",
  "own recipe": "a recipe of clbench, not a paper's",
  "default": "defaults of the method and the scenario",
  "changed": "a published recipe with values or the backbone replaced by hand",
  "set by hand": "values given on the command line; how they were found is not recorded",
  "tuned in place": "tuned on the scenario it is scored on: not comparable with untuned rows",
};
const COSTS = [
  ["memory_bytes", "memory kept", bytes],
  ["time_s", "time", seconds],
  ["forward_flops_per_image", "FLOPs per image", count],
  ["num_parameters", "parameters", count],
  ["peak_memory_bytes", "peak memory", bytes],
  ["images_trained", "images trained", count],
];

// -- elements ---------------------------------------------------------------------------------------------------------
function el(tag, props, ...children) {
  const node = document.createElement(tag);
  fill(node, props, children);
  return node;
}

function svg(tag, props, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(node, props, children);
  return node;
}

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
}

function clear(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

function button(text, onclick, props = {}) {
  return el("button", { type: "button", onclick, ...props }, text);
}

function select(label, options, value, onchange) {
  const node = el("select", { onchange: () => onchange(node.value) },
    options.map(([key, text]) => el("option", { value: key, selected: key === value }, text)));
  return el("label", { class: "field" }, el("span", {}, label), node);
}

function chips(label, options, chosen, onchange, { single = false, colour = null } = {}) {
  // options: [key, text, title]; chosen: a Set. Buttons that stay pressed.
  const box = el("div", { class: "chips", role: "group", "aria-label": label });
  for (const [key, text, title] of options) {
    const mark = colour && chosen.has(key) ? el("i", { class: "swatch", style: `background:${colour(key)}` }) : null;
    box.append(button([mark, text].filter(Boolean), () => {
      if (single) { chosen.clear(); chosen.add(key); } else if (!chosen.delete(key)) chosen.add(key);
      onchange();
    }, { "aria-pressed": String(chosen.has(key)), title, "data-key": key, class: "chip" }));
  }
  return el("div", { class: "field" }, el("span", {}, label), box);
}

function badge(kind) {
  return el("span", { class: "badge", "data-kind": kind, title: BADGES[kind] || "" }, kind);
}

// -- numbers ----------------------------------------------------------------------------------------------------------
function scale(metric) { return metric.unit === "fraction" ? 100 : 1; }

function number(value, metric, digits = 1) {
  if (value === null || value === undefined) return "–";
  const text = (value * scale(metric)).toFixed(digits);
  return /^-0\.?0*$/.test(text) ? text.slice(1) : text.replace("-", "−");
}

function unit(metric) { return metric.unit === "fraction" ? "%" : metric.unit; }

function bytes(value) {
  for (const name of ["B", "KiB", "MiB"]) {
    if (value < 1024) return `${trim(value)} ${name}`;
    value /= 1024;
  }
  return `${trim(value)} GiB`;
}

function seconds(value) {
  if (value < 90) return `${trim(value)} s`;
  return value < 5400 ? `${trim(value / 60)} min` : `${trim(value / 3600)} h`;
}

function count(value) {
  for (const name of ["", " k", " M", " G"]) {
    if (value < 1000) return `${trim(value)}${name}`;
    value /= 1000;
  }
  return `${trim(value)} T`;
}

function trim(value) { return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toPrecision(value < 10 ? 2 : 3); }

function probability(p) {
  if (p === null || p === undefined) return "–";
  return p < 0.001 ? "< 0.001" : p.toFixed(3);
}

// -- colours and theme ------------------------------------------------------------------------------------------------
// Okabe and Ito's palette, adapted to each background; told apart by dash as well
const PALETTES = {
  light: ["#0072b2", "#d55e00", "#009e73", "#a2559c", "#b8860b", "#2f6fde", "#6b4c1e", "#444b54"],
  dark: ["#56b4e9", "#ff9a4d", "#3fd6a5", "#e59fd8", "#f0d04a", "#9db7ff", "#d3b58a", "#c3cad3"],
};
const DASHES = [[], [7, 3], [2, 3], [10, 3, 2, 3]];
const dark = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  const chosen = document.documentElement.dataset.theme;
  return chosen || (dark.matches ? "dark" : "light");
}

function colour(index) { const p = PALETTES[theme()]; return p[index % p.length]; }
function dash(index) { return DASHES[Math.floor(index / 8) % DASHES.length]; }
function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function shade(share) {
  // one hue from the background's lightness to full ink, for heat maps
  const stops = theme() === "dark"
    ? [[24, 29, 36], [22, 62, 99], [42, 118, 171], [121, 190, 230], [226, 243, 252]]
    : [[248, 250, 252], [205, 225, 242], [124, 177, 219], [43, 111, 174], [10, 48, 96]];
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
  const mixed = stops[low].map((c, i) => Math.round(c + (stops[low + 1][i] - c) * (at - low)));
  return { fill: `rgb(${mixed})`, ink: 0.3 * mixed[0] + 0.59 * mixed[1] + 0.11 * mixed[2] > 140 ? "#10151b" : "#f4f7fa" };
}

const redraws = new Set(); // drawings in the document; called when the theme or the width changes

function drawn(node, draw, when = "any") {
  // call `draw` again when the theme ("theme"), the width ("width") or either changes, while `node` is in the document
  redraws.add({ node, draw, when });
  return node;
}

function redraw(what) {
  for (const entry of [...redraws]) {
    if (!entry.node.isConnected) redraws.delete(entry);
    else if (entry.when === "any" || entry.when === what) entry.draw();
  }
}

// -- packed things ----------------------------------------------------------------------------------------------------
const unpacked = new Map();

function unpack(name) {
  // the JSON packed in a script element of that name; null if there is none
  if (!unpacked.has(name)) unpacked.set(name, inflate(document.getElementById(name)));
  return unpacked.get(name);
}

async function inflate(node) {
  if (!node) return null;
  if (!("DecompressionStream" in window)) throw new Error("this browser is too old to unpack the curves (DecompressionStream is missing)");
  const data = Uint8Array.from(atob(node.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}

function has(name) { return document.getElementById(name) !== null; }

function sums(differences) {
  let total = 0;
  return differences.map((d) => (total += d));
}

function series(differences) { return sums(differences).map((v) => (v === 0 ? null : (v - 1) / 10000)); }
