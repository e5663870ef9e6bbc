// Live traffic: the last two minutes of the metrics, as figures and plots.

import { between, isAnew, quantile, snapshot } from "./metrics.js";
import { axis, colour, plot } from "./plots.js";
import { bars, byId, element, figure, percent, tickFigure, write } from "./text.js";

const SPAN_S = 120;
const FIGURES_S = 10;
const SMOOTH_S = 5;
const POINTS_S = 60;

let history = [];
let rates = null;
let ratios = null;

/** Take in the metrics at a time; return whether the server is ready. */
export function take(text, now_s) {
  const seen = snapshot(text, now_s);
  if (history.length && isAnew(history.at(-1), seen)) history = [];
  history.push(seen);
  history = history.filter((one) => one.at_s >= now_s - SPAN_S - SMOOTH_S);
  return seen.isReady;
}

/** Show what was taken in. */
export function render() {
  const now = history.at(-1);
  write(byId("depth"), String(now.depth ?? 0));
  write(byId("slowdown"), now.slowdown ? `× ${figure(now.slowdown)}` : "–");
  if (history.length < 2) return;
  showFigures(between(since(now, FIGURES_S), now));
  showUsed(between(since(now, POINTS_S), now).points);
  showPlots(now);
}

/** Return the last snapshot at least so long before `later`, else the first. */
function since(later, seconds) {
  const old = history.filter((one) => one.at_s <= later.at_s - seconds + 0.05);
  return old.at(-1) ?? history[0];
}

function showFigures({ perSecond, metShare, ratio }) {
  write(byId("rate"), perSecond ? figure(perSecond) : "0");
  write(byId("met-share"), metShare == null ? "–" : percent(metShare));
  const p95 = quantile(ratio, 0.95);
  write(byId("ratio"), p95 == null ? "–" : `${p95 >= 4 ? "> " : ""}${percent(p95, 0)}`);
}

function showUsed(used) {
  const all = used.reduce((sum, [, n]) => sum + n, 0);
  if (all) {
    bars(byId("used"), used.map(([point, n]) => [`Point ${point}`, n / all, percent(n / all)]));
  } else {
    byId("used").replaceChildren(element("li", "No requests yet", { class: "none" }));
  }
}

function showPlots(now) {
  const spans = history.slice(1).map((one, i) => [one, between(history[i], one)]);
  const times = spans.map(([one]) => one.at_s - now.at_s);
  const smooth = history.slice(1).map((one) => between(since(one, SMOOTH_S), one).ratio);
  rates ??= ratePlot();
  ratios ??= ratioPlot();
  rates.setData([
    times,
    spans.map(([, span]) => span.inTimePerSecond),
    spans.map(([, span]) => span.missedPerSecond),
  ]);
  ratios.setData([
    [-SPAN_S, ...times],
    [null, ...smooth.map((ratio) => quantile(ratio, 0.95))],
    [null, ...smooth.map((ratio) => quantile(ratio, 0.5))],
    [1, ...times.map(() => 1)],
  ]);
}

// -- the plots -----------------------------------------------------------------------------------

function ago(seconds) {
  return seconds ? `${-seconds / 60} min ago` : "now";
}

function options(top, label, series) {
  return {
    padding: [8, 24, 0, 0],
    scales: {
      x: { time: false, range: () => [-SPAN_S, 0] },
      y: { range: (_plot, _low, high) => [0, top(high ?? 0)] },
    },
    axes: [
      axis(2, () => [-60, 0], ago, 24),
      axis(3, (_plot, _axis, low, high) => [low, (low + high) / 2, high], label, 46),
    ],
    series: [{}, ...series],
  };
}

function line(name, dash) {
  return { stroke: () => colour(name), width: 1.75, dash, points: { show: false } };
}

/** Return 1, 2 or 5 times a power of ten, not below `value`. */
function round(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 5, 10].find((step) => step * unit >= value);
}

function ratePlot() {
  const series = [line("lit"), line("late", [5, 4])];
  const top = (high) => round(Math.max(high, 2));
  return plot(byId("rate-plot"), options(top, tickFigure, series), [[], [], []]);
}

function ratioPlot() {
  const series = [line("lit"), line("dot"), { ...line("late", [2, 3]), width: 1 }];
  const top = (high) => Math.max(2, Math.min(high, 4));
  const label = (tick) => percent(tick, 0);
  return plot(byId("ratio-plot"), options(top, label, series), [[], [], [], []]);
}
