"use strict";
// Elements, numbers and charts (by uPlot). Text reaches the page as text nodes only.

const ABSENT = "–";
const known = (x) => x !== null && x !== undefined && Number.isFinite(x);

function el(name, options = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "text") node.textContent = value;
    else if (key === "style") Object.assign(node.style, value);
    else if (value !== "") node.setAttribute(key, value);
  }
  node.append(...children.filter(Boolean));
  return node;
}

function format(x) {
  if (!known(x)) return ABSENT;
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return x.toExponential(2).replace("e+", "e");
  if (size >= 1000)
    return x.toLocaleString("en-US", { maximumFractionDigits: size >= 1e4 ? 0 : 1 });
  return String(Number(x.toPrecision(4)));
}

const percent = (x, digits = 1) => (known(x) ? `${(100 * x).toFixed(digits)} %` : ABSENT);

function tickText(x) {
  const size = Math.abs(x);
  const unit = Object.entries({ G: 1e9, M: 1e6, k: 1e3 }).find(([, value]) => size >= value);
  if (size >= 1e4) return Number((x / unit[1]).toPrecision(4)) + unit[0];
  return size && size < 1e-3
    ? x.toExponential().replace("e+", "e")
    : String(Number(x.toPrecision(6)));
}

function showTip(text, x, y) {
  const tip = document.getElementById("tip");
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const beside = (at, size, end) => Math.max(at + 14 + size > end ? at - 14 - size : at + 14, 4);
  tip.style.left = `${beside(x, width, innerWidth)}px`;
  tip.style.top = `${beside(y, height, innerHeight)}px`;
}

const hideTip = () => (document.getElementById("tip").hidden = true);

// ---------------------------------------------------------------- charts

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const FONT = "11px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif";
const WHOLE = [...Array(12).keys()].flatMap((e) => [1, 2, 5].map((m) => m * 10 ** e));
const pending = []; // a chart has a width only when the page is put together
const charts = [];

