// Two generations side by side, and what is different between them.

import { html } from "./vendor/preact-htm.js";
import { facts } from "./stage.js";

const drawnIn = ({ timings }) => (timings.running ? [["running", "Drawn in", `${timings.running.toFixed(1)} s`]] : []);

export function Differences({ left, right }) {
  const sides = [left, right].map(({ generation, index }) => [
    ["prompt", "Prompt", generation.parameters.prompt],
    ...facts(generation, index),
    ...drawnIn(generation),
  ]);
  const labels = new Map(sides.flat().map(([field, label]) => [field, label]));
  const [a, b] = sides.map((side) => new Map(side.map(([field, , text]) => [field, text])));
  const different = [...labels].filter(([field]) => a.get(field) !== b.get(field));
  if (!different.length) return html`<p class="help same">The same in every setting.</p>`;
  return html`<table class="differences">
    <caption>What is different</caption>
    <thead><tr><th scope="col">Setting</th><th scope="col">Left</th><th scope="col">Right</th></tr></thead>
    <tbody>${different.map(([field, label]) => html`<tr key=${field}><th scope="row">${label}</th><td>
      ${a.get(field) ?? "unset"}</td><td>${b.get(field) ?? "unset"}</td></tr>`)}</tbody>
  </table>`;
}
