// What was drawn, as code that draws it again.

import { repeated } from "./request.js";

export const KINDS = { curl: "curl", python: "Python", openai: "OpenAI" };

const indented = (text, by) => text.replaceAll("\n", `\n${" ".repeat(by)}`);

export function code(kind, generation, model, { origin, keyed }) {
  const { body, pictures } = repeated(generation.parameters, model);
  return { curl, python, openai }[kind]({ body, pictures, origin, keyed, parameters: generation.parameters });
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** For a POSIX shell. Pictures are read from files, through a pipe: an argument may not be that long. */
function curl({ body, pictures, origin, keyed }) {
  const marks = Object.fromEntries(pictures.map((field) => [field, `@${field}@`]));
  let data = quoted(JSON.stringify({ ...body, ...marks }, null, 2));
  for (const field of pictures) data = data.replace(`"@${field}@"`, `"'"$(base64 < ${field}.png | tr -d '\\n')"'"`);
  const lines = [
    `curl -sS ${origin}/v1/generations`,
    "-H 'Content-Type: application/json' -H 'Prefer: wait=60'",
    ...(keyed ? ['-H "Authorization: Bearer $DARKROOM_API_KEY"'] : []),
    `-d ${pictures.length ? "@-" : data}`,
  ].join(" \\\n  ");
  return pictures.length ? `printf '%s' ${data} |\n${lines}` : lines;
}

/** A value as Python writes it. JSON's strings are Python's. */
function literal(value, depth = 0) {
  const pad = "    ".repeat(depth + 1);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map((it) => literal(it, depth + 1)).join(", ")}]`;
  if (value instanceof Code) return value.text;
  if (typeof value === "object") {
    const entries = Object.entries(value).map(([name, it]) => `${pad}${JSON.stringify(name)}: ${literal(it, depth + 1)},\n`);
    return `{\n${entries.join("")}${pad.slice(4)}}`;
  }
  return JSON.stringify(value);
}

class Code {
  constructor(text) {
    this.text = text;
  }
}

const suffix = (parameters) => parameters.output_format;

function python({ body, pictures, origin, keyed, parameters }) {
  const files = Object.fromEntries(pictures.map((field) => [field, new Code(`picture("${field}.png")`)]));
  const modules = [pictures.length && "base64", "json", keyed && "os", "urllib.request"].filter(Boolean);
  return [
    ...modules.map((name) => `import ${name}`),
    "",
    `SERVICE = ${JSON.stringify(origin)}`,
    `HEADERS = {"Content-Type": "application/json", "Prefer": "wait=60"}`,
    ...(keyed ? [`HEADERS["Authorization"] = f"Bearer {os.environ['DARKROOM_API_KEY']}"`] : []),
    "",
    "",
    "def ask(path, body=None):",
    "    data = None if body is None else json.dumps(body).encode()",
    "    return urllib.request.urlopen(urllib.request.Request(SERVICE + path, data, HEADERS)).read()",
    "",
    "",
    ...(pictures.length
      ? [
          "def picture(path):",
          `    with open(path, "rb") as file:`,
          "        return base64.b64encode(file.read()).decode()",
          "",
          "",
        ]
      : []),
    `generation = json.loads(ask("/v1/generations", ${literal({ ...body, ...files })}))`,
    `for number, image in enumerate(generation["images"]):`,
    `    with open(f"{number}.${suffix(parameters)}", "wb") as file:`,
    `        file.write(ask(image["url"]))`,
    "",
  ].join("\n");
}

const BY_OPENAI = {
  "text-to-image": "generate",
  "image-to-image": "edit",
  inpaint: "edit",
  variation: "create_variation",
};

function openai({ body, origin, keyed, pictures, parameters }) {
  const { task } = parameters;
  const method = BY_OPENAI[task];
  const foreign = pictures.some((field) => !["image", "mask"].includes(field));
  if (!method || foreign) return `# OpenAI's API has no word for this (${task}): take curl or Python.\n`;
  const { model, prompt, n, width, height, metadata, task: _, ...extra } = body;
  const worded = method !== "create_variation"; // in OpenAI's API, a variation has no prompt
  const given = { model, ...(worded && { prompt }), ...(n && { n }) };
  if (!worded && prompt) extra.prompt = prompt;
  given.size = `${parameters.width}x${parameters.height}`;
  for (const field of pictures) given[field] = new Code(`open("${field}.png", "rb")`);
  if (Object.keys(extra).length) given.extra_body = extra;
  const passed = Object.entries(given).map(([name, value]) => `    ${name}=${indented(literal(value), 4)},`);
  return [
    `import base64${keyed ? "\nimport os" : ""}`,
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${origin}/v1", api_key=${keyed ? 'os.environ["DARKROOM_API_KEY"]' : '"none"'})`,
    ...(pictures.includes("mask") ? ["# OpenAI's masks are transparent where the picture is repainted."] : []),
    `made = client.images.${method}(`,
    ...passed,
    ")",
    "for number, image in enumerate(made.data):",
    `    with open(f"{number}.${suffix(parameters)}", "wb") as file:`,
    "        file.write(base64.b64decode(image.b64_json))",
    "",
  ].join("\n");
}

/** The clipboard's own interface wants HTTPS. */
export async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = Object.assign(document.createElement("textarea"), { value: text });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
