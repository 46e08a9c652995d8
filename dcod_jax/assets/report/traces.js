// Traces, token by token: coloured by weight (or a log-prob), numbers on hover.

const SHADES = {
  weight: {
    label: "weight / mean weight",
    low: "0",
    middle: "1",
    high: "2 and more",
    value: (numbers, k, mean) =>
      numbers.weights && mean > 0 ? numbers.weights[k] / mean - 1 : null,
  },
  ratio: {
    label: "log q − log p",
    low: "−3",
    middle: "0",
    high: "+3",
    value: (numbers, k) => (numbers.teacher ? (numbers.student[k] - numbers.teacher[k]) / 3 : null),
  },
  student: {
    label: "student's log q",
    low: "−3 and less",
    middle: "0",
    high: "",
    value: (numbers, k) => numbers.student[k] / 3,
  },
};

function traces() {
  if (!DATA.traces.length) return null;
  const box = el("div");
  const pick = el("select", { "aria-label": "trace" });
  DATA.traces.forEach((trace, i) =>
    pick.append(el("option", { value: i, text: `${trace.split} ${i + 1}: ${trace.id}` })),
  );
  const shade = el("select", { "aria-label": "colour by" });
  for (const [key, one] of Object.entries(SHADES))
    shade.append(el("option", { value: key, text: `colour by ${one.label}` }));
  const before = el("button", { type: "button", text: "◀ previous" });
  const after = el("button", { type: "button", text: "next ▶" });
  const scale = el("span", { class: "scale" });
  const view = el("div");
  const draw = () => {
    const kind = SHADES[shade.value];
    scale.replaceChildren(kind.low, el("i"), kind.high);
    view.replaceChildren(
      ...DATA.traces[Number(pick.value)].runs.map((seen) =>
        traceOf(DATA.traces[Number(pick.value)], seen, kind),
      ),
    );
  };
  const move = (by) => {
    pick.value = String((Number(pick.value) + by + DATA.traces.length) % DATA.traces.length);
    draw();
  };
  before.addEventListener("click", () => move(-1));
  after.addEventListener("click", () => move(1));
  pick.addEventListener("change", draw);
  shade.addEventListener("change", draw);
  box.append(el("div", { class: "controls" }, before, pick, after, shade, scale), view);
  draw();
  return box;
}

function traceOf(trace, seen, kind) {
  const run = RUNS[seen.run];
  const mean = run.histogram ? run.histogram.mean : null;
  const box = el("div", { class: "trace" });
  const title = named(run.name, runColor(seen.run), "h3");
  box.append(title, el("p", { class: "dim", text: run.seen }));
  const body = el("div", { class: "tokens" });
  const entry = new Map(trace.completion.map((place, k) => [place, k]));
  const numbers = { teacher: trace.teacher, student: seen.student, weights: seen.weights };
  trace.texts.forEach((text, place) => {
    const shown = text.replaceAll("\n", "↵\n");
    if (!entry.has(place)) {
      body.append(el("span", { class: "prompt", text: shown }));
      return;
    }
    const token = el("span", { class: "token", text: shown });
    token.dataset.k = String(entry.get(place));
    token.style.background = shadeOf(kind.value(numbers, entry.get(place), mean));
    body.append(token);
  });
  const tell = (event) => {
    const token = event.target.closest(".token");
    if (token) showTip(wordsOn(trace, numbers, Number(token.dataset.k), mean), event.clientX, event.clientY);
  };
  body.addEventListener("mousemove", tell);
  body.addEventListener("click", tell);
  body.addEventListener("mouseleave", hideTip);
  box.append(body);
  return box;
}

function shadeOf(value) {
  if (!known(value)) return "transparent";
  const strength = Math.min(Math.abs(value), 1) * 0.75;
  return value < 0 ? `rgba(var(--low), ${strength})` : `rgba(var(--high), ${strength})`;
}

function wordsOn(trace, numbers, k, mean) {
  const [q, p] = [numbers.student[k], numbers.teacher ? numbers.teacher[k] : null];
  const weight = numbers.weights ? numbers.weights[k] : null;
  const chance = (x) => (known(x) ? `${format(x)}  (${percent(Math.exp(x), 2)})` : ABSENT);
  return [
    `${JSON.stringify(trace.texts[trace.completion[k]])}, completion token ${k + 1}`,
    `weight  ${format(weight)}`,
    `weight / mean  ${known(weight) && mean > 0 ? format(weight / mean) : ABSENT}`,
    `student log q  ${chance(q)}`,
    `teacher log p  ${chance(p)}`,
    `log q − log p  ${known(q) && known(p) ? format(q - p) : ABSENT}`,
  ].join("\n");
}
