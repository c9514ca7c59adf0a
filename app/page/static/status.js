// Workers and queues, as they are now and were in the last minutes.

import { html, render, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { apiKey, json, pause, setApiKey } from "./api.js";
import { Bar, KeyBox } from "./bar.js";

const EVERY = 2000; // milliseconds
const KEPT = 90; // looks: three minutes
const PRIORITIES = ["high", "normal", "low"];

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
const waiting = (model) => sum(Object.values(model.waiting));
const held = (now, name) => now.workers.flatMap(({ models }) => models.filter((model) => model.name === name));
const total = (models, field) => sum(models.map((model) => model[field]));
const rounded = (number) => (number < 10 ? Number(number.toFixed(1)) : Math.round(number));
const span = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`);

function Status() {
  const [looks, setLooks] = useState([]);
  const [problem, setProblem] = useState(null);
  const [asksKey, setAsksKey] = useState(false);
  const [round, setRound] = useState(0);

  useEffect(() => {
    const left = new AbortController();
    const look = async () => {
      while (!left.signal.aborted) {
        try {
          const now = await json("/v1/status", { signal: left.signal });
          setLooks((before) => [...before.slice(1 - KEPT), now]);
          setProblem(null);
        } catch (failure) {
          if (left.signal.aborted) return;
          setProblem(failure);
          if (failure.status === 401) return setAsksKey(true);
        }
        do await pause(EVERY, left.signal);
        while (document.hidden && !left.signal.aborted);
      }
      return undefined;
    };
    look();
    return () => left.abort();
  }, [round]);

  const now = looks.at(-1);
  return html`<${Bar} here="/status" onKey=${() => setAsksKey(true)} />
    <main class="hall">
      <h1>Status</h1>
      ${problem && html`<p class="away" role="alert">${problem.detail}</p>`}
      ${now && html`<${Sums} now=${now} /><${Models} now=${now} looks=${looks} /><${Workers} now=${now} />`}
    </main>
    ${asksKey && html`<${KeyBox} wrong=${problem?.status === 401 && apiKey() ? problem.detail : null}
      onClose=${() => setAsksKey(false)}
      onKey=${(key) => (setApiKey(key), setProblem(null), setRound(round + 1))} />`}`;
}

function Sums({ now }) {
  const { models, workers } = now;
  const all = workers.flatMap((worker) => worker.models);
  const figures = [
    ["Workers", workers.length],
    ["Being drawn", total(all, "running")],
    ["Waiting", sum(models.map(waiting))],
    ["Rows a pass", rounded(total(all, "rows"))],
  ];
  return html`<dl class="sums">${figures.map(([name, figure]) => html`<div key=${name}><dt>${name}</dt><dd>${figure}
    </dd></div>`)}</dl>`;
}

function Models({ now, looks }) {
  const shown = now.models.map((model) => {
    const holders = held(now, model.name);
    const running = total(holders, "running");
    return { ...model, holders, running, busy: running + waiting(model), pace: total(holders, "rows_per_second") };
  });
  const order = shown.sort((a, b) => b.busy - a.busy || b.pace - a.pace);
  const idle = order.filter((model) => !model.busy && !model.holders.length);
  return html`<section aria-labelledby="models"><h2 id="models">Models</h2><ul class="cards">
    ${order.filter((model) => !idle.includes(model)).map((model) => {
      const { holders } = model;
      const rows = rounded(total(holders, "rows"));
      const past = looks.map((look) => total(held(look, model.name), "rows"));
      return html`<li key=${model.name} class="card">
        <header><h3>${model.name}</h3><span class="badge">
          ${holders.length ? `in memory of ${holders.length} worker${holders.length > 1 ? "s" : ""}` : "not in memory"}</span></header>
        <${Line} values=${past} most=${total(holders, "width")}
          label="Rows a pass of ${model.name} in the last minutes, now ${rows}" />
        <dl class="facts">
          <div><dt>Being drawn</dt><dd>${model.running}</dd></div>
          <div><dt>Rows a pass</dt><dd>${rows} of ${total(holders, "width")}</dd></div>
          <div><dt>Rows a second</dt><dd>${rounded(model.pace) || "none"}</dd></div>
          <div><dt>Waiting</dt><dd>${waiting(model)}</dd></div>
          <div><dt>Oldest</dt><dd>${waiting(model) ? span(model.oldest) : "none"}</dd></div>
          <div><dt>All done in</dt><dd>${doneIn(model)}</dd></div>
          ${waiting(model) > 0 && html`<div class="whole"><dt>Of high, normal and low priority</dt><dd>
            ${PRIORITIES.map((priority) => model.waiting[priority]).join(" · ")}</dd></div>`}
        </dl></li>`;
    })}</ul>
    ${idle.length > 0 && html`<p
      class="help idle">Served and not in memory: ${idle.map(({ name }) => name).join(", ")}. The first request loads one.</p>`}
  </section>`;
}

function doneIn(model) {
  if (!waiting(model)) return "none";
  return model.eta === null ? "not known" : span(model.eta);
}

function Line({ values, most: full, label }) {
  const most = Math.max(4, full, ...values);
  const at = (value, i) => `${(100 * (i + KEPT - values.length)) / (KEPT - 1)},${30 - (28 * value) / most}`;
  const points = values.map(at);
  const first = points[0].split(",")[0];
  return html`<svg class="line" viewBox="0 0 100 31" preserveAspectRatio="none" role="img" aria-label=${label}>
    <polygon points="${first},31 ${points.join(" ")} 100,31" /><polyline points=${points.join(" ")}
      vector-effect="non-scaling-stroke" /></svg>`;
}

function Workers({ now }) {
  return html`<section aria-labelledby="workers"><h2 id="workers">Workers</h2>
    ${now.workers.length
      ? html`<div class="scrolls" tabindex="0" role="group" aria-label="Table of workers"><table class="differences">
          <thead><tr><th scope="col">Worker</th><th scope="col">Device</th><th scope="col">Up for</th>
            <th scope="col">Models in memory: rows a pass</th></tr></thead>
          <tbody>${now.workers.map(({ name, device, uptime_seconds: up, stopping, models }) => html`<tr key=${name}>
            <th scope="row">${name}</th><td>${device}</td><td>${span(up)}${stopping && ", stopping"}</td>
            <td><ul>${models.map((model) => html`<li key=${model.name}>
              ${model.name}: ${rounded(model.rows)} of ${model.width}</li>`)}</ul></td></tr>`)}</tbody>
              </table></div>`
      : html`<p class="away">No worker has said anything for a while. What is accepted waits for one.</p>`}
  </section>`;
}

render(html`<${Status} />`, document.getElementById("app"));
