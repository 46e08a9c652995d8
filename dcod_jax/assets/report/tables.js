// The runs and what was measured of them: tables, and the series that charts draw.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const runColor = (i) => `--run${i % 6}`;
const dashOf = (i) => [undefined, [7, 4], [2, 3]][Math.floor(i / 6) % 3];

// The colour of a run is also that of its model in tables and drift curves.
function modelColor(name, place, result) {
  if (name === "start") return "--start";
  return name === "teacher" ? "--ink" : runColor(result.runs[name] ?? RUNS.length + place);
}

function named(name, color, tag = "td") {
  const dot = el("span", { text: "● ", style: { color: `var(${color})` }, "aria-hidden": "true" });
  return el(tag, {}, dot, name);
}

function table(heads, rows, kind = "") {
  if (!rows.length) return null;
  const cells = (row, tag) =>
    row.map((cell) =>
      cell instanceof Node ? cell : el(tag, { text: cell ?? ABSENT, class: kind }),
    );
  const line = (row) => el("tr", {}, ...cells(row, "td"));
  const head = el("thead", {}, el("tr", {}, ...cells(heads, "th")));
  return el(
    "div",
    { class: "scroll" },
    el("table", {}, head, el("tbody", {}, ...rows.map(line))),
  );
}

// ---------------------------------------------------------------- metrics

const pointsOf = (run, key) =>
  (run.series[key]?.steps || []).map((step, i) => [step, run.series[key].values[i]]);
const first = (run, key) => pointsOf(run, key)[0]?.[1];
const last = (run, key) => pointsOf(run, key).at(-1)?.[1];

// Uniform weights are all 1: beside runs that weigh they only stretch the axis.
const weighing = RUNS.filter((run) => run.config["loss.weights.name"] !== "uniform");
const inWeights = (run) => !weighing.length || weighing.includes(run);

const drawn = new Set("tokens_seen nonfinite eval/tokens tokens/completion tokens/total".split(" "));

// One metric of every run. options: those of chart; band: [low metric, high metric]; weights.
function metric(key, title, { band, weights, ...options } = {}) {
  for (const name of [key, ...(band || [])]) drawn.add(name);
  const series = RUNS.map((run, i) => {
    const high = new Map(band ? pointsOf(run, band[1]) : []);
    const low = band ? pointsOf(run, band[0]).filter(([x]) => high.has(x)) : [];
    return {
      name: run.name,
      color: runColor(i),
      dash: dashOf(i),
      points: weights && !inWeights(run) ? [] : pointsOf(run, key),
      band: low.length ? low.map(([x, y]) => [x, y, high.get(x)]) : undefined,
    };
  });
  return chart(title, series, { xLabel: "step", ...options });
}

// Two metrics of each run in one chart, the second dashed.
function pairOf(keys, title, { weights } = {}) {
  const series = RUNS.flatMap((run, i) =>
    keys.map(([key, label], j) => {
      drawn.add(key);
      return {
        name: RUNS.length > 1 ? `${run.name}: ${label}` : label,
        color: runColor(i),
        dash: j ? [5, 4] : undefined,
        thin: j > 0,
        points: weights && !inWeights(run) ? [] : pointsOf(run, key),
      };
    }),
  );
  return chart(title, series, { legend: true, xLabel: "step" });
}

function runsTable() {
  const heads = "run,weights,loss,last step,last loss,held-out nll: first,last,ESS: last";
  const rows = RUNS.map((run, i) => [
    named(run.name, runColor(i)),
    run.config["loss.weights.name"],
    run.config["loss.divergence"],
    format(pointsOf(run, "loss").at(-1)?.[0]),
    format(last(run, "loss")),
    format(first(run, "eval/nll")),
    ...["eval/nll", "weights/ess", "tokens_seen", "time/step_seconds"].map((key) =>
      format(last(run, key)),
    ),
  ]);
  return table([...heads.split(","), "tokens seen", "s / step"], rows);
}

// Where the wall time of a run went, over all its starts.
function goodputTable() {
  const heads = "run,starts,goodput,steps that count: s,start-up,evaluation,saves";
  const parts = ["productive", "startup", "eval", "save", "lost", "wall"];
  const rows = RUNS.flatMap((run, i) =>
    run.goodput
      ? [
          [
            named(run.name, runColor(i)),
            format(run.goodput.starts),
            `${format(100 * run.goodput.goodput)} %`,
            ...parts.map((part) => format(run.goodput.seconds[part])),
          ],
        ]
      : [],
  );
  return table([...heads.split(","), "steps done again", "in all"], rows);
}

// The traces of most and of least weight in the last step that was logged.
function weighedTable() {
  const list = (traces) => traces.map(([id, weight]) => `${id}: ${format(weight)}`).join(", ");
  const rows = RUNS.flatMap((run, i) =>
    run.weighed?.most
      ? [
          [
            named(run.name, runColor(i)),
            format(run.weighed.step),
            list(run.weighed.most),
            list(run.weighed.least),
          ],
        ]
      : [],
  );
  return table(["run", "step", "traces of most weight", "traces of least weight"], rows, "wide");
}

