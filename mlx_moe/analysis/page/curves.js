"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

const METRICS = {
  "loss": { unit: "nats per token", log: true, lines: [["training", "cross_entropy"], ["validation", "validation_loss"]] },
  "learning rate": { unit: "", lines: [["learning rate", "learning_rate"]] },
  "gradient norm": { unit: "before clipping", lines: [["gradient norm", "grad_norm"]] },
  "tokens per second": { unit: "tokens/s", lines: [["speed", "tokens_per_s"]] },
  "share of peak": { unit: "MFU", lines: [["MFU", "mfu"]] },
  "peak memory": { unit: "bytes", lines: [["memory", "peak_memory_bytes"]] },
  "busiest expert": { unit: "load over the mean", lines: [["busiest", "load_imbalance"]] },
  "router entropy": { unit: "nats, mean of the layers", lines: [["entropy", "router_entropy"]] },
};
const AXES = { "steps": "run_step", "tokens": "run_tokens", "time": "run_seconds" };

function svg(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function options(select, names) {
  select.replaceChildren(...names.map((name, i) => new Option(name, i)));
}

// 1234567 -> 1.23 M; 0.00042 -> 4.2e-4
function compact(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e9, " G"], [1e6, " M"], [1e4, " k"]]) {
    if (size >= unit) return Number((value / (unit === 1e4 ? 1e3 : unit)).toPrecision(4)) + name;
  }
  return size && size < 1e-3 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  const s = Math.round(seconds);
  return s < 120 ? `${s} s` : s < 7200 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
}

const place = (axis, value) => (axis === "time" ? duration(value) : `${compact(value)}`);

// Ticks at 1, 2 or 5 times a power of ten; on a log scale, where it spans enough, some of every decade.
function ticks(low, high, count, log) {
  if (!(high - low > 1e-9 * Math.max(Math.abs(low), Math.abs(high)))) return [low]; // steps too small to add up
  if (log && high / low > 4) {
    const found = [];
    const subs = high / low > 1e4 ? [1] : high / low > 30 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const sub of subs) found.push(sub * 10 ** power);
    }
    return found.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  return found;
}

// An exponential mean without the pull of its start (Adam's correction), anew in each phase.
function smoothed(points, weight) {
  let mean = 0, mass = 0, phase = null;
  return points.map((point) => {
    if (point.phase !== phase) [mean, mass, phase] = [0, 0, point.phase];
    mean = weight * mean + (1 - weight) * point.y;
    mass = weight * mass + (1 - weight);
    return { ...point, y: mean / mass };
  });
}

class Chart {
  constructor() {
    this.svg = byId("chart");
    this.metrics = Object.keys(METRICS).filter((name) => METRICS[name].lines.some(([, key]) => DATA.rows[key].some((y) => y !== null)));
    options(byId("metric"), this.metrics);
    options(byId("axis"), Object.keys(AXES));
    options(byId("span"), ["the whole run", ...DATA.phases.map((phase) => phase.name)]);
    byId("metric").addEventListener("input", () => this.suit());
    this.suit();
    for (const id of ["metric", "axis", "span", "smoothing", "log"]) byId(id).addEventListener("input", () => this.draw());
    this.svg.addEventListener("pointermove", (event) => this.readAt(event.clientX - this.svg.getBoundingClientRect().left));
    this.svg.addEventListener("keydown", (event) => this.step(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  suit() {
    byId("log").checked = Boolean(METRICS[this.metrics[byId("metric").value]].log);
  }

  points(key) {
    const { rows } = DATA, xs = rows[AXES[this.axis]], phase = DATA.phases[byId("span").value - 1];
    return rows[key]
      .map((y, i) => ({ x: xs[i], y, row: i, phase: rows.phase[i] }))
      .filter((point) => point.y !== null && (!phase || point.phase === phase.number) && (!this.log || point.y > 0));
  }

  draw() {
    this.metric = METRICS[this.metrics[byId("metric").value]];
    this.axis = Object.keys(AXES)[byId("axis").value];
    this.log = byId("log").checked;
    const weight = Number(byId("smoothing").value);
    this.lines = this.metric.lines.map(([label, key], i) => {
      const raw = this.points(key);
      const isSmoothed = weight > 0 && i === 0;
      return { label: isSmoothed ? `${label}, smoothed` : label, raw, points: isSmoothed ? smoothed(raw, weight) : raw };
    });
    this.frame(this.lines.flatMap((line) => line.raw));
    this.lines.forEach((line, i) => {
      const style = i ? "second" : "first";
      if (line.points !== line.raw) this.svg.append(svg("path", { class: `${style} raw`, d: this.path(line.raw) }));
      this.svg.append(svg("path", { class: style, d: this.path(line.points) }));
    });
    if (this.lines.length > 1) this.legend();
    this.cursor = svg("g", {});
    this.svg.append(this.cursor);
    byId("reading").textContent = "";
  }

  frame(points) {
    const { width, height } = this.svg.getBoundingClientRect();
    const box = { left: 56, right: width - 12, top: 26, bottom: height - 26 };
    const xs = points.map((point) => point.x), ys = points.map((point) => point.y);
    const scale = this.log ? Math.log10 : (value) => value;
    const extent = (values) => [Math.min(...values), Math.max(...values)];
    const [x0, x1] = xs.length ? extent(xs) : [0, 1];
    let [y0, y1] = ys.length ? extent(ys) : [0.1, 1];
    if (!this.log) {
      const spread = y1 - y0 > 1e-9 * Math.abs(y1) ? y1 - y0 : Math.abs(y1);
      const margin = 0.05 * spread || 1;
      [y0, y1] = [y0 >= 0 && y0 < 0.3 * y1 ? 0 : y0 - margin, y1 + margin];
    } else if (y0 === y1) [y0, y1] = [y0 / 2 || y0, y1 * 2];
    this.x = (value) => box.left + ((value - x0) / (x1 - x0 || 1)) * (box.right - box.left);
    this.y = (value) => box.bottom - ((scale(value) - scale(y0)) / (scale(y1) - scale(y0))) * (box.bottom - box.top);
    this.box = box;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    for (const value of ticks(y0, y1, 5, this.log)) {
      const y = this.y(value);
      this.svg.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }));
      this.svg.append(svg("text", { x: box.left - 8, y: y + 4, "text-anchor": "end" }, compact(value)));
    }
    for (const value of ticks(x0, x1, Math.max(2, width / 130), false)) {
      this.svg.append(svg("text", { x: this.x(value), y: height - 6, "text-anchor": "middle" }, place(this.axis, value)));
    }
    this.svg.append(svg("text", { x: 0, y: 12 }, `${this.metric.unit} over ${this.axis}`));
    this.boundaries(x0, x1);
  }

