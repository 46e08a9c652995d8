// Settings, the order of the page, and the start.

function settings() {
  const keys = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.config)))];
  const text = (value) =>
    value === undefined
      ? ABSENT
      : typeof value === "string"
        ? value || "(empty)"
        : JSON.stringify(value);
  const row = (key) => [
    key,
    ...DATA.runs.map((run) => el("td", { class: "wide", text: text(run.config[key]) })),
  ];
  const heads = ["key", ...DATA.runs.map((run) => run.name)];
  const differ = keys.filter(
    (key) => new Set(DATA.runs.map((run) => text(run.config[key]))).size > 1,
  );
  const all = el(
    "details",
    {},
    el("summary", { text: `all ${keys.length} settings` }),
    table(heads, keys.map(row), "wide"),
  );
  if (DATA.runs.length < 2) return [all];
  return [
    el("p", { class: "dim", text: "Where the runs differ:" }),
    table(heads, differ.map(row), "wide"),
    all,
  ];
}

function prefixed(prefix) {
  const keys = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.series)))].sort();
  return keys.filter((key) => key.startsWith(prefix) && !drawn.has(key));
}

const ABOUT_WEIGHTS = [
  "Weights are those of the train step before the batch normalisation.",
  "The effective sample size is 1 where all weights are equal.",
  weighing.length && weighing.length < DATA.runs.length
    ? "Runs with uniform weights, all 1, are left out."
    : "",
].join(" ");

const ABOUT_DRIFT = [
  "ExAccErr(l) = 100 (R(l) − E(l)) / E(l): how much more error the student gathers",
  "on text of its own than on the teacher's.",
].join(" ");

const ABOUT_TIME = DATA.runs.some((run) => run.goodput)
  ? "Goodput is the share of wall time, over all starts of a run, in steps that were not done again."
  : "";

function main() {
  document.getElementById("about").textContent = DATA.about;
  DATA.runs.forEach((run, i) => {
    const dot = el("span", { text: "●" });
    dot.style.color = runColor(i);
    document
      .getElementById("legend")
      .append(el("span", {}, dot, document.createTextNode(run.name)));
  });
  section("Runs", "", runsTable(), ...DATA.notes.map((text) => el("p", { class: "dim", text })));
  section("Accuracy", "", ...DATA.evaluations.flatMap(accuracy));
  section(
    "Loss",
    "",
    grid(
      metric("loss", "Training loss (weighted)"),
      metric("nll", "Training nll per token"),
      metric("eval/nll", "Held-out nll per token"),
      metric("eval/loss", "Held-out loss (weighted)"),
      metric("divergence", "Divergence from the teacher"),
      metric("grad_norm", "Gradient norm", { robust: true }),
      metric("learning_rate", "Learning rate", { zero: true }),
    ),
  );
  section(
    "Weights",
    ABOUT_WEIGHTS,
    grid(
      metric("weights/mean", "Mean weight, band from 5 % to 95 % of the tokens", {
        band: ["weights/q05", "weights/q95"],
        weights: true,
      }),
      metric("weights/ess", "Effective sample size, share of the tokens", { weights: true }),
      histogramChart(),
      positionChart(),
      pairOf(
        [
          ["weights/confident_mass", "share of the weight"],
          ["weights/confident_tokens", "share of the tokens"],
        ],
        "On tokens with q > 0.9",
      ),
      metric("weights/log_ratio", "Mean log q − log p of the trace tokens"),
      pairOf(
        [
          ["weights/saturated_low", "below 0.01"],
          ["weights/saturated_high", "above 0.99"],
        ],
        "Saturated weights, share of the tokens",
        { weights: true },
      ),
      prefixed("weights/").map((key) => metric(key, key, { weights: true })),
    ),
  );
  section("Drift", ABOUT_DRIFT, ...DATA.drifts.flatMap(drift));
  section("Traces", "", traces());
  section(
    "Time",
    ABOUT_TIME,
    goodputTable(),
    grid(prefixed("time/").map((key) => metric(key, key, { robust: true, zero: true }))),
  );
  section("Other metrics", "", grid(prefixed("").map((key) => metric(key, key))));
  section("Settings", "", ...settings());
  pending.forEach((draw) => draw()); // at once: also on a page that is printed and never shown
}

main();