// ---------------------------------------------------------------- accuracy

const ACCURACY = {
  problems: ["problems", format],
  correct: ["correct", format],
  accuracy: ["accuracy", percent],
  no_answer: ["no answer", percent],
  truncated: ["cut off", percent],
  tokens: ["tokens", format],
};

// Teacher, start, then the runs as they are listed, then whatever else there is, with its colour.
function ordered(result) {
  const rank = (name) =>
    ({ teacher: -2, start: -1 })[name] ?? result.runs[name] ?? RUNS.length;
  return Object.entries(result.models)
    .sort(([a], [b]) => rank(a) - rank(b))
    .map(([name, row], place) => [name, row, modelColor(name, place, result)]);
}

const span = (low, high, of = percent) => (known(low) ? `${of(low)} to ${of(high)}` : ABSENT);
const signed = (x) => (x > 0 ? "+" : "") + percent(x);

function accuracy(result) {
  const models = ordered(result);
  const keys = Object.keys(ACCURACY).filter((key) => models.some(([, row]) => known(row[key])));
  const minus = `minus ${result.baseline}, paired 95 %`;
  const heads = keys.flatMap((key) =>
    key === "accuracy" ? ["accuracy", "95 % interval", "", minus] : [ACCURACY[key][0]],
  );
  const change = (row) => span(row.difference_low, row.difference_high, signed);
  const cells = (key, row, color) => {
    const cell = ACCURACY[key][1](row[key]);
    if (key !== "accuracy") return [cell];
    const paired = known(row.difference) ? `${signed(row.difference)} (${change(row)})` : ABSENT;
    return [cell, span(row.low, row.high), el("td", {}, intervalBar(row, color)), paired];
  };
  const rows = models.map(([name, row, color]) => [
    named(name, color),
    ...keys.flatMap((key) => cells(key, row, color)),
  ]);
  return [
    result.set && el("h3", { text: result.set }),
    el("p", { class: "dim", text: result.source }),
    table(["model", ...heads], rows),
    detailTables(models),
  ];
}

// Accuracy from 0 to 1 as a point on its interval.
function intervalBar(row, color) {
  const at = (x) => `${100 * x}%`;
  const style = { background: `var(${color})`, left: at(row.low), width: at(row.high - row.low) };
  return el(
    "div",
    { class: "interval", role: "img", "aria-label": `accuracy ${percent(row.accuracy)}` },
    known(row.low) && el("i", { style }),
    known(row.accuracy) && el("b", { style: { ...style, left: at(row.accuracy), width: "" } }),
  );
}

// Where results hold details: pass@k and maj@k, accuracy by length and difficulty, defects.
function detailTables(models) {
  const whole = ([mean, low, high]) => `${percent(mean)} (${span(low, high)})`;
  const parts = [];
  const add = (title, heads, rowsOf) => {
    const rows = models.flatMap(([name, { details }, color]) =>
      details ? rowsOf(details).map((row) => [named(name, color), ...row]) : [],
    );
    if (rows.length) parts.push(el("h3", { text: title }), table(["model", ...heads], rows));
  };
  const ks = (own) => Object.keys(own.pass_at_k || {});
  add("pass@k and maj@k (95 %)", ["k", "pass@k", "maj@k"], (own) =>
    ks(own).length < 2
      ? []
      : ks(own).map((k) => [k, whole(own.pass_at_k[k]), whole(own.maj_at_k[k])]),
  );
  add("By difficulty", ["difficulty", "problems", "accuracy (95 %)"], (own) =>
    (own.by_difficulty || []).map((at) => [
      at.difficulty,
      format(at.problems),
      whole([at.accuracy, at.low, at.high]),
    ]),
  );
  add("By length of the answer", ["tokens", "answers", "accuracy"], (own) =>
    (own.by_length || []).map((at) => [
      `${at.from} to ${at.to}`,
      format(at.answers),
      percent(at.accuracy),
    ]),
  );
  const defects = { no_answer: "no answer", truncated: "cut off", loops: "repetition loops" };
  defects.ungradable = "not gradable";
  add("Defects, share of the answers", Object.values(defects), (own) =>
    own.degenerate ? [Object.keys(defects).map((key) => percent(own.degenerate[key]))] : [],
  );
  if (!parts.length) return null;
  return el("details", {}, el("summary", { text: "details of the answers" }), ...parts);
}

// ---------------------------------------------------------------- weights

const BUCKETS = [
  ...new Set(RUNS.flatMap((run) => run.positions.flatMap((at) => at.first))),
].sort((a, b) => a - b);

