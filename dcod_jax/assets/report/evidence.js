// Accuracy, weights and drift.

// ---------------------------------------------------------------- accuracy

const ACCURACY = {
  problems: ["problems", format],
  correct: ["correct", format],
  accuracy: ["accuracy", percent],
  no_answer: ["no answer", percent],
  truncated: ["cut off", percent],
  tokens: ["tokens", format],
};

// Teacher, start, then the runs as they are listed, then whatever else there is.
function ordered(result) {
  const rank = (name) =>
    name === "teacher" ? -2 : name === "start" ? -1 : (result.runs[name] ?? DATA.runs.length);
  return Object.entries(result.models).sort(([a], [b]) => rank(a) - rank(b));
}

function accuracy(result) {
  const models = ordered(result);
  const keys = Object.keys(ACCURACY).filter((key) => models.some(([, row]) => known(row[key])));
  const heads = ["model"];
  for (const key of keys) {
    heads.push(ACCURACY[key][0]);
    if (key === "accuracy")
      heads.push("95 % interval", "", `minus ${result.baseline}, paired 95 %`);
  }
  const rows = models.map(([name, row], place) => {
    const cells = [named(name, modelColor(name, place, result))];
    for (const key of keys) {
      cells.push(ACCURACY[key][1](row[key]));
      if (key === "accuracy") cells.push(...intervalCells(row, modelColor(name, place, result)));
    }
    return cells;
  });
  return [
    result.set ? el("h3", { text: result.set }) : null,
    el("p", { class: "dim", text: result.source }),
    table(heads, rows),
    ...detailTables(models, result),
  ].filter(Boolean);
}

// Where results hold details: pass@k and maj@k, accuracy by length and difficulty, defects.
function detailTables(models, result) {
  const having = models.filter(([, row]) => row.details);
  const span = ([mean, low, high]) => `${percent(mean)} (${percent(low)} to ${percent(high)})`;
  const tables = [];
  const add = (title, heads, rows) => {
    if (rows.length) tables.push(el("h3", { text: title }), table(heads, rows));
  };
  const each = (pick) => having.flatMap(([name, row], place) => pick(name, row.details, place));
  const cell = (name, place) => named(name, modelColor(name, place, result));
  const ks = (own) => Object.keys(own.pass_at_k || {});
  add(
    "pass@k and maj@k (95 %)",
    ["model", "k", "pass@k", "maj@k"],
    each((name, own, place) =>
      ks(own).length < 2
        ? []
        : ks(own).map((k) => [cell(name, place), k, span(own.pass_at_k[k]), span(own.maj_at_k[k])]),
    ),
  );
  add(
    "By difficulty",
    ["model", "difficulty", "problems", "accuracy (95 %)"],
    each((name, own, place) =>
      (own.by_difficulty || []).map((at) => [
        cell(name, place),
        at.difficulty,
        format(at.problems),
        span([at.accuracy, at.low, at.high]),
      ]),
    ),
  );
  add(
    "By length of the answer",
    ["model", "tokens", "answers", "accuracy"],
    each((name, own, place) =>
      (own.by_length || []).map((at) => [
        cell(name, place),
        `${at.from} to ${at.to}`,
        format(at.answers),
        percent(at.accuracy),
      ]),
    ),
  );
  add(
    "Defects, share of the answers",
    ["model", "no answer", "cut off", "repetition loops", "not gradable"],
    each((name, own, place) =>
      own.degenerate
        ? [
            [
              cell(name, place),
              ...["no_answer", "truncated", "loops", "ungradable"].map((key) =>
                percent(own.degenerate[key]),
              ),
            ],
          ]
        : [],
    ),
  );
  if (!tables.length) return [];
  return [el("details", {}, el("summary", { text: "details of the answers" }), ...tables)];
}

function intervalCells(row, color) {
  const span = known(row.low) ? `${percent(row.low)} to ${percent(row.high)}` : ABSENT;
  const bar = svg("svg", {
    width: 160,
    height: 14,
    role: "img",
    "aria-label": `accuracy ${percent(row.accuracy)}`,
  });
  bar.append(svg("line", { x1: 2, x2: 158, y1: 7, y2: 7, class: "axis" }));
  if (known(row.low)) {
    bar.append(
      svg("line", {
        x1: 2 + 156 * row.low,
        x2: 2 + 156 * row.high,
        y1: 7,
        y2: 7,
        color,
        "stroke-width": 3,
      }),
    );
  }
  if (known(row.accuracy))
    bar.append(svg("circle", { cx: 2 + 156 * row.accuracy, cy: 7, r: 4, fillColor: color }));
  const sign = (x) => (x > 0 ? "+" : "") + percent(x);
  const change = known(row.difference)
    ? `${sign(row.difference)} (${sign(row.difference_low)} to ${sign(row.difference_high)})`
    : ABSENT;
  return [span, el("td", {}, bar), change];
}

// ---------------------------------------------------------------- weights

function positionChart() {
  const series = DATA.runs.flatMap((run, i) =>
    (inWeights(run) ? run.positions : []).map((at, j) => ({
      name: `${run.name}, step ${at.step}`,
      color: runColor(i),
      thin: j < run.positions.length - 1,
      dash: j === run.positions.length - 1 ? "" : j ? "5 4" : "2 3",
      dots: true,
      points: at.first.map((start, k) => [BUCKETS.indexOf(start), at.values[k]]),
    })),
  );
  return chart({
    title: "Mean weight by position in the completion",
    series,
    legend: true,
    xLabel: "first token of the bucket",
    xTicks: BUCKETS.map((_, k) => k),
    xText: (k) => String(BUCKETS[k]),
    xName: "from token",
    note: "before the batch normalisation",
  });
}

