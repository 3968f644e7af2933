// What numbers look like and what a round's line says: the rules of heat.py and experts.py.
const MAX_COLUMNS_WITH_TEXT = 16;
const OF_RULE = { weight: "weight", conflict: "conflict", rule_scale: "scale" };

const isNumber = (value) => value !== null && value !== undefined;

function fixed(value, decimals) {
  const text = value.toFixed(decimals);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "\u2212");
}

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
  if (!isNumber(value)) return "\u00b7";
  if (scale.style === "percent") return `${fixed(100 * value, 0)}%`;
  if (scale.style === "share") return `${fixed(100 * value, 1)}%`;
  return scale.style === "count" ? countText(value) : fixed(value, 2);
}

function colourOf(value, scale) {
  if (!isNumber(value)) return "n";
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

const blockOf = (line, block) => line.layers[block] ?? line.kinds[block] ?? {};

function valuesOf(name, found) {
  if (name === "load") return (found.tokens ?? []).map(load);
  return (name in OF_RULE ? found.rule?.[OF_RULE[name]] : found[name]) ?? [];
}

// Experts of a block; 1 for a kind.
function widthOf(run, block) {
  for (const line of run.lines) {
    const found = blockOf(line, block);
    if (found.num_tokens ?? found.norm) return (found.num_tokens ?? found.norm).length;
  }
  return 0;
}

// A run's last line up to a round; without numbers where there is none yet.
function lineUpTo(run, round) {
  run.nothing ??= { round: null, sites: [], layers: {}, kinds: {} };
  return run.lines.findLast((line) => line.round <= round) ?? run.nothing;
}

// Which round a run shows, where that is not the chosen one.
function toldRound(run, shown, chosen) {
  if (shown === chosen) return "";
  if (shown === null) return "no round yet";
  return shown === run.lines.at(-1).round ? `round ${shown}, its last` : `round ${shown}`;
}

// For each two of a run's sites, the place of their cosine among a line's pairs j < k; -1 for none.
const pairPlaces = new WeakMap();
function placesOf(run, line) {
  if (!pairPlaces.has(line)) {
    const count = line.sites.length;
    const sites = run.sites.map((site) => line.sites.indexOf(site));
    const place = (j, k) => j * count - (j * (j + 1)) / 2 + k - j - 1;
    const pair = (one, other) =>
      one < 0 || other < 0 || one === other ? -1 : place(Math.min(one, other), Math.max(one, other));
    pairPlaces.set(line, sites.map((one) => sites.map((other) => pair(one, other))));
  }
  return pairPlaces.get(line);
}

// Place of the lowest number; -1 where there is none.
function lowestOf(values) {
  return values.reduce((best, value, i) => (isNumber(value) && !(best >= 0 && values[best] <= value) ? i : best), -1);
}
