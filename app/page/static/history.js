// The generations that this page knows, kept as the service has them: whoever made them, in whatever tab.

import { events, hasEnded, json, pause } from "./api.js";

const PAGE = 30;
const STREAMS = 2; // a browser has six connections to a host, for all of its tabs
const BUSY = 1500; // milliseconds between two looks at the queue, while we wait
const IDLE = 10_000;

export class History {
  items = new Map(); // id → generation
  live = new Map(); // id → what its stream says: { step, steps, stage, previews: {index: url}, eta }
  cursor = null; // of the next page, if there is one
  loaded = false;
  problem = null; // why the last look failed
  #streams = new Map(); // id → AbortController
  #tabs = new BroadcastChannel("darkroom");
  #watchers = new Set();
  #wake = new AbortController();
  #epoch = 0; // of a key: what was asked with the one before is not kept

  constructor() {
    this.#tabs.onmessage = () => this.look();
    document.addEventListener("visibilitychange", () => {
      this.#changed();
      if (!document.hidden) this.look();
    });
    this.#keepLooking();
  }

  /** Newest first: ids sort by age. */
  get newest() {
    return [...this.items.values()].sort((a, b) => (a.id < b.id ? 1 : -1));
  }

  watch(watcher) {
    this.#watchers.add(watcher);
    return () => this.#watchers.delete(watcher);
  }

  #changed() {
    this.#follow();
    for (const watcher of this.#watchers) watcher();
  }

  look() {
    this.#wake.abort();
  }

  async #keepLooking() {
    while (true) {
      this.#wake = new AbortController();
      const woken = this.#wake.signal;
      if (!document.hidden || !this.loaded) await this.refresh();
      const waiting = [...this.items.values()].some((generation) => !hasEnded(generation));
      const hopeful = this.problem && this.problem.status !== 401;
      await pause(waiting || hopeful ? BUSY : IDLE, woken);
    }
  }

  async refresh() {
    const epoch = this.#epoch;
    const before = new Set(this.items.keys());
    try {
      const page = await json(`/v1/generations?limit=${PAGE}`);
      if (epoch !== this.#epoch) return;
      const oldest = page.next_cursor ?? "";
      const there = new Set(page.data.map(({ id }) => id));
      for (const id of before) if (!there.has(id) && id >= oldest) this.items.delete(id);
      if (!this.loaded) this.cursor = page.next_cursor;
      page.data.forEach((generation) => this.#keep(generation, epoch));
      this.loaded = true;
      this.problem = null;
    } catch (problem) {
      if (epoch !== this.#epoch) return;
      this.problem = problem;
    }
    this.#changed();
  }

  async more() {
    const epoch = this.#epoch;
    const page = await json(`/v1/generations?limit=${PAGE}&cursor=${this.cursor}`);
    if (epoch !== this.#epoch) return;
    page.data.forEach((generation) => this.#keep(generation, epoch));
    this.cursor = page.next_cursor;
    this.#changed();
  }

  /** What was asked for before an end, or with another key, and answered after it is old news. */
  #keep(generation, epoch) {
    if (epoch !== this.#epoch) return;
    const known = this.items.get(generation.id);
    if (known && hasEnded(known) && !hasEnded(generation)) return;
    this.items.set(generation.id, generation);
  }

  async submit(body, idempotencyKey) {
    const epoch = this.#epoch;
    const headers = { "Idempotency-Key": idempotencyKey };
    const generation = await json("/v1/generations", { method: "POST", body, headers });
    this.#keep(generation, epoch);
    this.#tabs.postMessage("changed");
    this.look();
    this.#changed();
    return generation;
  }

  async cancel(id) {
    const epoch = this.#epoch;
    try {
      this.#keep(await json(`/v1/generations/${id}`, { method: "DELETE" }), epoch);
    } catch (problem) {
      if (problem.status !== 409) throw problem; // it ended just now
      this.look();
    }
    this.#tabs.postMessage("changed");
    this.#changed();
  }

  /** One that is not among the newest, by a link. */
  async fetch(id) {
    const epoch = this.#epoch;
    this.#keep(await json(`/v1/generations/${id}`), epoch);
    this.#changed();
  }

  /** The key is another. */
  forget() {
    this.#epoch++;
    for (const stream of this.#streams.values()) stream.abort();
    this.#streams.clear();
    this.items.clear();
    this.live.clear();
    this.loaded = false;
    this.cursor = null;
    this.problem = null;
    this.#changed();
    this.look();
  }

  /** Streams of those that are next, so many; the others' progress comes with each look. A hidden tab has none. */
  #follow() {
    const waiting = this.newest.filter((generation) => !hasEnded(generation));
    const wanted = document.hidden ? [] : waiting.slice(-STREAMS);
    for (const [id, stream] of this.#streams) {
      if (!wanted.some((generation) => generation.id === id)) {
        stream.abort();
        this.#streams.delete(id);
      }
    }
    for (const { id } of wanted) if (!this.#streams.has(id)) this.#stream(id);
  }

  async #stream(id) {
    const stream = new AbortController();
    this.#streams.set(id, stream);
    let first = null;
    for await (const { name, data } of events(id, stream.signal)) {
      if (stream.signal.aborted) return;
      const seen = this.live.get(id) ?? { previews: {} };
      if (name === "progress") {
        first ??= { step: data.step, at: performance.now() };
        const pace = data.step > first.step ? (performance.now() - first.at) / (data.step - first.step) : null;
        const eta = pace && (pace * (data.steps - data.step)) / 1000;
        this.live.set(id, { ...seen, step: data.step, steps: data.steps, stage: data.stage ?? null, eta });
      } else if (name === "preview") {
        this.live.set(id, { ...seen, previews: { ...seen.previews, [data.index]: data.url } });
      } else if (data.id) {
        this.items.set(id, data); // the end
        if (data.images.length) this.live.delete(id);
        this.#tabs.postMessage("changed");
      } else if (name === "running") {
        const known = this.items.get(id);
        if (known) this.items.set(id, { ...known, status: "running", position: null });
      }
      this.#changed();
    }
    if (this.#streams.get(id) === stream) this.#streams.delete(id);
  }
}
