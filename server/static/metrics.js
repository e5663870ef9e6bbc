// From Prometheus' text to the figures of the page. Pure: no clock, no page.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
// Refusals that a target is missed by; the other codes are requests that were wrong.
const MISSED = ["out-of-time", "unavailable", "infeasible"];

/** Return the samples of an exposition: [{name, labels, value}]. */
function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = LINE.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map((m) => [m[1], m[2]]));
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

/** Return the counters that the page shows, as they stand at `at_s`. */
export function snapshot(text, at_s) {
  const seen = { at_s, inTime: 0, late: 0, missed: 0, wrong: 0, points: {}, ratio: [] };
  for (const { name, labels, value } of parse(text)) {
    if (name === "maestro_requests_total") count(seen, labels, value);
    if (name === "maestro_target_ratio_bucket") {
      seen.ratio.push([labels.le === "+Inf" ? Infinity : Number(labels.le), value]);
    }
    if (name === "maestro_queue_depth") seen.depth = value;
    if (name === "maestro_slowdown") seen.slowdown = value;
    if (name === "maestro_ready") seen.isReady = value === 1;
  }
  return seen;
}

function count(seen, { outcome, point }, value) {
  if (outcome === "ok") seen.inTime += value;
  else if (outcome === "late") seen.late += value;
  else if (MISSED.includes(outcome)) seen.missed += value;
  else seen.wrong += value;
  if (point) seen.points[point] = (seen.points[point] ?? 0) + value;
}

/** Return whether `later` cannot follow `earlier`: the server began anew in between. */
export function isAnew(earlier, later) {
  return ["inTime", "late", "missed", "wrong"].some((name) => later[name] < earlier[name]);
}

/** Return what happened between two snapshots. */
export function between(earlier, later) {
  const seconds = later.at_s - earlier.at_s;
  const [inTime, late, missed, wrong] = ["inTime", "late", "missed", "wrong"].map(
    (name) => later[name] - earlier[name],
  );
  const ratio = later.ratio.map(([bound, n], i) => [bound, n - (earlier.ratio[i]?.[1] ?? 0)]);
  const points = Object.entries(later.points).map(([point, n]) => [
    Number(point),
    n - (earlier.points[point] ?? 0),
  ]);
  return {
    perSecond: (inTime + late + missed + wrong) / seconds,
    inTimePerSecond: inTime / seconds,
    missedPerSecond: (late + missed) / seconds,
    metShare: metShare(ratio, missed),
    ratio,
    points: points.filter(([, n]) => n > 0).sort(([a], [b]) => a - b),
  };
}

function metShare(ratio, missed) {
  const asked = (ratio.at(-1)?.[1] ?? 0) + missed;
  const met = ratio.find(([bound]) => bound === 1)?.[1] ?? 0;
  return asked ? met / asked : null;
}

/** Return a quantile of a cumulative histogram [[bound, n]], linear within a bucket; null if empty. */
export function quantile(buckets, q) {
  const wanted = q * (buckets.at(-1)?.[1] ?? 0);
  if (!wanted) return null;
  let [below, before] = [0, 0];
  for (const [bound, n] of buckets) {
    if (n >= wanted) {
      return bound === Infinity ? below : below + ((bound - below) * (wanted - before)) / (n - before);
    }
    [below, before] = [bound, n];
  }
  return below;
}