// Limits of an axis. robust: one slow first step must not flatten the rest, so values far above
// the others are cut off and counted.
function limits(values, { zero = false, robust = false }) {
  const sorted = values.filter(known).sort((a, b) => a - b);
  const largest = sorted[sorted.length - 1];
  let [low, high] = [sorted[0], largest];
  const typical = sorted[Math.floor(0.9 * (sorted.length - 1))];
  if (robust && sorted.length >= 10 && typical > 0 && high > 3 * typical) high = 1.2 * typical;
  const above = sorted.filter((x) => x > high).length;
  if (zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05;
  const cut = above ? `${above} above the frame, up to ${format(largest)}` : "";
  const bottom = low === 0 && (zero || high > 0) ? 0 : low - pad;
  return { range: [bottom, high === 0 && low < 0 ? 0 : high + pad], cut };
}

// A figure with one chart, or null where no series has a value.
// series: [{name, color, points: [[x, y]], band: [[x, low, high]], dash, thin, step}]; y null: a gap.
// options: legend, note, zero, robust, logY, fractions and buckets (of the x axis, whole numbers
// without), xLabel, xName, xText, yText.
function chart(title, series, options = {}) {
  const present = series.filter((one) => one.points.some(([, y]) => known(y)));
  if (!present.length) return null;
  const columns = (rows, width) =>
    [...Array(width).keys()].map((i) => rows.map((row) => row[i] ?? null));
  const tables = present.flatMap((one) =>
    one.band ? [columns(one.points, 2), columns(one.band, 3)] : [columns(one.points, 2)],
  );
  const data = uPlot.join(tables);
  const { range, cut } = limits(data.slice(1).flat(), options);
  const note = [options.note, cut].filter(Boolean).join("; ");
  const holder = el("div");
  pending.push(() => {
    const plot = new uPlot(settings(present, data, range, options, holder), data, holder);
    charts.push(plot);
    const fit = () => plot.setSize({ width: holder.clientWidth, height: plot.height });
    new ResizeObserver(() => requestAnimationFrame(fit)).observe(holder);
  });
  return el(
    "figure",
    { class: "chart" },
    el("h3", { text: title }),
    holder,
    note && el("p", { class: "note", text: note }),
  );
}

function settings(present, data, range, options, holder) {
  const lines = [{}];
  const bands = [];
  const shown = []; // [series of the chart, its place in the data]
  for (const one of present) {
    shown.push([one, lines.length]);
    lines.push({
      label: one.name,
      stroke: () => css(one.color),
      width: one.thin ? 1.3 : 2,
      dash: one.dash,
      paths: one.step ? uPlot.paths.stepped({ align: 1 }) : undefined,
      points: one.step ? { show: false } : { size: 6, fill: () => css(one.color) },
    });
    if (!one.band) continue;
    bands.push({
      series: [lines.length + 1, lines.length],
      fill: () => `${css(one.color)}2e`,
    });
    for (const label of ["low", "high"])
      lines.push({ label, class: "bound", stroke: "transparent", points: { show: false } });
  }
  const ink = { stroke: () => css("--dim"), font: FONT, labelFont: FONT };
  const grid = { stroke: () => css("--line"), width: 1 };
  const xAxis = {
    ...ink,
    grid: { show: false },
    ticks: { ...grid, size: 4 },
    size: 26,
    space: options.buckets ? 20 : 60,
    incrs: options.buckets ? [1] : options.fractions ? undefined : WHOLE,
    label: options.xLabel,
    labelSize: 18,
    values: (_, values) => values.map(options.xText || tickText),
  };
  const yText = options.yText || tickText;
  const yAxis = {
    ...ink,
    grid,
    ticks: { show: false },
    size: 52,
    space: 32,
    gap: 4,
    values: (_, values) => values.map((y) => (y === null ? "" : yText(y))),
  };
  const wide = (_, low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]);
  const marks = (plot, i) => `var(${shown.find(([, place]) => place === i)?.[0].color})`;
  const dashes = (plot, i) => (lines[i].dash ? "dashed" : "solid");
  // A click in the legend hides a line: its band goes with it.
  const hide = (plot, i, { show }) => {
    const banded = shown.some(([one, place]) => place === i && one.band);
    if (banded && show !== undefined) for (const k of [1, 2]) plot.setSeries(i + k, { show });
  };
  return {
    width: holder.clientWidth,
    height: 220,
    series: lines,
    bands,
    scales: { x: { time: false, range: wide }, y: options.logY ? { distr: 3 } : { range: () => range } },
    axes: [xAxis, yAxis],
    legend: {
      show: Boolean(options.legend),
      live: false,
      markers: { width: 2, stroke: marks, fill: () => "transparent", dash: dashes },
    },
    cursor: { y: false, points: { size: 7 } },
    hooks: { setCursor: [(plot) => tell(plot, shown, data, options)], setSeries: [hide] },
  };
}

// The values at the cursor, beside it; with its interval where a series has a band.
function tell(plot, shown, data, options) {
  const i = plot.cursor.idx;
  if (!known(i) || plot.cursor.left < 0) return hideTip();
  const [at, yText] = [data[0][i], options.yText || format];
  const lines = [`${options.xName || "step"} ${(options.xText || format)(at)}`];
  for (const [one, place] of shown) {
    if (data[place][i] === undefined || !plot.series[place].show) continue;
    const [low, high] = one.band ? [data[place + 1][i], data[place + 2][i]] : [];
    const span = known(low) ? ` (${yText(low)} to ${yText(high)})` : "";
    lines.push(`${one.name}: ${known(data[place][i]) ? yText(data[place][i]) : ABSENT}${span}`);
  }
  const box = plot.over.getBoundingClientRect();
  return showTip(lines.join("\n"), box.left + plot.cursor.left, box.top + plot.cursor.top);
}
