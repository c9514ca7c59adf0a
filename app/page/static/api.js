// The service over HTTP: its key, its problem documents, its event streams.

import { recall, remember } from "./storage.js";

const ENDED = ["succeeded", "failed", "canceled", "expired"];
const SILENCE = 45_000; // a stream pings every 15 s

let key = recall("key", "");

export const apiKey = () => key;

export function setApiKey(value) {
  key = value.trim();
  remember("key", key || null);
}

export const hasEnded = (generation) => ENDED.includes(generation.status);

/** What went wrong, as RFC 9457 tells it; status 0 if there was no answer at all. */
export class Problem extends Error {
  constructor({ status, detail, errors, retryAfter = null }) {
    super(detail);
    Object.assign(this, { status, detail, errors: errors ?? [], retryAfter });
  }

  /** It is worth asking again, in `retryAfter` seconds. */
  get passes() {
    return this.retryAfter !== null && [0, 429, 503].includes(this.status);
  }
}

export async function ask(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (key) sent.Authorization = `Bearer ${key}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers: sent, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ status: 0, detail: "The service does not answer.", retryAfter: 3 });
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

export const json = (path, options) => read("json", path, options);

/** Bytes of a picture, with the key that an <img> could not send. */
export const blobOf = (url) => read("blob", url);

async function read(kind, path, options) {
  const response = await ask(path, options);
  try {
    return await response[kind]();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ status: 0, detail: "The answer broke off.", retryAfter: 3 });
  }
}

async function problemOf(response) {
  const told = await response.json().catch(() => ({}));
  const seconds = Number(response.headers.get("Retry-After"));
  return new Problem({
    status: response.status,
    detail: told.detail ?? `The service answered ${response.status}.`,
    errors: told.errors,
    retryAfter: response.headers.has("Retry-After") && seconds >= 0 ? seconds : null,
  });
}

/** Each event of a generation as { name, data }, to the one that ends it; a stream that breaks is taken up again. */
export async function* events(id, signal) {
  let last = null;
  for (let failures = 0; !signal.aborted; failures++) {
    try {
      const headers = { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) };
      const response = await ask(`/v1/generations/${id}/events`, { headers, signal });
      for await (const event of parsed(response.body, signal)) {
        failures = 0;
        last = event.id ?? last;
        yield { name: event.name, data: JSON.parse(event.data) };
        if (ENDED.includes(event.name)) return;
      }
    } catch (error) {
      if (signal.aborted || [401, 404].includes(error.status)) return;
    }
    await pause(Math.min(10_000, 500 * 2 ** failures), signal);
  }
}

/** Server-sent events of a body. EventSource would do it, could it send a key. */
async function* parsed(body, signal) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let event = { name: "message", data: [] };
  try {
    while (true) {
      const { value, done } = await within(SILENCE, reader.read(), signal);
      if (done) return;
      const lines = (text + value).split(/\r\n|\n|\r(?!$)/);
      text = lines.pop();
      for (const line of lines) {
        const [, field, rest] = line.match(/^([^:]*):? ?(.*)$/s);
        if (line === "") {
          if (event.data.length) yield { ...event, data: event.data.join("\n") };
          event = { name: "message", data: [] };
        } else if (field === "event") event.name = rest;
        else if (field === "data") event.data.push(rest);
        else if (field === "id") event.id = rest;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function within(milliseconds, promise, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error("silent")), milliseconds);
    signal.addEventListener("abort", () => reject(new Error("aborted")), { once: true });
    promise.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}

export function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    if (signal?.aborted) return resolve();
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
    return undefined;
  });
}

/** A random name for a request, so that asking again never draws twice; `randomUUID` wants HTTPS. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
