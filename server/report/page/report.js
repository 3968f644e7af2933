"use strict";
// Redraws what Python drew for the last round, for another round, layer or expert. `heat.py` holds the same rules.
(() => {
  const page = JSON.parse(document.getElementById("page").textContent);
  const slider = document.getElementById("round");
  const readout = document.getElementById("readout");
  const MAX_COLUMNS_WITH_TEXT = 16;
  const state = { round: page.rounds.at(-1), block: page.blocks[0], expert: null };
  let pointed = null; // block and expert under the mouse: shown until it leaves
  let told = null; // the cell that the line of text is about

  const fixed = (value, decimals) => {
    const text = value.toFixed(decimals);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "\u2212");
  };

  function countText(value) {
    for (const [unit, size] of [["", 1], ["k", 1e3], ["M", 1e6]]) {
      if (value < 1000 * size || unit === "M") {
        const small = value / size;
        return fixed(small, unit && small < 10 ? 1 : 0) + unit;
      }
    }
    return "";
  }

  function textOf(value, scale) {
    if (value === null || value === undefined) return "\u00b7";
    if (scale.style === "percent") return `${fixed(100 * value, 0)}%`;
    return scale.style === "count" ? countText(value) : fixed(value, 2);
  }

  function colourOf(value, scale) {
    if (value === null || value === undefined) return "n";
    const step = Math.floor(((value - scale.low) / (scale.high - scale.low)) * scale.count);
    return scale.kind + Math.min(scale.count - 1, Math.max(0, step));
  }

  function shortName(block) {
    const numbers = block.split(".").filter((part) => /^\d+$/.test(part));
    return numbers.length === 1 ? `layer ${numbers[0]}` : block;
  }

  function load(tokens) {
    if (tokens.includes(null)) return tokens.map(() => null);
    const total = tokens.reduce((sum, count) => sum + count, 0);
    return tokens.map((count) => (total ? count / total : 0));
  }

  // What a run's line of the chosen round says of a block; empty where it says nothing.
  const lineOf = (run) => run.lines.find((line) => line.round === state.round) ?? { sites: [], layers: {}, kinds: {} };
  const blockOf = (line, block) => line.layers[block] ?? line.kinds[block] ?? {};

  function siteValues(name, found) {
    if (name === "load") return (found.tokens ?? []).map(load);
    return (name === "weight" ? found.rule?.weight : found[name]) ?? [];
  }

  function widthOf(run, block) {
    for (const line of run.lines) {
      const found = blockOf(line, block);
      if (found.num_tokens ?? found.norm) return (found.num_tokens ?? found.norm).length;
    }
    return 0;
  }

  function paint(cell, value, scale) {
    cell.className = colourOf(value, scale);
    cell.textContent = textOf(value, scale);
  }

  function select(cell, isSelected) {
    if (isSelected) cell.setAttribute("aria-selected", "true");
    else cell.removeAttribute("aria-selected");
  }

  function drawMap(table, line, target) {
    const scale = page.scales[table.dataset.name];
    for (const row of table.tBodies[0].rows) {
      const [head, ...cells] = row.cells;
      const values = blockOf(line, head.title)[table.dataset.name] ?? [];
      cells.forEach((cell, expert) => {
        paint(cell, values[expert], scale);
        select(cell, target.block === head.title && target.expert === expert);
      });
      select(head, target.block === head.title && target.expert === null);
    }
  }

  function drawPairs(table, run, line, target) {
    const found = blockOf(line, target.block);
    const cosines = target.expert === null ? found.block_pairs : found.pairs?.[target.expert];
    const known = new Map();
    let pair = 0;
    line.sites.forEach((left, j) =>
      line.sites.slice(j + 1).forEach((right) => {
        known.set(JSON.stringify([left, right]), cosines?.[pair]).set(JSON.stringify([right, left]), cosines?.[pair]);
        pair += 1;
      }),
    );
    [...table.tBodies[0].rows].forEach((row, i) =>
      [...row.cells].slice(1).forEach((cell, j) =>
        paint(cell, known.get(JSON.stringify([run.sites[i], run.sites[j]])), page.scales.pairs),
      ),
    );
  }

  // Layers may differ in their number of experts.
  function setColumns(table, count) {
    table.closest(".heat").classList.toggle("wide", count > MAX_COLUMNS_WITH_TEXT);
    for (const row of table.rows) {
      while (row.cells.length > count + 1) row.lastElementChild.remove();
      while (row.cells.length < count + 1) {
        const isHead = row.parentElement === table.tHead;
        const cell = document.createElement(isHead ? "th" : "td");
        if (isHead) {
          cell.scope = "col";
          cell.textContent = String(row.cells.length - 1);
        } else cell.tabIndex = -1;
        row.append(cell);
      }
    }
  }

  function drawSites(table, run, line, target) {
    const scale = page.scales[table.dataset.name];
    const rows = siteValues(table.dataset.name, blockOf(line, target.block));
    setColumns(table, widthOf(run, target.block));
    [...table.tBodies[0].rows].forEach((row, i) => {
      const values = rows[line.sites.indexOf(run.sites[i])] ?? [];
      [...row.cells].slice(1).forEach((cell, expert) => {
        paint(cell, values[expert], scale);
        select(cell, target.expert === expert);
      });
    });
  }

  function drawRun(article) {
    const run = page.runs[article.dataset.run];
    const line = lineOf(run);
    const target = pointed ?? state;
    for (const table of article.querySelectorAll("table.cells")) {
      if (table.dataset.sort === "map") drawMap(table, line, target);
      else if (table.dataset.sort === "pairs") drawPairs(table, run, line, target);
      else drawSites(table, run, line, target);
    }
    const expert = target.expert === null ? "all experts" : `expert ${target.expert}`;
    article.querySelector("[data-where]").textContent = `${shortName(target.block)}, ${expert}`;
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
    for (const shown of figure.querySelectorAll("b[data-line], tspan[data-line]")) {
      const value = chart.lines[shown.dataset.line].slice(0, seen).findLast((number) => number !== null);
      shown.textContent = value === undefined ? "\u2013" : value.toFixed(4);
    }
    const target = pointed ?? state;
    for (const path of figure.querySelectorAll("path.expert")) {
      const isChosen = figure.dataset.block === target.block && Number(path.dataset.line) === target.expert;
      path.classList.toggle("on", isChosen);
    }
  }

  const articles = [...document.querySelectorAll("article[data-run]")];
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  const draw = () => {
    articles.forEach(drawRun);
    figures.forEach(drawChart);
    readout.textContent = told ? describe(told) : "";
  };

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

  function describe(cell) {
    const table = cell.closest("table");
    const run = page.runs[cell.closest("article").dataset.run];
    const line = lineOf(run);
    const { block, expert } = placeOf(cell) ?? state;
    const found = blockOf(line, block);
    const number = (value) => (value === null || value === undefined ? "\u2013" : String(value).replace("-", "\u2212"));
    const where = `${shortName(block)}, ${expert === null ? "all experts" : `expert ${expert}`}`;
    const site = cell.parentElement.cells[0].title;
    if (table.dataset.sort === "pairs") {
      return cell.tagName === "TD" ? `${where}: ${site} and ${run.sites[cell.cellIndex - 1]} ${cell.textContent}` : site;
    }
    if (table.dataset.sort === "sites") {
      if (cell.tagName !== "TD") return site;
      const row = line.sites.indexOf(site);
      const of = (name) => number(found[name]?.[row]?.[expert]);
      return `${where}, ${site}: ${of("tokens")} tokens, ‖update‖ ${of("length")}, cosine ${of("cosine")}`;
    }
    if (expert === null) return where;
    const of = (name) => number(found[name]?.[expert]);
    const own = found.rule?.scale ? `, the rule’s own scale ${number(found.rule.scale[expert])}` : "";
    return `${where}: lowest cosine ${of("lowest_cosine")}, kept ${of("kept")}, scale ${of("scale")}${own}, ${of("num_tokens")} tokens`;
  }

  const KEYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  function moveFocus(event) {
    const cell = event.target.closest("tbody td, tbody th");
    if (!cell || !(event.key in KEYS)) return;
    event.preventDefault();
    const [down, right] = KEYS[event.key];
    const row = cell.closest("tbody").rows[cell.parentElement.rowIndex - 1 + down];
    row?.cells[Math.min(cell.cellIndex + right, row.cells.length - 1)]?.focus();
  }

  function enterCell(cell) {
    const table = cell.closest("table");
    table.querySelectorAll('[tabindex="0"]').forEach((other) => (other.tabIndex = -1));
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
  if (!slider) return;
  slider.addEventListener("input", () => chooseRound(Number(slider.value)));
  document.querySelectorAll("table.cells[data-sort]").forEach(watch);
  figures.forEach(watchChart);
  draw();
})();
