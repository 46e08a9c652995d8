// What the page's parts are made of, and the table of runs.

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = 6;
const runColor = (i) => `var(--run${i % COLORS})`;
const dashOf = (i) => ["", "7 4", "2 3"][Math.floor(i / COLORS) % 3];

// The colour of a run is also that of its model in tables and drift curves.
function modelColor(name, place, result) {
  if (name === "start") return "var(--start)";
  if (name === "teacher") return "var(--ink)";
  return runColor(result.runs[name] ?? DATA.runs.length + place);
}

function section(title, about, ...nodes) {
  const present = nodes.filter(Boolean);
  if (!present.length) return;
  const box = el("section", {}, el("h2", { text: title }));
  if (about) box.append(el("p", { class: "dim", text: about }));
  box.append(...present);
  document.getElementById("main").append(box);
}

function grid(...charts) {
  const present = charts.flat().filter(Boolean);
  return present.length
    ? el("div", { class: present.length === 4 ? "grid four" : "grid" }, ...present)
    : null;
}

function table(heads, rows, kind = "") {
  const head = el("tr", {}, ...heads.map((text) => el("th", { text, scope: "col", class: kind })));
  const body = rows.map((row) =>
    el(
      "tr",
      {},
      ...row.map((cell) => (cell instanceof Node ? cell : el("td", { text: cell ?? ABSENT }))),
    ),
  );
  return el(
    "div",
    { class: "scroll" },
    el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)),
  );
}

function named(name, color) {
  const cell = el("td");
  const dot = el("span", { text: "● ", "aria-hidden": "true" });
  dot.style.color = color;
  cell.append(dot, document.createTextNode(name));
  return cell;
}

// ---------------------------------------------------------------- runs

const pointsOf = (run, key) => {
  const found = run.series[key];
  return found ? found.steps.map((step, i) => [step, found.values[i]]) : [];
};

const last = (run, key) => {
  const points = pointsOf(run, key);
  return points.length ? points[points.length - 1][1] : null;
};

const first = (run, key) => (pointsOf(run, key)[0] || [])[1];

// Uniform weights are all 1: beside runs that weigh they only stretch the axis.
const weighing = DATA.runs.filter((run) => run.config["loss.weights.name"] !== "uniform");
const inWeights = (run) => !weighing.length || weighing.includes(run);

function metric(key, title, options = {}) {
  const series = DATA.runs.map((run, i) => ({
    name: run.name,
    color: runColor(i),
    dash: dashOf(i),
    points: options.weights && !inWeights(run) ? [] : pointsOf(run, key),
    band: options.band ? bandOf(run, ...options.band) : undefined,
  }));
  drawn.add(key);
  for (const other of options.band || []) drawn.add(other);
  return chart({ title, series, xLabel: "step", xInteger: true, ...options });
}

function bandOf(run, lowKey, highKey) {
  const high = new Map(pointsOf(run, highKey));
  return pointsOf(run, lowKey)
    .filter(([x]) => high.has(x))
    .map(([x, low]) => [x, low, high.get(x)]);
}

// Two metrics of each run in one chart, the second dashed.
function pairOf(keys, title, options = {}) {
  const series = DATA.runs.flatMap((run, i) =>
    keys.map(([key, label], j) => ({
      name: DATA.runs.length > 1 ? `${run.name}: ${label}` : label,
      color: runColor(i),
      dash: j ? "5 4" : "",
      thin: j > 0,
      points: options.weights && !inWeights(run) ? [] : pointsOf(run, key),
    })),
  );
  keys.forEach(([key]) => drawn.add(key));
  return chart({ title, series, legend: true, xLabel: "step", xInteger: true, ...options });
}

const drawn = new Set([
  "tokens_seen",
  "nonfinite",
  "eval/tokens",
  "tokens/completion",
  "tokens/total",
]);

function runsTable() {
  const heads = [
    "run",
    "weights",
    "loss",
    "last step",
    "last loss",
    "held-out nll, first",
    "last",
    "ESS, last",
    "tokens seen",
    "s / step",
  ];
  const rows = DATA.runs.map((run, i) => {
    const config = run.config;
    const steps = pointsOf(run, "loss");
    return [
      named(run.name, runColor(i)),
      config["loss.weights.name"],
      config["loss.divergence"],
      format(steps.length ? steps[steps.length - 1][0] : null),
      format(last(run, "loss")),
      format(first(run, "eval/nll")),
      format(last(run, "eval/nll")),
      format(last(run, "weights/ess")),
      format(last(run, "tokens_seen")),
      format(last(run, "time/step_seconds")),
    ];
  });
  return table(heads, rows);
}

// Where the wall time of a run went, over all its starts.
function goodputTable() {
  const having = DATA.runs.filter((run) => run.goodput);
  if (!having.length) return null;
  const heads = [
    "run",
    "starts",
    "goodput",
    "steps that count, s",
    "start-up",
    "held-out loss",
    "saves",
    "steps done again",
    "in all",
  ];
  const parts = ["productive", "startup", "eval", "save", "lost", "wall"];
  const rows = having.map((run) => [
    named(run.name, runColor(DATA.runs.indexOf(run))),
    format(run.goodput.starts),
    `${format(100 * run.goodput.goodput)} %`,
    ...parts.map((part) => format(run.goodput.seconds[part])),
  ]);
  return table(heads, rows);
}
