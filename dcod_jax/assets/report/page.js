const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = 6;
const runColor = (i) => `var(--run${i % COLORS})`;
const dashOf = (i) => ["", "7 4", "2 3"][Math.floor(i / COLORS) % 3];

// The colour of a run is also that of the model of its name in tables and drift curves.
function modelColor(name, place) {
  if (name === "start") return "var(--start)";
  if (name === "teacher") return "var(--ink)";
  const run = DATA.runs.findIndex((one) => one.name === name);
  return runColor(run >= 0 ? run : place);
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
  return present.length ? el("div", { class: present.length === 4 ? "grid four" : "grid" }, ...present) : null;
}

function table(heads, rows, kind = "") {
  const head = el("tr", {}, ...heads.map((text) => el("th", { text, scope: "col", class: kind })));
  const body = rows.map((row) =>
    el("tr", {}, ...row.map((cell) => (cell instanceof Node ? cell : el("td", { text: cell ?? ABSENT })))));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
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
    name: run.name, color: runColor(i), dash: dashOf(i),
    points: options.weights && !inWeights(run) ? [] : pointsOf(run, key),
    band: options.band ? bandOf(run, ...options.band) : undefined,
  }));
  drawn.add(key);
  for (const other of options.band || []) drawn.add(other);
  return chart({ title, series, xLabel: "step", xInteger: true, ...options });
}

function bandOf(run, lowKey, highKey) {
  const high = new Map(pointsOf(run, highKey));
  return pointsOf(run, lowKey).filter(([x]) => high.has(x)).map(([x, low]) => [x, low, high.get(x)]);
}

// Two metrics of each run in one chart, the second dashed.
function pairOf(keys, title, options = {}) {
  const series = DATA.runs.flatMap((run, i) => keys.map(([key, label], j) => ({
    name: DATA.runs.length > 1 ? `${run.name}: ${label}` : label, color: runColor(i),
    dash: j ? "5 4" : "", thin: j > 0, points: options.weights && !inWeights(run) ? [] : pointsOf(run, key),
  })));
  keys.forEach(([key]) => drawn.add(key));
  return chart({ title, series, legend: true, xLabel: "step", xInteger: true, ...options });
}

const drawn = new Set(["tokens_seen", "nonfinite", "eval/tokens", "tokens/completion", "tokens/total"]);

function runsTable() {
  const heads = ["run", "weights", "loss", "last step", "last loss", "held-out nll, first", "last", "ESS, last", "tokens seen", "s / step"];
  const rows = DATA.runs.map((run, i) => {
    const config = run.config;
    const steps = pointsOf(run, "loss");
    return [
      named(run.name, runColor(i)), config["loss.weights.name"], config["loss.divergence"],
      format(steps.length ? steps[steps.length - 1][0] : null), format(last(run, "loss")),
      format(first(run, "eval/nll")), format(last(run, "eval/nll")), format(last(run, "weights/ess")),
      format(last(run, "tokens_seen")), format(last(run, "time/step_seconds")),
    ];
  });
  return table(heads, rows);
}

// ---------------------------------------------------------------- accuracy

const ACCURACY = {
  problems: ["problems", format], correct: ["correct", format], accuracy: ["accuracy", percent],
  no_answer: ["no answer", percent], truncated: ["cut off", percent], tokens: ["tokens", format],
};

// Teacher, start, then the runs as they are listed, then whatever else there is.
function ordered(models) {
  const rank = (name) => {
    const run = DATA.runs.findIndex((one) => one.name === name);
    return name === "teacher" ? -2 : name === "start" ? -1 : run >= 0 ? run : DATA.runs.length;
  };
  return Object.entries(models).sort(([a], [b]) => rank(a) - rank(b));
}

function accuracy(result) {
  const models = ordered(result.models);
  const keys = Object.keys(ACCURACY).filter((key) => models.some(([, row]) => known(row[key])));
  const heads = ["model"];
  for (const key of keys) {
    heads.push(ACCURACY[key][0]);
    if (key === "accuracy") heads.push("95 % interval", "", `minus ${result.baseline}, paired 95 %`);
  }
  const rows = models.map(([name, row], place) => {
    const cells = [named(name, modelColor(name, place))];
    for (const key of keys) {
      cells.push(ACCURACY[key][1](row[key]));
      if (key === "accuracy") cells.push(...intervalCells(name, row, place));
    }
    return cells;
  });
  return [el("p", { class: "dim", text: result.source }), table(heads, rows)];
}

