// What the plots have in common: colours from the style sheet, axes, size.

const { uPlot } = window;

/** Return a colour of the style sheet by name; it differs in the dark. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Return an axis: `splits` are its ticks, `label` makes their text. */
export function axis(side, splits, label, size) {
  return {
    side,
    size,
    splits,
    filter: (_plot, ticks) => ticks,
    values: (_plot, ticks) => ticks.map(label),
    stroke: () => colour("soft"),
    grid: { stroke: () => colour("line"), width: 1 },
    ticks: { show: false },
    gap: 6,
    font: "12px system-ui, sans-serif",
  };
}

/** Return a plot that fills `holder`, and is drawn again when its size or the colours change. */
export function plot(holder, options, data) {
  const size = () => ({ width: holder.clientWidth, height: holder.clientHeight });
  const made = new uPlot(
    { legend: { show: false }, cursor: { show: false }, ...size(), ...options },
    data,
    holder,
  );
  new ResizeObserver(() => {
    if (holder.clientWidth) made.setSize(size());
  }).observe(holder);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => made.redraw());
  return made;
}