  boundaries(x0, x1) {
    let free = 180; // where a name would not run into the one before it, nor into the unit
    for (const phase of DATA.phases) {
      const start = phase[AXES[this.axis]], x = this.x(Math.max(start, x0));
      if (start > x1 || (byId("span").value > 0 && phase !== DATA.phases[byId("span").value - 1])) continue;
      if (start > x0) this.svg.append(svg("line", { class: "boundary", x1: x, x2: x, y1: this.box.top - 8, y2: this.box.bottom }));
      const name = svg("text", { x: x + 3, y: 12 }, phase.name);
      this.svg.append(name);
      if (x < free || x + name.getBBox().width > this.box.right + 10) name.remove();
      else free = x + name.getBBox().width + 10;
    }
  }

  path(points) {
    return points.map((point, i) => `${i && points[i - 1].phase === point.phase ? "L" : "M"}${this.x(point.x).toFixed(1)} ${this.y(point.y).toFixed(1)}`).join("");
  }

  legend() {
    this.lines.forEach((line, i) => {
      const y = this.box.top + 16 + 18 * i, right = this.box.right;
      this.svg.append(svg("path", { class: i ? "second" : "first", d: `M${right - 28} ${y - 4}H${right}` }));
      this.svg.append(svg("text", { class: "legend", x: right - 36, y, "text-anchor": "end" }, line.label));
    });
  }

  readAt(x) {
    const near = (points) => points.reduce((best, point) => (Math.abs(this.x(point.x) - x) < Math.abs(this.x(best.x) - x) ? point : best));
    const all = this.lines.flatMap((line) => line.points);
    if (all.length) this.read(near(all).row);
  }

  step(event) {
    const rows = [...new Set(this.lines.flatMap((line) => line.points.map((point) => point.row)))].sort((a, b) => a - b);
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !rows.length) return;
    event.preventDefault();
    const at = rows.indexOf(this.row);
    this.read(rows[Math.min(rows.length - 1, Math.max(0, at < 0 ? 0 : at + move))]);
  }

  read(row) {
    this.row = row;
    const { rows } = DATA, x = this.x(rows[AXES[this.axis]][row]);
    this.cursor.replaceChildren(svg("line", { class: "cursor", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }));
    const values = [];
    this.lines.forEach((line, i) => {
      const point = line.points.find((one) => one.row === row);
      if (!point) return;
      this.cursor.append(svg("circle", { class: i ? "second" : "first", cx: x, cy: this.y(point.y), r: 4 }));
      values.push(` · ${line.label} `, Object.assign(document.createElement("b"), { textContent: compact(point.y) }));
    });
    const phase = DATA.phases.find((one) => one.number === rows.phase[row]);
    const where = `${phase.name}, step ${rows.step[row]} · ${compact(rows.run_tokens[row])} tokens · ${duration(rows.run_seconds[row])}`;
    byId("reading").replaceChildren(where, ...values);
  }
}

if (Object.values(METRICS).some(({ lines }) => lines.some(([, key]) => DATA.rows[key].some((y) => y !== null)))) new Chart();
else byId("reading").textContent = "No row has a figure.";