function intervalCells(name, row, place) {
  const span = known(row.low) ? `${percent(row.low)} to ${percent(row.high)}` : ABSENT;
  const bar = svg("svg", { width: 160, height: 14, role: "img", "aria-label": `accuracy ${percent(row.accuracy)}` });
  const color = modelColor(name, place);
  bar.append(svg("line", { x1: 2, x2: 158, y1: 7, y2: 7, class: "axis" }));
  if (known(row.low)) {
    bar.append(svg("line", { x1: 2 + 156 * row.low, x2: 2 + 156 * row.high, y1: 7, y2: 7, color, "stroke-width": 3 }));
  }
  if (known(row.accuracy)) bar.append(svg("circle", { cx: 2 + 156 * row.accuracy, cy: 7, r: 4, fillColor: color }));
  const sign = (x) => (x > 0 ? "+" : "") + percent(x);
  const change = known(row.difference)
    ? `${sign(row.difference)} (${sign(row.difference_low)} to ${sign(row.difference_high)})` : ABSENT;
  return [span, el("td", {}, bar), change];
}

// ---------------------------------------------------------------- weights

function positionChart() {
  const series = DATA.runs.flatMap((run, i) => (inWeights(run) ? run.positions : []).map((at, j) => ({
    name: `${run.name}, step ${at.step}`, color: runColor(i), thin: j < run.positions.length - 1,
    dash: j === run.positions.length - 1 ? "" : j ? "5 4" : "2 3", dots: true,
    points: at.first.map((start, k) => [BUCKETS.indexOf(start), at.values[k]]),
  })));
  return chart({
    title: "Mean weight by position in the completion", series, legend: true, xLabel: "first token of the bucket",
    xTicks: BUCKETS.map((_, k) => k), xText: (k) => String(BUCKETS[k]), xName: "from token",
    note: "before the batch normalisation",
  });
}

const BUCKETS = [...new Set(DATA.runs.flatMap((run) => run.positions.flatMap((at) => at.first)))].sort((a, b) => a - b);

function histogramChart() {
  const series = DATA.runs.flatMap((run, i) => {
    const found = run.histogram;
    if (!found || !inWeights(run)) return [];
    const points = found.counts.map((count, k) => [found.edges[k], count ? count / found.tokens : null]);
    const end = found.edges[found.edges.length - 1];
    points.push([end, points[points.length - 1][1]]);
    return [{ name: `${run.name}: mean ${format(found.mean)}, ESS ${format(found.ess)}`, color: runColor(i), step: true, points }];
  });
  const tokens = DATA.runs.filter(inWeights).map((run) => run.histogram).filter(Boolean).map((h) => `${format(h.tokens)} tokens of ${h.traces} traces`);
  return chart({
    title: "Weight distribution", series, legend: true, logY: true, xLabel: "weight before the batch normalisation",
    xName: "bin from", yText: (y) => `${Number((100 * y).toPrecision(3))} %`,
    note: `share of tokens in a bin, log scale; a gap is an empty bin; ${[...new Set(tokens)].join("; ")}`,
  });
}

// ---------------------------------------------------------------- drift

function driftCurve(models, pick, more = {}) {
  return ordered(models).map(([name, row], place) => {
    const count = row.lengths.filter((n) => n <= row.reach).length;
    const curve = pick(row);
    const at = (values) => row.lengths.slice(0, count).map((n, k) => [n, values[k]]);
    return {
      name: more.label ? `${name}: ${more.label}` : name, color: modelColor(name, place), points: at(curve.value),
      band: more.plain ? undefined : row.lengths.slice(0, count).map((n, k) => [n, curve.low[k], curve.high[k]]),
      dash: more.dash, thin: Boolean(more.dash),
    };
  });
}

function drift(result) {
  const models = result.models;
  const options = { legend: true, xLabel: "generated tokens", xName: "token", xInteger: true };
  const about = `teacher ${result.teacher}, ${result.prompts} prompts × ${result.samples} samples; curves end where fewer than ${result.least} sequences of either set are alive; bands are 95 % bootstrap intervals over prompts`;
  return [
    el("p", { class: "dim", text: `${result.source}: ${about}` }),
    driftTable(result),
    grid(
      chart({ title: "ExAccErr: excess of accumulated error", series: driftCurve(models, (row) => row.excess), yText: (y) => `${format(y)} %`, ...options }),
      chart({
        title: "Accumulated KL(teacher‖student), nats", ...options,
        series: [
          ...driftCurve(models, (row) => row.accumulated, { label: "own sequences (R)", plain: true }),
          ...driftCurve(models, (row) => row.reference, { label: "teacher's (E)", dash: "5 4", plain: true }),
        ],
      }),
      chart({
        title: "Mean log q − log p by position", ...options,
        series: [
          ...driftCurve(models, (row) => row.log_ratio.student, { label: "own sequences", plain: true }),
          ...driftCurve(models, (row) => row.log_ratio.teacher, { label: "teacher's", dash: "5 4", plain: true }),
        ],
      }),
      chart({
        title: "Sequences alive", ...options, zero: true,
        series: ordered(models).flatMap(([name, row], place) => [
          { name: `${name}: own`, color: modelColor(name, place), points: row.lengths.map((n, k) => [n, row.student_alive[k]]) },
          { name: `${name}: teacher's`, color: modelColor(name, place), dash: "5 4", thin: true, points: row.lengths.map((n, k) => [n, row.teacher_alive[k]]) },
        ]),
      }),
    ),
  ];
}

