// Redraws what Python drew for the last round, for another round, layer or expert.
const slider = document.getElementById("round");
const readout = document.getElementById("readout");
const state = { round: page.rounds.at(-1), block: page.blocks[0], expert: null };
let pointed = null; // block and expert under the mouse: shown until it leaves
let told = null; // the cell that the line of text is about

const articles = [...document.querySelectorAll("article[data-run]")];
const figures = [...document.querySelectorAll("figure[data-chart]")];
const tables = new Map(articles.map((article) => [article, [...article.querySelectorAll("table.cells")]]));
const shown = new Map(); // article -> what it shows
let drawnRound = null;
let lit = []; // lines of the chosen expert

const whereOf = (block, expert) =>
  page.kinds.includes(block)
    ? shortName(block)
    : `${shortName(block)}, ${expert === null ? "all experts" : `expert ${expert}`}`;

function drawRun(article) {
  const run = page.runs[article.dataset.run];
  const { block, expert } = pointed ?? state;
  const now = { run, line: lineUpTo(run, state.round), block, expert };
  const was = shown.get(article) ?? {};
  article.querySelector("[data-told]").textContent = toldRound(run, now.line.round, state.round);
  if (now.line === was.line && block === was.block && expert === was.expert) return;
  for (const table of tables.get(article)) drawTable(table, now, was);
  article.querySelector("[data-where]").textContent = whereOf(block, expert);
  shown.set(article, now);
}

function drawChart(figure) {
  const chart = page.charts[figure.dataset.chart];
  const [low, high, start, end] = chart.x;
  const cursor = figure.querySelector(".cursor");
  const x = start + ((state.round - low) / (high - low)) * (end - start);
  cursor.toggleAttribute("hidden", state.round < low || state.round > high);
  cursor.setAttribute("x1", x);
  cursor.setAttribute("x2", x);
  // The last value up to the chosen round: not every round is evaluated.
  const seen = chart.rounds.filter((round) => round <= state.round).length;
  for (const value of figure.querySelectorAll("b[data-line], tspan[data-line]")) {
    const last = chart.lines[value.dataset.line].slice(0, seen).findLast((number) => number !== null);
    value.textContent = last === undefined ? "\u2013" : last.toFixed(4);
  }
}

function lightLines() {
  const { block, expert } = pointed ?? state;
  const chosen = figures.filter((figure) => expert !== null && figure.dataset.block === block);
  for (const path of lit) path.classList.remove("on");
  lit = chosen.map((figure) => figure.querySelector(`path.expert[data-line="${expert}"]`)).filter(Boolean);
  for (const path of lit) path.classList.add("on");
}

function draw() {
  articles.forEach(drawRun);
  lightLines();
  if (drawnRound !== state.round) figures.forEach(drawChart);
  drawnRound = state.round;
  readout.textContent = told ? describe(told) : "";
}

function chooseRound(index) {
  state.round = page.rounds[index];
  slider.value = index;
  slider.setAttribute("aria-valuetext", `round ${state.round}`);
  document.querySelector("#round-shown b").textContent = state.round;
  draw();
}

// Block and expert that a cell stands for; null for a pair of sites or a site.
function placeOf(cell) {
  const { sort } = cell.closest("table").dataset;
  if (sort === "map") {
    const head = cell.parentElement.cells[0];
    return { block: head.title, expert: cell === head ? null : cell.cellIndex - 1 };
  }
  return sort === "sites" && cell.tagName === "TD" ? { block: state.block, expert: cell.cellIndex - 1 } : null;
}

const asText = (value) => (isNumber(value) ? String(value).replace("-", "\u2212") : "\u2013");

// The number of an expert, and the site that it is of.
function lowestSite(line, found, lowest, name, expert) {
  const site = line.sites[lowestOf((found[name] ?? []).map((row) => row[expert]))];
  return asText(found[lowest]?.[expert]) + (site === undefined ? "" : ` (${site})`);
}

function mostOpposed(run, line, found, expert) {
  const cosines = found.pairs?.[expert] ?? [];
  const place = lowestOf(cosines);
  if (place < 0) return "";
  const places = placesOf(run, line);
  const left = places.findIndex((row) => row.includes(place));
  const right = places[left].indexOf(place);
  return `, most opposed ${run.sites[left]} and ${run.sites[right]} ${asText(cosines[place])}`;
}

