"use strict";
// Charts as SVG. Text reaches the page as text nodes only: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";
const ABSENT = "–";

function el(name, options = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "text") node.textContent = value;
    else if (key === "class") node.className = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function svg(name, attributes = {}, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "color") node.style.stroke = value;
    else if (key === "fillColor") node.style.fill = value;
    else node.setAttribute(key, value);
  }
  if (text !== undefined) node.textContent = text;
  return node;
}

const known = (x) => x !== null && x !== undefined && Number.isFinite(x);

function format(x) {
  if (!known(x)) return ABSENT;
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return x.toExponential(2).replace("e+", "e");
  if (size >= 1000)
    return x.toLocaleString("en-US", { maximumFractionDigits: size >= 1e4 ? 0 : 1 });
  return String(Number(x.toPrecision(4)));
}

function percent(x, digits = 1) {
  return known(x) ? `${(100 * x).toFixed(digits)} %` : ABSENT;
}

function tickStep(low, high, count) {
  const raw = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= raw * 0.999);
}

function ticks(low, high, count) {
  const step = tickStep(low, high, count);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.ceil(Math.log10(low) - 1e-9); e <= Math.log10(high) + 1e-9; e++)
    found.push(10 ** e);
  return found;
}

function tickText(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e4) {
    const [unit, name] = size >= 1e9 ? [1e9, "G"] : size >= 1e6 ? [1e6, "M"] : [1e3, "k"];
    return `${Number((x / unit).toPrecision(4))}${name}`;
  }
  return size < 1e-3 ? x.toExponential().replace("e+", "e") : String(Number(x.toPrecision(6)));
}

// ---------------------------------------------------------------- tip

function showTip(text, event) {
  const tip = document.getElementById("tip");
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left =
    event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
  const top =
    event.clientY + 14 + height > innerHeight ? event.clientY - 14 - height : event.clientY + 14;
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${Math.max(top, 4)}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

// ---------------------------------------------------------------- ranges

// One slow first step must not flatten the rest: far outliers are cut off and counted in the note.
function range(values, { zero = false, robust = false } = {}) {
  const sorted = values.filter(known).sort((a, b) => a - b);
  let [low, high] = [sorted[0], sorted[sorted.length - 1]];
  let above = 0;
  if (robust && sorted.length >= 10) {
    const typical = sorted[Math.floor(0.9 * (sorted.length - 1))];
    if (typical > 0 && high > 3 * typical) {
      high = 1.2 * typical;
      above = sorted.filter((x) => x > high).length;
    }
  }
  if (zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) {
    const pad = Math.abs(low) * 0.1 || 1;
    [low, high] = [zero && low === 0 ? 0 : low - pad, high + pad];
  } else {
    const pad = (high - low) * 0.05;
    [low, high] = [low === 0 ? 0 : low - pad, high === 0 ? 0 : high + pad];
  }
  return { low, high, above, largest: sorted[sorted.length - 1] };
}

// ---------------------------------------------------------------- the chart

// Charts that wait for the page to be put together: only then they have a width.
const pending = [];

// series: [{name, color, dash, step, points: [[x, y]], band: [[x, low, high]]}]; y null: a gap.
// Returns nothing drawn (null) where no series has a value.
function chart(settings) {
  const series = settings.series.filter((one) => one.points.some(([, y]) => known(y)));
  if (!series.length) return null;
  const box = el("figure", { class: "chart" });
  box.style.margin = 0;
  box.append(el("h3", { text: settings.title }));
  if (settings.legend) box.append(legend(series));
  const holder = el("div");
  box.append(holder);
  const note = el("p", { class: "note" });
  box.append(note);
  const draw = () => drawChart(holder, note, series, settings);
  pending.push(draw);
  new ResizeObserver(() => requestAnimationFrame(draw)).observe(holder);
  return box;
}

function legend(series) {
  const line = el("div", { class: "legend" });
  for (const one of series) {
    const sample = svg("svg", { width: 22, height: 10, "aria-hidden": "true" });
    sample.style.width = "22px";
    sample.append(svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, color: one.color, ...stroke(one) }));
    line.append(el("span", {}, sample, document.createTextNode(one.name)));
  }
  return line;
}

function stroke(one) {
  const style = { "stroke-width": one.thin ? 1.3 : 2, fill: "none", "stroke-linejoin": "round" };
  if (one.dash) style["stroke-dasharray"] = one.dash;
  return style;
}

function scales(series, settings, width, height) {
  const xs = series.flatMap((one) => one.points.map(([x]) => x));
  const ys = series.flatMap((one) => one.points.map(([, y]) => y));
  const bands = series.flatMap((one) => (one.band || []).flatMap(([, low, high]) => [low, high]));
  const left = 52,
    right = 14,
    top = 8,
    bottom = settings.xLabel ? 36 : 22;
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  if (x0 === x1) [x0, x1] = [x0 - 0.5, x1 + 0.5];
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const inner = height - top - bottom;
  let y, yTicks, extent;
  if (settings.logY) {
    const positive = ys.filter((v) => known(v) && v > 0);
    const low = 10 ** Math.floor(Math.log10(Math.min(...positive)));
    const high = 10 ** Math.ceil(Math.log10(Math.max(...positive)) - 1e-9);
    extent = { low, high: high > low ? high : low * 10, above: 0 };
    const span = Math.log10(extent.high / low);
    y = (value) => top + inner * (1 - Math.max(0, Math.log10(Math.max(value, low) / low) / span));
    yTicks = logTicks(low, extent.high);
  } else {
    extent = range([...ys, ...bands], settings);
    const { low, high } = extent;
    y = (value) => top + inner * (1 - (Math.min(value, high) - low) / (high - low));
    yTicks = ticks(low, high, Math.max(3, Math.round(inner / 32)));
  }
  const places =
    settings.xTicks || ticks(x0, x1, Math.max(2, Math.round((width - left - right) / 75)));
  const xTicks = settings.xInteger ? places.filter(Number.isInteger) : places;
  return {
    x,
    y,
    xTicks,
    yTicks,
    extent,
    frame: { left, right: width - right, top, bottom: height - bottom },
  };
}

