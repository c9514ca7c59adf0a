// What is at the top of every page: where we are, the key, the theme.

import { html, useEffect, useRef, useState } from "./vendor/preact-htm.js";
import { apiKey } from "./api.js";
import { Icon } from "./icons.js";
import { recall, remember } from "./storage.js";

export function Bar({ here, onKey }) {
  const [theme, setTheme] = useState(recall("theme"));
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const toggle = () => {
    const next = dark ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    remember("theme", next);
    setTheme(next);
  };
  const link = (path, name) => html`<a href=${path} aria-current=${here === path ? "page" : null}>${name}</a>`;
  return html`<header class="bar">
    <a class="brand" href="/"><span class="lamp" aria-hidden="true"></span>Darkroom</a>
    <nav aria-label="Service">${link("/status", "Status")}${link("/docs", "API")}</nav>
    <button type="button" class="bare" aria-label="API key" title="API key" onClick=${onKey}><${Icon} name="key" />
      </button>
    <button type="button" class="bare" aria-label=${dark ? "Light theme" : "Dark theme"}
      title=${dark ? "Light theme" : "Dark theme"} onClick=${toggle}><${Icon} name=${dark ? "sun" : "moon"} /></button>
  </header>`;
}

export function Dialog({ label, onClose, children }) {
  const dialog = useRef(null);
  useEffect(() => {
    dialog.current.showModal();
  }, []);
  const outside = (event) => event.target === dialog.current && dialog.current.close();
  return html`<dialog ref=${dialog} aria-label=${label} onClose=${onClose} onClick=${outside}>
    <div class="dialog">
      <header><h2>${label}</h2><button type="button" class="bare" aria-label="Close"
        onClick=${() => dialog.current.close()}><${Icon} name="close" /></button></header>
      ${children}
    </div></dialog>`;
}

export function KeyBox({ wrong, onKey, onClose }) {
  const input = useRef(null);
  const save = (event) => {
    event.preventDefault();
    onKey(input.current.value);
    event.target.closest("dialog").close();
  };
  return html`<${Dialog} label="API key" onClose=${onClose}>
    <form onSubmit=${save}>
      <p class="help">Kept in this browser, and sent to this service only. Empty where the service has no keys.</p>
      <label class="label" for="key">Key</label>
      <input id="key" ref=${input} type="password" autocomplete="off" spellcheck="false" value=${apiKey()}
        aria-invalid=${wrong ? "true" : null} aria-describedby=${wrong ? "key-error" : null} />
      ${wrong && html`<p class="error" id="key-error">${wrong}</p>`}
      <button class="primary">Save</button>
    </form>
  </${Dialog}>`;
}
