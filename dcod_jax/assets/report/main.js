// Settings, the order of the page, and the start.

function section(title, about, ...nodes) {
  const present = nodes.filter(Boolean);
  if (!present.length) return;
  const dim = about && el("p", { class: "dim", text: about });
  document.getElementById("main").append(el("section", {}, el("h2", { text: title }), dim, ...present));
}

function grid(figures) {
  const present = figures.filter(Boolean);
  const kind = present.length === 4 ? "grid four" : "grid";
  return present.length ? el("div", { class: kind }, ...present) : null;
}

function settingsTables() {
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.config)))];
  const text = (value) => {
    if (typeof value === "string") return value || "(empty)";
    return value === undefined ? ABSENT : JSON.stringify(value);
  };
  const values = (key) => RUNS.map((run) => text(run.config[key]));
  const heads = ["key", ...RUNS.map((run) => run.name)];
  const of = (some) =>
    table(
      heads,
      some.map((key) => [key, ...values(key)]),
      "wide",
    );
  const differ = of(keys.filter((key) => new Set(values(key)).size > 1));
  const all = el("details", {}, el("summary", { text: `all ${keys.length} settings` }), of(keys));
  return [differ && el("p", { class: "dim", text: "Where the runs differ:" }), differ, all];
}

const TITLES = {
  "weights/q50": "Median weight",
  "weights/std": "Standard deviation of the weights",
  "weights/traces": "Traces in a batch",
  "weights/temperature": "Temperature of the weights",
  "time/elapsed_seconds": "Seconds since the start",
  "time/goodput": "Share of the time in steps that count",
  "time/step_seconds": "Seconds a step",
  "time/data_wait_seconds": "Of a step: waiting for the batch",
  "time/dispatch_seconds": "Of a step: starting it",
  "time/device_seconds": "Of a step: waiting for the devices",
  "time/eval_seconds": "Seconds of evaluation since the line before",
  "time/save_seconds": "Seconds of saves since the line before",
  "time/tokens_per_second": "Tokens a second",
  "time/mfu": "Share of the device's peak",
};

function remaining(prefix, options) {
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.series)))].sort();
  const left = keys.filter((key) => key.startsWith(prefix) && !drawn.has(key));
  return left.map((key) => metric(key, TITLES[key] ? `${TITLES[key]} (${key})` : key, options));
}

const ABOUT_RUNS = "Drag over a chart to zoom in, double-click to see all of it again.";
const ABOUT_WEIGHTS = [
  "Weights are those of the train step before the batch normalisation.",
  "The effective sample size is 1 where all weights are equal.",
  weighing.length && weighing.length < RUNS.length
    ? "Runs with uniform weights, all 1, are left out."
    : "",
].join(" ");
const ABOUT_DRIFT =
  "ExAccErr(l) = 100 (R(l) − E(l)) / E(l): how much more error the student gathers " +
  "on text of its own than on the teacher's.";
const ABOUT_TIME = RUNS.some((run) => run.goodput)
  ? "Goodput is the share of wall time, over all starts of a run, in steps that were not done again."
  : "";

function main() {
  document.getElementById("about").textContent = DATA.about;
  const legend = document.getElementById("legend");
  legend.append(...RUNS.map((run, i) => named(run.name, runColor(i), "span")));
  section("Runs", ABOUT_RUNS, runsTable(), ...DATA.notes.map((text) => el("p", { class: "dim", text })));
  const asked = metric("eval/accuracy", "Held-out accuracy while training, band: 95 % interval", {
    band: ["eval/accuracy_low", "eval/accuracy_high"],
  });
  section("Accuracy", "", grid([asked]), ...DATA.evaluations.flatMap(accuracy));
  section(
    "Loss",
    "",
    grid([
      metric("loss", "Training loss (weighted)"),
      metric("nll", "Training nll per token"),
      metric("eval/nll", "Held-out nll per token"),
      metric("eval/loss", "Held-out loss (weighted)"),
      metric("divergence", "Divergence from the teacher"),
      metric("grad_norm", "Gradient norm", { robust: true }),
      metric("learning_rate", "Learning rate", { zero: true }),
    ]),
  );
  section(
    "Weights",
    ABOUT_WEIGHTS,
    grid([
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
      metric("weights/traces_effective", "Effective number of traces in a batch", { weights: true }),
      ...remaining("weights/", { weights: true }),
      ...remaining("tokens/", { weights: true }),
    ]),
    weighedTable(),
  );
  section("Drift", ABOUT_DRIFT, ...DATA.drifts.flatMap(drift));
  section("Traces", "", traces());
  section(
    "Time",
    ABOUT_TIME,
    goodputTable(),
    grid(remaining("time/", { robust: true, zero: true })),
  );
  section("Other metrics", "", grid(remaining("")));
  section("Settings", "", ...settingsTables());
  pending.forEach((draw) => draw());
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => charts.forEach((plot) => plot.redraw()));
}

main();
