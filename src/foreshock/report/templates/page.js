"use strict";

// Charts: each is fitted to the width of its place, and drawn again when that or the colour scheme changes.
const { datasets, specs, configs } = JSON.parse(document.getElementById("charts").textContent);
const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const NARROWEST = 160; // pixels of a plot below which panels wrap
const WIDEST = 520;

function fit(spec, width) {
  if (spec.vconcat) return { ...spec, vconcat: spec.vconcat.map((part) => fit(part, width)) };
  const around = spec.spacing.column; // what a plot needs for its axis and for labels beside it
  const inner = width - 12;
  const columns = Math.max(1, Math.min(spec.concat.length, Math.floor(inner / (NARROWEST + around))));
  const plot = Math.max(NARROWEST, Math.min(WIDEST, Math.floor(inner / columns) - around));
  return { ...spec, columns, concat: spec.concat.map((part) => ({ ...part, width: plot })) };
}

function configFor(width) {
  const config = structuredClone(configs[darkScheme.matches ? "dark" : "light"]);
  const narrow = width < 560;
  config.params.find((param) => param.name === "room").value = width - (narrow ? 70 : 190);
  if (narrow) config.legend.titleOrient = "top";
  return config;
}

const views = new Map();

async function draw(place) {
  const name = place.dataset.chart;
  const width = place.clientWidth;
  views.get(name)?.finalize();
  const result = await vegaEmbed(place, { ...fit(specs[name], width), datasets }, {
    config: configFor(width),
    renderer: "svg",
    mode: "vega-lite",
    actions: { export: { svg: true, png: true }, source: false, compiled: false, editor: false },
    downloadFileName: name,
    tooltip: { theme: darkScheme.matches ? "dark" : "light" },
  });
  views.set(name, result);
  place.dataset.width = width;
  place.dataset.drawn = darkScheme.matches ? "dark" : "light";
}

async function drawAll(needed) {
  for (const place of document.querySelectorAll(".chart")) {
    if (needed(place)) await draw(place);
  }
}

let waiting;
function redrawSoon(needed) {
  clearTimeout(waiting);
  waiting = setTimeout(() => drawAll(needed), 200);
}

drawAll(() => true);
darkScheme.addEventListener("change", () => redrawSoon(() => true));
addEventListener("resize", () => redrawSoon((place) => Math.abs(place.clientWidth - place.dataset.width) > 4));

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
    const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
    row.hidden = !words.every((word) => text.includes(word) || text.replaceAll("×", "x").includes(word));
    shown += !row.hidden;
  }
  document.getElementById("shown").value = `${shown} of ${body.rows.length} runs`;
});
