// Figures as text, and text into the page.

export const byId = (id) => document.getElementById(id);

/** Write only what is new: a live region speaks at every write. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Show a message in the element, or hide it where there is none. */
export function show(element, text) {
  element.hidden = !text;
  write(element, text ?? "");
}

/** Return three significant digits, without an exponent. */
export function figure(value) {
  if (value === 0) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(digits, 4));
}

/** Return three significant digits at most, without zeros at the end. */
export const tickFigure = (value) => String(Number(figure(value)));

export const ms = (value) => (value == null ? "–" : `${figure(value)} ms`);

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

/** Return an element with text and attributes. */
export function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Fill a list with rows of [name, share 0..1, figure], each with a bar. */
export function bars(list, rows) {
  list.replaceChildren(
    ...rows.map(([name, share, value]) => {
      const row = element("li");
      row.append(element("span", name), element("span", value));
      row.style.setProperty("--share", `${100 * share}%`);
      return row;
    }),
  );
}