const BUCKETS = [
  ...new Set(DATA.runs.flatMap((run) => run.positions.flatMap((at) => at.first))),
].sort((a, b) => a - b);

function histogramChart() {
  const series = DATA.runs.flatMap((run, i) => {
    const found = run.histogram;
    if (!found || !inWeights(run)) return [];
    const points = found.counts.map((count, k) => [
      found.edges[k],
      count ? count / found.tokens : null,
    ]);
    const end = found.edges[found.edges.length - 1];
    points.push([end, points[points.length - 1][1]]);
    return [
      {
        name: `${run.name}: mean ${format(found.mean)}, ESS ${format(found.ess)}`,
        color: runColor(i),
        step: true,
        points,
      },
    ];
  });
  const tokens = DATA.runs
    .filter(inWeights)
    .map((run) => run.histogram)
    .filter(Boolean)
    .map((h) => `${format(h.tokens)} tokens of ${h.traces} traces`);
  return chart({
    title: "Weight distribution",
    series,
    legend: true,
    logY: true,
    xLabel: "weight before the batch normalisation",
    xName: "bin from",
    yText: (y) => `${Number((100 * y).toPrecision(3))} %`,
    note: ["share of tokens in a bin, log scale; a gap is an empty bin", ...new Set(tokens)].join(
      "; ",
    ),
  });
}

// ---------------------------------------------------------------- drift

function driftCurve(result, pick, more = {}) {
  return ordered(result).map(([name, row], place) => {
    const count = row.lengths.filter((n) => n <= row.reach).length;
    const curve = pick(row);
    const at = (values) => row.lengths.slice(0, count).map((n, k) => [n, values[k]]);
    return {
      name: more.label ? `${name}: ${more.label}` : name,
      color: modelColor(name, place, result),
      points: at(curve.value),
      band: more.plain
        ? undefined
        : row.lengths.slice(0, count).map((n, k) => [n, curve.low[k], curve.high[k]]),
      dash: more.dash,
      thin: Boolean(more.dash),
    };
  });
}

function drift(result) {
  const options = { legend: true, xLabel: "generated tokens", xName: "token", xInteger: true };
  const about = [
    `teacher ${result.teacher}, ${result.prompts} prompts × ${result.samples} samples`,
    `curves end where fewer than ${result.least} sequences of either set are alive`,
    "bands are 95 % bootstrap intervals over prompts",
  ].join("; ");
  return [
    el("p", { class: "dim", text: `${result.source}: ${about}` }),
    driftTable(result),
    grid(
      chart({
        title: "ExAccErr: excess of accumulated error",
        series: driftCurve(result, (row) => row.excess),
        yText: (y) => `${format(y)} %`,
        ...options,
      }),
      chart({
        title: "Accumulated KL(teacher‖student), nats",
        ...options,
        series: [
          ...driftCurve(result, (row) => row.accumulated, {
            label: "own sequences (R)",
            plain: true,
          }),
          ...driftCurve(result, (row) => row.reference, {
            label: "teacher's (E)",
            dash: "5 4",
            plain: true,
          }),
        ],
      }),
      chart({
        title: "Mean log q − log p by position",
        ...options,
        series: [
          ...driftCurve(result, (row) => row.log_ratio.student, {
            label: "own sequences",
            plain: true,
          }),
          ...driftCurve(result, (row) => row.log_ratio.teacher, {
            label: "teacher's",
            dash: "5 4",
            plain: true,
          }),
        ],
      }),
      chart({
        title: "Sequences alive",
        ...options,
        zero: true,
        series: ordered(result).flatMap(([name, row], place) => [
          {
            name: `${name}: own`,
            color: modelColor(name, place, result),
            points: row.lengths.map((n, k) => [n, row.student_alive[k]]),
          },
          {
            name: `${name}: teacher's`,
            color: modelColor(name, place, result),
            dash: "5 4",
            thin: true,
            points: row.lengths.map((n, k) => [n, row.teacher_alive[k]]),
          },
        ]),
      }),
    ),
  ];
}

function driftTable(result) {
  const reach = Math.min(...Object.values(result.models).map((row) => row.reach));
  const span = (curve, k) =>
    known(curve.low[k]) ? `${curve.low[k].toFixed(1)} to ${curve.high[k].toFixed(1)} %` : ABSENT;
  const rows = ordered(result).map(([name, row], place) => {
    const k = row.lengths.filter((n) => n <= reach).length - 1;
    const at = (curve) => (k < 0 ? null : curve.value[k]);
    const change =
      row.difference && known(at(row.difference))
        ? `${at(row.difference).toFixed(1)} % (${span(row.difference, k)})`
        : ABSENT;
    return [
      named(name, modelColor(name, place, result)),
      format(k < 0 ? null : row.lengths[k]),
      format(at(row.accumulated)),
      format(at(row.reference)),
      known(at(row.excess)) ? `${at(row.excess).toFixed(1)} %` : ABSENT,
      k < 0 ? ABSENT : span(row.excess, k),
      change,
    ];
  });
  return table(
    [
      "model",
      "tokens",
      "R (nats)",
      "E (nats)",
      "ExAccErr",
      "95 % interval",
      `minus ${result.baseline}, paired 95 %`,
    ],
    rows,
  );
}
