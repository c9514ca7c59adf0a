// Drawn here: a page that asks nobody else has no icon font.

import { html } from "./vendor/preact-htm.js";

const PATHS = {
  picture: "M4 5h16v14H4z M4 16l5-5 4 4 3-3 4 4 M15.5 9.2v.1",
  lock: "M6 11h12v9H6z M8.5 11V8a3.5 3.5 0 0 1 7 0v3",
  unlock: "M6 11h12v9H6z M8.5 11V8a3.5 3.5 0 0 1 6.7-1.4",
  key: "M14.5 9.5a4 4 0 1 0-3.2 3.9L13 15h2v2h2v2h3v-3l-5.8-5.8 M8.8 9.4v.1",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8z M12 3v1.5 M12 19.500V21 M3 12h1.500 M19.500 12H21 M5.600 5.600l1.100 1.100 M17.300 17.300l1.100 1.100 M5.600 18.400l1.100-1.100 M17.300 6.700l1.100-1.100",
  moon: "M19.500 14.200A8 8 0 0 1 9.800 4.500 8 8 0 1 0 19.500 14.200z",
  close: "M6 6l12 12 M18 6L6 18",
  swap: "M7 8h11l-3-3 M17 16H6l3 3",
  download: "M12 4v11 M7.500 11L12 15.500 16.500 11 M5 20h14",
  reuse: "M5 12a7 7 0 0 1 12-4.900L19 9 M19 4.500V9h-4.500 M19 12a7 7 0 0 1-12 4.900L5 15 M5 19.500V15h4.500",
  code: "M9 7l-5 5 5 5 M15 7l5 5-5 5",
  compare: "M4 5h7v14H4z M13 5h7v14h-7z",
  spark: "M12 4l1.800 6.200L20 12l-6.200 1.800L12 20l-1.800-6.200L4 12l6.200-1.800z",
  brush: "M4 20c3 .5 5-.5 5-3a2.500 2.500 0 0 0-2.500-2.500C4 14.500 5.500 18 4 20z M9 15L19 5 M9 15l-1.500-1.500",
};

export const Icon = ({ name }) => html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false">
  <path d=${PATHS[name]} /></svg>`;
