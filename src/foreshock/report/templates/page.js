"use strict";

// Charts: each is fitted to the width of its place, and drawn again when that or the colour scheme changes.
const { datasets, specs, configs } = JSON.parse(document.getElementById("charts").textContent);
const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const NARROWEST = 160; // pixels of a plot below which panels wrap
const WIDEST = 520;

// The arms chosen; null where all are shown and there is no choice.
const boxes = [...document.querySelectorAll("#arms input")];

function chosenArms() {
  return boxes.length ? boxes.filter((box) => box.checked).map((box) => box.value) : null;
}

function fitRow(spec, width, arms) {
  const chosen = arms ? spec.concat.filter((panel) => arms.includes(panel.title)) : spec.concat;
  const panels = chosen.length ? chosen : spec.concat.slice(0, 1);
  const around = spec.spacing.column; // what a plot needs for its axis and for labels beside it
  const inner = width - 12;
  const room = Math.max(1, Math.min(panels.length, Math.floor(inner / (NARROWEST + around))));
  const columns = Math.ceil(panels.length / Math.ceil(panels.length / room)); // rows about equally long
  const plot = Math.max(NARROWEST, Math.min(WIDEST, Math.floor(inner / columns) - around));
  return { ...spec, columns, concat: panels.map((part) => ({ ...part, width: plot })) };
}

function fitParam(param, rows, arms) {
  if (param.name === "shown_arms" && arms) return { ...param, value: arms };
  if (!param.views) return param;
  const names = new Set(rows.flatMap((row) => row.concat.flatMap((panel) => panel.layer.map((layer) => layer.name))));
  return { ...param, views: param.views.filter((name) => names.has(name)) };
}

function fit(spec, width) {
  const arms = chosenArms();
  const ofArms = spec.usermeta?.panels === "arm" ? arms : null;
  const rows = (spec.vconcat ?? [spec]).map((row) => fitRow(row, width, ofArms));
  const whole = spec.vconcat ? { ...spec, vconcat: rows } : rows[0];
  if (spec.params) whole.params = spec.params.map((param) => fitParam(param, rows, arms));
  const used = new Set(JSON.stringify(whole).match(/"data-[0-9a-f]+"/g));
  whole.datasets = Object.fromEntries(Object.entries(datasets).filter(([name]) => used.has(`"${name}"`)));
  return whole;
}

function configFor(width) {
  const config = structuredClone(configs[darkScheme.matches ? "dark" : "light"]);
  const narrow = width < 560;
  config.params.find((param) => param.name === "room").value = width - (narrow ? 70 : 190);
  if (narrow) config.legend.titleOrient = "top";
  return config;
}

const views = new Map();

const scheme = () => (darkScheme.matches ? "dark" : "light");

// What a chart was last drawn for: it is drawn again when that changes.
function occasion(place) {
  return [scheme(), Math.round(place.clientWidth / 4), chosenArms()?.join() ?? ""].join("|");
}

async function draw(place) {
  const name = place.dataset.chart;
  const width = place.clientWidth;
  place.dataset.occasion = occasion(place);
  views.get(name)?.finalize();
  const result = await vegaEmbed(place, fit(specs[name], width), {
    config: configFor(width),
    renderer: "svg",
    mode: "vega-lite",
    actions: { export: { svg: true, png: true }, source: false, compiled: false, editor: false },
    downloadFileName: name,
    tooltip: { theme: scheme() },
  });
  views.set(name, result);
  place.dataset.width = width;
  place.dataset.drawn = scheme();
}

// Charts that can be seen, one after another; one that fails leaves the others.
async function drawAll() {
  for (const place of document.querySelectorAll(".chart")) {
    if (place.closest("details:not([open])") || place.dataset.occasion === occasion(place)) continue;
    try {
      await draw(place);
    } catch (error) {
      place.textContent = "This chart could not be drawn.";
      console.error(error);
    }
  }
}

let drawing = Promise.resolve();
function drawNext() {
  drawing = drawing.then(drawAll);
}

let waiting;
function redrawSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(drawNext, 200);
}

drawNext();
darkScheme.addEventListener("change", redrawSoon);
addEventListener("resize", redrawSoon);

// Folded sections: drawn when opened, and opened when one goes there.
function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const fold = target && (target.querySelector("details.fold") ?? target.closest("details.fold"));
  if (fold) fold.open = true;
}

document.querySelectorAll("details.fold").forEach((fold) => fold.addEventListener("toggle", drawNext));
addEventListener("hashchange", unfold);
unfold();

// The choice of arms.
const firstChoice = boxes.map((box) => box.checked);
const choices = { first: (index) => firstChoice[index], all: () => true, none: () => false };

function armsChosen() {
  document.querySelector("#arms output").value = `${chosenArms().length} of ${boxes.length} arms`;
  redrawSoon();
}

boxes.forEach((box) => box.addEventListener("change", armsChosen));
document.querySelectorAll("#arms [data-choose]").forEach((button) => button.addEventListener("click", () => {
  boxes.forEach((box, index) => { box.checked = choices[button.dataset.choose](index); });
  armsChosen();
}));

// The run table: a heading sorts by it, again turns the order; cells without a value stay last.
const table = document.getElementById("run-table");
const body = table.tBodies[0];
const headings = [...table.tHead.rows[0].cells];

function compare(a, b, numeric) {
  return numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
}

function sortBy(index) {
  const heading = headings[index];
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const numeric = heading.classList.contains("number");
  const keyOf = (row) => row.cells[index].dataset.key;
  const rows = [...body.rows].sort((a, b) => {
    const [first, second] = [keyOf(a), keyOf(b)];
    if (first === undefined || second === undefined) return (first === undefined) - (second === undefined);
    return direction * compare(first, second, numeric);
  });
  body.append(...rows);
  headings.forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
}

headings.forEach((heading, index) => heading.firstElementChild.addEventListener("click", () => sortBy(index)));

document.getElementById("filter").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of body.rows) {
    const text = [...row.cells].map((cell) => cell.title || cell.textContent).join(" ").toLowerCase();
    row.hidden = !words.every((word) => text.includes(word) || text.replaceAll("×", "x").includes(word));
    shown += !row.hidden;
  }
  document.getElementById("shown").value = `${shown} of ${body.rows.length} runs`;
});