function positionChart() {
  const series = RUNS.flatMap((run, i) =>
    (inWeights(run) ? run.positions : []).map((at, j) => {
      const newest = j === run.positions.length - 1;
      return {
        name: `${run.name}, step ${at.step}`,
        color: runColor(i),
        thin: !newest,
        dash: newest ? undefined : [[2, 3], [5, 4]][j],
        points: at.first.map((start, k) => [BUCKETS.indexOf(start), at.values[k]]),
      };
    }),
  );
  return chart("Mean weight by position in the completion", series, {
    legend: true,
    xLabel: "first token of the bucket",
    buckets: true,
    xText: (k) => String(BUCKETS[k] ?? ""),
    xName: "from token",
    note: "before the batch normalisation",
  });
}

function histogramChart() {
  const having = RUNS.filter((run) => run.histogram && inWeights(run));
  const series = having.map((run) => {
    const { edges, counts, tokens, mean, ess } = run.histogram;
    const shares = [...counts, counts.at(-1)].map((count) => (count ? count / tokens : null));
    return {
      name: `${run.name}: mean ${format(mean)}, ESS ${format(ess)}`,
      color: runColor(RUNS.indexOf(run)),
      step: true,
      points: edges.map((edge, k) => [edge, shares[k]]),
    };
  });
  const sizes = having.map(({ histogram: h }) => `${format(h.tokens)} tokens of ${h.traces} traces`);
  const about = "share of tokens in a bin, log scale; a gap is an empty bin";
  return chart("Weight distribution", series, {
    legend: true,
    logY: true,
    fractions: true,
    xLabel: "weight before the batch normalisation",
    xName: "bin from",
    yText: (y) => `${Number((100 * y).toPrecision(3))} %`,
    note: [about, ...new Set(sizes)].join("; "),
  });
}

// ---------------------------------------------------------------- drift

function driftCharts(result) {
  const options = { legend: true, xLabel: "generated tokens", xName: "token" };
  // Of the teacher's own text: dashed. Bands only where the curve stands alone.
  const curves = (label, pick, { banded, dashed, whole } = {}) =>
    ordered(result).map(([name, row, color]) => {
      const lengths = row.lengths.filter((n) => whole || n <= row.reach);
      const { value, low, high } = pick(row);
      return {
        name: label ? `${name}: ${label}` : name,
        color,
        points: lengths.map((n, k) => [n, value[k]]),
        band: banded ? lengths.map((n, k) => [n, low[k], high[k]]) : undefined,
        dash: dashed ? [5, 4] : undefined,
        thin: dashed,
      };
    });
  const pair = (title, [own, ownLabel], [teachers, label], more) =>
    chart(
      title,
      [...curves(ownLabel, own, more), ...curves(label, teachers, { ...more, dashed: true })],
      { ...options, ...more },
    );
  return [
    chart("ExAccErr: excess of accumulated error", curves("", (row) => row.excess, { banded: true }), {
      ...options,
      yText: (y) => `${format(y)} %`,
    }),
    pair(
      "Accumulated KL(teacher‖student), nats",
      [(row) => row.accumulated, "own sequences (R)"],
      [(row) => row.reference, "teacher's (E)"],
    ),
    pair(
      "Mean log q − log p by position",
      [(row) => row.log_ratio.student, "own sequences"],
      [(row) => row.log_ratio.teacher, "teacher's"],
    ),
    pair(
      "Sequences alive",
      [(row) => ({ value: row.student_alive }), "own"],
      [(row) => ({ value: row.teacher_alive }), "teacher's"],
      { whole: true, zero: true },
    ),
  ];
}

function drift(result) {
  const about = [
    `${result.source}: teacher ${result.teacher}`,
    `${result.prompts} prompts × ${result.samples} samples`,
    `curves end where fewer than ${result.least} sequences of either set are alive`,
    "bands are 95 % bootstrap intervals over prompts",
  ];
  const reach = Math.min(...Object.values(result.models).map((row) => row.reach));
  const share = (x) => `${x.toFixed(1)} %`;
  const rows = ordered(result).map(([name, row, color]) => {
    const k = row.lengths.filter((n) => n <= reach).length - 1;
    const at = (curve, of) => (known(curve?.value[k]) ? of(curve.value[k]) : ABSENT);
    const interval = (curve) => span(curve.low[k], curve.high[k], share);
    const change = at(row.difference, (x) => `${share(x)} (${interval(row.difference)})`);
    return [
      named(name, color),
      format(row.lengths[k]),
      at(row.accumulated, format),
      at(row.reference, format),
      at(row.excess, share),
      interval(row.excess),
      change,
    ];
  });
  const heads = ["model", "tokens", "R (nats)", "E (nats)", "ExAccErr", "95 % interval"];
  return [
    el("p", { class: "dim", text: about.join("; ") }),
    table([...heads, `minus ${result.baseline}, paired 95 %`], rows),
    grid(driftCharts(result)),
  ];
}
