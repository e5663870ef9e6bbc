// Calls to the server, and its errors in its own words.

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail ?? body.error ?? `The server answered ${status}`);
    this.status = status;
    this.body = body;
  }
}

async function answerOf(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "The server does not answer" });
  }
}

/** Return the JSON of an answer. Throws a Problem where it is an error. */
export async function call(path, options = {}) {
  const response = await answerOf(path, options);
  if (!response.ok) throw new Problem(response.status, await response.json().catch(() => ({})));
  return response.json().catch(cutShort);
}

/** Return the text of an answer. Throws a Problem where it is an error. */
export async function text(path) {
  const response = await answerOf(path);
  if (!response.ok) throw new Problem(response.status, {});
  return response.text().catch(cutShort);
}

function cutShort(error) {
  if (error.name === "AbortError") throw error;
  throw new Problem(0, { detail: "The server's answer broke off" });
}

/** Return the bytes of an answer. Throws a Problem where it is an error. */
export async function bytes(path) {
  const response = await answerOf(path);
  if (!response.ok) throw new Problem(response.status, {});
  return response.blob().catch(cutShort);
}

/** Return what the server says of its readiness; 503 is an answer here. */
export async function readiness() {
  const response = await answerOf("/v2/health/ready");
  return response.json().catch(() => ({ ready: false }));
}

/** Return `work` so wrapped that one call runs at a time, and of those that come meanwhile the last. */
export function latest(work) {
  let running = false;
  let again = false;
  return async function run() {
    if (running) {
      again = true;
      return;
    }
    running = true;
    try {
      do {
        again = false;
        await work();
      } while (again);
    } finally {
      running = false;
    }
  };
}
