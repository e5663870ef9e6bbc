// The frontier of this host, the target's slider under it, and the point that would be chosen.

import { Problem, call, latest } from "./api.js";
import { axis, colour, plot } from "./plots.js";
import { byId, element, ms, percent, tickFigure, write } from "./text.js";

const THUMB_PX = 24;
const LABEL_PX = 56;
const slider = byId("target");
const holder = byId("frontier-plot");

let points = [];
let verdicts = [];
let left = { budget_ms: null, wait_ms: 0 };
let chosen = null;
let range = { x: [0.1, 10], y: [0, 1] };
let drawn = null;
let tell = () => {};

/** Return the target that the slider stands at. */
export function targetMs() {
  const [low, high] = range.x;
  const value = low * (high / low) ** (slider.value / slider.max);
  return Number(value.toPrecision(3));
}

/** Start; `onChoice` is called when the target or the point it chooses is another. */
export function start(onChoice) {
  tell = onChoice;
  slider.addEventListener("input", () => {
    showTarget();
    drawn?.redraw(false);
    explain();
  });
}

/** Ask for the points as they are measured now; show them, and return whether they are new. */
export async function load() {
  const frontier = await call("/frontier");
  if (same(frontier.points, points)) {
    await explain();
    return false;
  }
  const relaxed = await call("/explain", { method: "POST" });
  const before = points.length ? targetMs() : null;
  points = frontier.points;
  verdicts = relaxed.points;
  setRange();
  moveTo(before ?? 1.05 * middle(verdicts.map((v) => v.total_ms)));
  drawn ??= make();
  drawn.setData([points.map((p) => p.p95_ms).sort((a, b) => a - b), points.map((p) => p.accuracy)]);
  place();
  describe();
  await explain();
  return true;
}

function same(some, others) {
  return JSON.stringify(some) === JSON.stringify(others);
}

/** Ask what the target would choose now, and light it up. */
export const explain = latest(async () => {
  const target = targetMs();
  try {
    const answer = await call(`/explain?max_latency_ms=${target}`, { method: "POST" });
    verdicts = answer.points;
    left = answer;
    chosen = answer.point;
    showChoice(answer, target);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    chosen = null;
    write(byId("choice"), "");
    write(byId("choice-why"), error.message);
  }
  fillTable();
  drawn?.redraw(false);
  tell(target);
});

function setRange() {
  const low = Math.min(...points.map((p) => p.p50_ms));
  const high = Math.max(...points.map((p) => p.p95_ms), ...verdicts.map((v) => v.total_ms));
  const accuracies = points.map((p) => p.accuracy);
  const [least, most] = [Math.min(...accuracies), Math.max(...accuracies)];
  const room = 0.15 * (most - least) || 0.01;
  range = { x: [low / 1.6, high * 1.6], y: [least - room, most + room] };
}

/** Return the geometric mean of the least and the largest. */
function middle(values) {
  return Math.sqrt(Math.min(...values) * Math.max(...values));
}

function moveTo(target) {
  const [low, high] = range.x;
  slider.value = slider.max * (Math.log(target / low) / Math.log(high / low));
  showTarget();
}

function showTarget() {
  const target = ms(targetMs());
  write(byId("target-value"), target);
  slider.setAttribute("aria-valuetext", target.replace("ms", "milliseconds"));
}

function showChoice(answer, target) {
  byId("choice").dataset.target = target;
  const verdict = answer.points.find((v) => v.point === answer.point);
  if (!verdict) {
    write(byId("choice"), "No point");
    write(byId("choice-why"), answer.refusal?.detail ?? answer.why);
    return;
  }
  write(byId("choice"), `Point ${verdict.point}, ${percent(verdict.accuracy, 2)} accurate`);
  const fits = `In all ${ms(verdict.total_ms)} are counted on for it: ${answer.why}.`;
  const misses = `No point makes ${ms(target)}; this one takes ${ms(verdict.total_ms)} in all.`;
  write(byId("choice-why"), answer.points.some(isInTime) ? fits : misses);
}

/** Return whether a point makes the target, by what was left of it when the server decided.
 * A request that no point makes in time has a later deadline there: hence the target itself too.
 */
function isInTime(verdict) {
  if (verdict === undefined || verdict.total_ms > targetMs()) return false;
  return left.budget_ms == null || left.wait_ms + verdict.tail_ms <= left.budget_ms;
}

function describe() {
  const [first, last] = [points[0], points[points.length - 1]];
  holder.setAttribute(
    "aria-label",
    `Accuracy against p95 latency of ${points.length} points on this host, ` +
      `from ${percent(first.accuracy)} at ${ms(first.p95_ms)} ` +
      `to ${percent(last.accuracy)} at ${ms(last.p95_ms)}; a table below has the figures`,
  );
}