function drawChart(holder, note, series, settings) {
  const width = holder.clientWidth;
  if (!width || holder.drawn === width) return;
  holder.drawn = width;
  const height = settings.height || 210;
  const scale = scales(series, settings, width, height);
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    "aria-label": settings.title,
  });
  drawAxes(picture, scale, settings, width, height);
  for (const one of series) if (one.band) drawBand(picture, one, scale);
  for (const one of series) drawLine(picture, one, scale);
  addHover(picture, series, scale, settings);
  holder.replaceChildren(picture);
  const cut = scale.extent.above
    ? `${scale.extent.above} above the frame, up to ${format(scale.extent.largest)}`
    : "";
  note.textContent = [settings.note, cut].filter(Boolean).join("; ");
}

function drawAxes(picture, scale, settings, width, height) {
  const { left, right, top, bottom } = scale.frame;
  for (const value of scale.yTicks) {
    const y = scale.y(value);
    picture.append(svg("line", { x1: left, x2: right, y1: y, y2: y, class: "axis" }));
    const text = settings.yText ? settings.yText(value) : tickText(value);
    picture.append(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, text));
  }
  picture.append(svg("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" }));
  for (const value of scale.xTicks) {
    const text = settings.xText ? settings.xText(value) : tickText(value);
    const anchor = scale.x(value) > right - 12 ? "end" : "middle";
    picture.append(svg("text", { x: scale.x(value), y: bottom + 15, "text-anchor": anchor }, text));
  }
  if (settings.xLabel) {
    const middle = (left + right) / 2;
    picture.append(
      svg("text", { x: middle, y: height - 4, "text-anchor": "middle" }, settings.xLabel),
    );
  }
}

function runsOf(points, usable) {
  const runs = [];
  let open = null;
  for (const point of points) {
    if (!usable(point)) open = null;
    else if (open) open.push(point);
    else runs.push((open = [point]));
  }
  return runs;
}

function drawLine(picture, one, scale) {
  for (const run of runsOf(one.points, ([, y]) => known(y))) {
    let path = "";
    run.forEach(([x, y], i) => {
      const [px, py] = [scale.x(x).toFixed(1), scale.y(y).toFixed(1)];
      path += i === 0 ? `M${px} ${py}` : one.step ? `H${px}V${py}` : `L${px} ${py}`;
    });
    picture.append(svg("path", { d: path, color: one.color, ...stroke(one) }));
    if (run.length === 1 || one.dots) {
      for (const [x, y] of run) {
        picture.append(
          svg("circle", { cx: scale.x(x), cy: scale.y(y), r: 3, fillColor: one.color }),
        );
      }
    }
  }
}

function drawBand(picture, one, scale) {
  for (const run of runsOf(one.band, ([, low, high]) => known(low) && known(high))) {
    const upper = run.map(([x, , high]) => `${scale.x(x).toFixed(1)} ${scale.y(high).toFixed(1)}`);
    const lower = run
      .map(([x, low]) => `${scale.x(x).toFixed(1)} ${scale.y(low).toFixed(1)}`)
      .reverse();
    picture.append(
      svg("path", {
        d: `M${upper.join("L")}L${lower.join("L")}Z`,
        fillColor: one.color,
        "fill-opacity": 0.18,
      }),
    );
  }
}

function addHover(picture, series, scale, settings) {
  const { left, right, top, bottom } = scale.frame;
  const cross = svg("line", { y1: top, y2: bottom, class: "cross", visibility: "hidden" });
  const cover = svg("rect", {
    x: left,
    y: top,
    width: right - left,
    height: bottom - top,
    fill: "transparent",
  });
  const nearest = (points, px) =>
    points.reduce((best, point) =>
      Math.abs(scale.x(point[0]) - px) < Math.abs(scale.x(best[0]) - px) ? point : best,
    );
  cover.addEventListener("mousemove", (event) => {
    const px = event.clientX - picture.getBoundingClientRect().left;
    const at = nearest(
      series.flatMap((one) => one.points),
      px,
    )[0];
    cross.setAttribute("x1", scale.x(at));
    cross.setAttribute("x2", scale.x(at));
    cross.setAttribute("visibility", "visible");
    const lines = [
      `${settings.xName || "step"} ${settings.xText ? settings.xText(at) : format(at)}`,
    ];
    for (const one of series) {
      const point = one.points.find(([x]) => x === at);
      if (!point) continue;
      const band = (one.band || []).find(([x]) => x === at);
      const span = band && known(band[1]) ? ` (${format(band[1])} to ${format(band[2])})` : "";
      lines.push(
        `${one.name}: ${settings.yText ? settings.yText(point[1], true) : format(point[1])}${span}`,
      );
    }
    showTip(lines.join("\n"), event);
  });
  cover.addEventListener("mouseleave", () => {
    cross.setAttribute("visibility", "hidden");
    hideTip();
  });
  picture.append(cross, cover);
}
