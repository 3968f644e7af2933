// Paints the tables of experts and of sites; what is as it was is not touched, since tables may be large.
const page = JSON.parse(document.getElementById("page").textContent);
const marked = new WeakMap();

function paintRow(row, values, scale) {
  const isWide = row.closest("table").rows[0].cells.length - 1 > MAX_COLUMNS_WITH_TEXT;
  for (let i = 1; i < row.cells.length; i += 1) {
    const [cell, value] = [row.cells[i], values(i - 1)];
    const [colour, text] = [colourOf(value, scale), isWide ? "" : textOf(value, scale)];
    if (cell.className !== colour) cell.className = colour;
    if (cell.textContent !== text) cell.textContent = text;
  }
}

function mark(table, cells) {
  for (const cell of marked.get(table) ?? []) cell.removeAttribute("aria-selected");
  for (const cell of cells) cell.setAttribute("aria-selected", "true");
  marked.set(table, cells);
}

// Layers may differ in their number of experts.
function setColumns(table, count) {
  if (table.tHead.rows[0].cells.length === count + 1) return;
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

const TABLES = {
  map: {
    isStale: (now, was) => now.line !== was.line,
    draw(table, { line }) {
      const { name } = table.dataset;
      for (const row of table.tBodies[0].rows) {
        const values = valuesOf(name, blockOf(line, row.cells[0].title));
        paintRow(row, (expert) => values[expert], page.scales[name]);
      }
    },
    chosen(table, { block, expert }) {
      const row = [...table.tBodies[0].rows].find((one) => one.cells[0].title === block);
      return row ? [row.cells[expert === null ? 0 : expert + 1]] : [];
    },
  },
  sites: {
    isStale: (now, was) => now.line !== was.line || now.block !== was.block,
    draw(table, { run, line, block }) {
      const { name } = table.dataset;
      const rows = valuesOf(name, blockOf(line, block));
      setColumns(table, widthOf(run, block));
      [...table.tBodies[0].rows].forEach((row, i) => {
        const values = rows[line.sites.indexOf(run.sites[i])] ?? [];
        paintRow(row, (expert) => values[expert], page.scales[name]);
      });
    },
    chosen: (table, { expert }) =>
      expert === null ? [] : [...table.tBodies[0].rows].map((row) => row.cells[expert + 1]),
  },
  pairs: {
    isStale: () => true,
    draw(table, { run, line, block, expert }) {
      const found = blockOf(line, block);
      const cosines = (expert === null ? found.block_pairs : found.pairs?.[expert]) ?? [];
      const places = placesOf(run, line);
      [...table.tBodies[0].rows].forEach((row, i) =>
        paintRow(row, (j) => cosines[places[i][j]], page.scales.pairs),
      );
    },
    chosen: () => [],
  },
};

// Draws a table for what is to be seen now, as far as it differs from what was.
function drawTable(table, now, was) {
  const { isStale, draw, chosen } = TABLES[table.dataset.sort];
  if (isStale(now, was)) draw(table, now);
  mark(table, chosen(table, now).filter(Boolean));
}