/** Fill the table, and touch only what is new: else a reader that is in it would lose its place. */
function fillTable() {
  const body = byId("points").tBodies[0];
  while (body.rows.length > points.length) body.lastChild.remove();
  points.forEach((p, i) => {
    const row = body.rows[i] ?? body.insertRow();
    const verdict = verdicts.find((v) => v.point === p.point);
    const interval = `${percent(p.accuracy_low)} to ${percent(p.accuracy_high)}`;
    const times = [p.p50_ms, p.p95_ms, p.p99_ms, verdict?.total_ms].map(ms);
    const state = p.point === chosen ? "chosen" : isInTime(verdict) ? "in time" : "too slow";
    if (p.point === chosen) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
    [String(p.point), percent(p.accuracy, 2), interval, ...times, state].forEach((words, column) => {
      const cell = row.cells[column];
      if (cell) write(cell, words);
      else row.append(column ? element("td", words) : element("th", words, { scope: "row" }));
    });
  });
}

// -- the plot ------------------------------------------------------------------------------------

/** Return round ticks within the range: as many per decade as there is room for. */
function logTicks(u) {
  const [low, high] = range.x;
  const decade_px = u.bbox.width / window.uPlot.pxRatio / Math.log10(high / low);
  const [steps] = [
    [[1, 2, 5], 0.3],
    [[1, 3], 0.47],
    [[1], 0],
  ].find(([, share]) => !share || share * decade_px >= LABEL_PX);
  const ticks = [];
  for (let decade = Math.floor(Math.log10(low)); decade <= Math.log10(high); decade += 1) {
    ticks.push(...steps.map((step) => Number(`${step}e${decade}`)));
  }
  return ticks.filter((tick) => tick >= low && tick <= high);
}

function accuracyStep() {
  const rough = (range.y[1] - range.y[0]) / 6;
  const unit = 10 ** Math.floor(Math.log10(rough));
  return unit * ([1, 2, 5].find((s) => s * unit >= rough) ?? 10);
}

function accuracyTicks() {
  const step = accuracyStep();
  const first = Math.ceil(Math.max(range.y[0], 0) / step);
  const count = Math.floor(Math.min(range.y[1], 1) / step) - first + 1;
  return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function make() {
  const digits = () => Math.max(0, Math.ceil(-Math.log10(100 * accuracyStep()) - 1e-9));
  const options = {
    padding: [8, THUMB_PX, 0, 0],
    scales: {
      x: { time: false, distr: 3, range: () => range.x },
      y: { range: () => range.y },
    },
    axes: [
      axis(2, logTicks, (tick) => `${tickFigure(tick)} ms`, 26),
      axis(3, accuracyTicks, (tick) => percent(tick, digits()), 54),
    ],
    series: [{}, { show: true, paths: () => null, points: { show: false } }],
    hooks: { draw: [draw], setSize: [place] },
  };
  return plot(holder, options, [[], []]);
}

/** Put the slider's track under the plot's area: its thumb is then under the target's line. */
function place() {
  if (!drawn) return;
  const { left, width } = drawn.bbox;
  const ratio = window.uPlot.pxRatio;
  slider.style.marginLeft = `${left / ratio - THUMB_PX / 2}px`;
  slider.style.width = `${width / ratio + THUMB_PX}px`;
}

function draw(u) {
  const at = (x, y) => [u.valToPos(x, "x", true), u.valToPos(y, "y", true)];
  const pen = { context: u.ctx, unit: window.uPlot.pxRatio, at };
  u.ctx.save();
  drawTarget(pen, u.bbox);
  drawLine(pen);
  for (const point of points) if (point.point !== chosen) drawPoint(pen, point, false);
  for (const point of points) if (point.point === chosen) drawPoint(pen, point, true);
  u.ctx.restore();
}

function drawTarget({ context, unit, at }, { top, height, left }) {
  const [x] = at(targetMs(), 0);
  context.fillStyle = colour("lit-soft");
  context.fillRect(left, top, x - left, height);
  context.fillStyle = colour("lit");
  context.fillRect(x - unit, top, 2 * unit, height);
}

function drawLine({ context, unit, at }) {
  context.globalAlpha = 0.4;
  context.strokeStyle = colour("dot");
  context.lineWidth = 1.5 * unit;
  context.beginPath();
  for (const p of points.filter((p) => p.on_frontier)) context.lineTo(...at(p.p95_ms, p.accuracy));
  context.stroke();
  context.globalAlpha = 1;
}

function drawPoint({ context, unit, at }, point, isChosen) {
  const verdict = verdicts.find((v) => v.point === point.point);
  const [x, y] = at(point.p95_ms, point.accuracy);
  context.globalAlpha = isChosen || isInTime(verdict) ? 1 : 0.45;
  context.strokeStyle = context.fillStyle = colour(isChosen ? "lit" : "dot");
  context.lineWidth = 1.5 * unit;
  if (verdict) {
    const [end] = at(verdict.total_ms, 0);
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(end, y);
    context.moveTo(end, y - 4 * unit);
    context.lineTo(end, y + 4 * unit);
    context.stroke();
  }
  context.beginPath();
  context.arc(x, y, (isChosen ? 7 : 4.5) * unit, 0, 2 * Math.PI);
  if (!point.on_frontier && !isChosen) context.fillStyle = colour("card");
  context.fill();
  context.stroke();
  context.globalAlpha = 1;
}
