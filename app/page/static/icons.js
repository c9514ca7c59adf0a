// Drawn here: a page that asks nobody else has no icon font.

import { html } from "./vendor/preact-htm.js";

const PATHS = {
  picture: "M4 5h16v14H4z M4 16l5-5 4 4 3-3 4 4 M15.5 9.2v.1",
  lock: "M6 11h12v9H6z M8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  unlock: "M6 11h12v9H6z M8.5 11V8a3.5 3.5 0 0 1 6.7-1.4",
  key: "M11.5 12a3.5 3.5 0 1 0-7 0 3.5 3.5 0 0 0 7 0z M11.5 12H20v3.5 M16.5 12v2.5",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8z M12 3v1.5 M12 19.5V21 M3 12h1.5 M19.5 12H21 M5.6 5.6l1.1 1.1 M17.3 17.3l1.1 1.1 M5.6 18.4l1.1-1.1 M17.3 6.7l1.1-1.1",
  moon: "M19.5 14.2A8 8 0 0 1 9.8 4.5 8 8 0 1 0 19.5 14.2z",
  close: "M6 6l12 12 M18 6L6 18",
  swap: "M7 8h11l-3-3 M17 16H6l3 3",
  download: "M12 4v11 M7.5 11L12 15.5 16.5 11 M5 20h14",
  reuse: "M5 12a7 7 0 0 1 12-4.9L19 9 M19 4.5V9h-4.5 M19 12a7 7 0 0 1-12 4.9L5 15 M5 19.5V15h4.5",
  code: "M9 7l-5 5 5 5 M15 7l5 5-5 5",
  compare: "M4 5h7v14H4z M13 5h7v14h-7z",
  spark: "M12 4l1.8 6.2L20 12l-6.2 1.8L12 20l-1.8-6.2L4 12l6.2-1.8z",
  brush: "M4 20c3 .5 5-.5 5-3a2.5 2.5 0 0 0-2.5-2.5C4 14.5 5.5 18 4 20z M9 15L19 5 M9 15l-1.5-1.5",
};

export const Icon = ({ name }) => html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false">
  <path d=${PATHS[name]} /></svg>`;