function driftTable(result) {
  const reach = Math.min(...Object.values(result.models).map((row) => row.reach));
  const span = (curve, k) => (known(curve.low[k]) ? `${curve.low[k].toFixed(1)} to ${curve.high[k].toFixed(1)} %` : ABSENT);
  const rows = ordered(result.models).map(([name, row], place) => {
    const k = row.lengths.filter((n) => n <= reach).length - 1;
    const at = (curve) => (k < 0 ? null : curve.value[k]);
    const change = row.difference && known(at(row.difference)) ? `${at(row.difference).toFixed(1)} % (${span(row.difference, k)})` : ABSENT;
    return [
      named(name, modelColor(name, place)), format(k < 0 ? null : row.lengths[k]), format(at(row.accumulated)), format(at(row.reference)),
      known(at(row.excess)) ? `${at(row.excess).toFixed(1)} %` : ABSENT, k < 0 ? ABSENT : span(row.excess, k), change,
    ];
  });
  return table(["model", "tokens", "R (nats)", "E (nats)", "ExAccErr", "95 % interval", `minus ${result.baseline}, paired 95 %`], rows);
}

// ---------------------------------------------------------------- settings and the rest

function settings() {
  const keys = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.config)))];
  const text = (value) => (value === undefined ? ABSENT : typeof value === "string" ? value || "(empty)" : JSON.stringify(value));
  const row = (key) => [key, ...DATA.runs.map((run) => el("td", { class: "wide", text: text(run.config[key]) }))];
  const heads = ["key", ...DATA.runs.map((run) => run.name)];
  const differ = keys.filter((key) => new Set(DATA.runs.map((run) => text(run.config[key]))).size > 1);
  const all = el("details", {}, el("summary", { text: `all ${keys.length} settings` }), table(heads, keys.map(row), "wide"));
  if (DATA.runs.length < 2) return [all];
  return [el("p", { class: "dim", text: "Where the runs differ:" }), table(heads, differ.map(row), "wide"), all];
}

function prefixed(prefix) {
  const keys = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.series)))].sort();
  return keys.filter((key) => key.startsWith(prefix) && !drawn.has(key));
}

function main() {
  document.getElementById("about").textContent = DATA.about;
  DATA.runs.forEach((run, i) => {
    const dot = el("span", { text: "●" });
    dot.style.color = runColor(i);
    document.getElementById("legend").append(el("span", {}, dot, document.createTextNode(run.name)));
  });
  section("Runs", "", runsTable(), ...DATA.notes.map((text) => el("p", { class: "dim", text })));
  section("Accuracy", "", ...DATA.evaluations.flatMap(accuracy));
  section("Loss", "", grid(
    metric("loss", "Training loss (weighted)"), metric("nll", "Training nll per token"), metric("eval/nll", "Held-out nll per token"),
    metric("eval/loss", "Held-out loss (weighted)"), metric("divergence", "Divergence from the teacher"),
    metric("grad_norm", "Gradient norm", { robust: true }), metric("learning_rate", "Learning rate", { zero: true })));
  section("Weights", "Weights are those of the train step before the batch normalisation. The effective sample size is 1 where all weights are equal." + (weighing.length && weighing.length < DATA.runs.length ? " Runs with uniform weights, all 1, are left out." : ""), grid(
    metric("weights/mean", "Mean weight, band from 5 % to 95 % of the tokens", { band: ["weights/q05", "weights/q95"], weights: true }),
    metric("weights/ess", "Effective sample size, share of the tokens", { weights: true }), histogramChart(), positionChart(),
    pairOf([["weights/confident_mass", "share of the weight"], ["weights/confident_tokens", "share of the tokens"]], "On tokens with q > 0.9"),
    metric("weights/log_ratio", "Mean log q − log p of the trace tokens"),
    pairOf([["weights/saturated_low", "below 0.01"], ["weights/saturated_high", "above 0.99"]], "Saturated weights, share of the tokens", { weights: true }),
    prefixed("weights/").map((key) => metric(key, key, { weights: true }))));
  section("Drift", "ExAccErr(l) = 100 (R(l) − E(l)) / E(l): how much more error the student gathers on text of its own than on the teacher's.", ...DATA.drifts.flatMap(drift));
  section("Traces", "", traces());
  section("Time", "", grid(prefixed("time/").map((key) => metric(key, key, { robust: true, zero: true }))));
  section("Other metrics", "", grid(prefixed("").map((key) => metric(key, key))));
  section("Settings", "", ...settings());
}