function describeExpert(run, line, block, expert) {
  const found = blockOf(line, block);
  const of = (name) => asText(found[name]?.[expert]);
  const others = lowestSite(line, found, "lowest_to_others", "cosine_to_others", expert);
  const consensus = lowestSite(line, found, "lowest_cosine", "cosine", expert);
  const own = found.rule?.scale ? `, the rule\u2019s own scale ${asText(found.rule.scale[expert])}` : "";
  const tokens = found.num_tokens ? `, ${of("num_tokens")} tokens` : "";
  const opposed = mostOpposed(run, line, found, expert);
  return `lowest cosine to the others ${others}, to the consensus ${consensus}${opposed}, kept ${of("kept")}, scale ${of("scale")}${own}${tokens}`;
}

function describe(cell) {
  const { sort } = cell.closest("table").dataset;
  const run = page.runs[cell.closest("article").dataset.run];
  const line = lineUpTo(run, state.round);
  const { block, expert } = placeOf(cell) ?? state;
  const where = whereOf(block, expert);
  const site = cell.parentElement.cells[0].title;
  if (sort === "map") return expert === null ? where : `${where}: ${describeExpert(run, line, block, expert)}`;
  if (cell.tagName !== "TD") return site;
  const found = blockOf(line, block);
  if (sort === "pairs") {
    const cosines = (expert === null ? found.block_pairs : found.pairs?.[expert]) ?? [];
    const place = placesOf(run, line)[run.sites.indexOf(site)][cell.cellIndex - 1];
    return `${where}: ${site} and ${run.sites[cell.cellIndex - 1]} ${asText(cosines[place])}`;
  }
  const of = (name) => asText(found[name]?.[line.sites.indexOf(site)]?.[expert]);
  const tokens = found.tokens ? `${of("tokens")} tokens, ` : "";
  return `${where}, ${site}: ${tokens}‖update‖ ${of("length")}, cosine to the others ${of("cosine_to_others")}, to the consensus ${of("cosine")}`;
}

function moveFocus(event) {
  const cell = event.target.closest("tbody td, tbody th");
  if (!cell) return;
  const rows = [...cell.closest("tbody").rows];
  const [down, right] = [rows.indexOf(cell.parentElement), cell.cellIndex];
  const next = {
    ArrowLeft: [down, right - 1],
    ArrowRight: [down, right + 1],
    ArrowUp: [down - 1, right],
    ArrowDown: [down + 1, right],
    Home: [event.ctrlKey ? 0 : down, 0],
    End: [event.ctrlKey ? rows.length - 1 : down, Infinity],
  }[event.key];
  if (!next) return;
  event.preventDefault();
  const row = rows[next[0]];
  row?.cells[Math.min(next[1], row.cells.length - 1)]?.focus();
}

function enterCell(cell) {
  cell
    .closest("table")
    .querySelectorAll('[tabindex="0"]')
    .forEach((other) => (other.tabIndex = -1));
  cell.tabIndex = 0;
  Object.assign(state, placeOf(cell) ?? {});
  pointed = null;
  told = cell;
  draw();
}

function watch(table) {
  table.setAttribute("role", "grid");
  for (const cell of table.querySelectorAll("tbody td, tbody th")) cell.tabIndex = -1;
  const first = table.querySelector("tbody th");
  if (first) first.tabIndex = 0;
  const cellOf = (event) => event.target.closest("tbody td, tbody th");
  table.addEventListener("keydown", moveFocus);
  table.addEventListener("focusin", (event) => cellOf(event) && enterCell(cellOf(event)));
  table.addEventListener("pointerover", (event) => {
    const cell = event.pointerType === "mouse" ? cellOf(event) : null;
    if (!cell) return;
    pointed = placeOf(cell);
    told = cell;
    draw();
  });
  table.addEventListener("pointerleave", () => {
    pointed = null;
    told = document.activeElement.closest("table.cells tbody td, table.cells tbody th");
    draw();
  });
}

function watchChart(figure) {
  const svg = figure.querySelector("svg");
  const [low, high, start, end] = page.charts[figure.dataset.chart].x;
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const round = low + ((x - start) / (end - start)) * (high - low);
    const distances = page.rounds.map((number) => Math.abs(number - round));
    chooseRound(distances.indexOf(Math.min(...distances)));
  });
}

document.documentElement.classList.remove("no-script");
if (slider) {
  slider.addEventListener("input", () => chooseRound(Number(slider.value)));
  document.querySelectorAll("table.cells[data-sort]").forEach(watch);
  figures.forEach(watchChart);
  draw();
}
