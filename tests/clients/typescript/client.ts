import type { components, operations, paths } from "./api.d.ts";

type Asked = operations["create_generation"]["requestBody"]["content"]["application/json"];
type Answer = operations["create_generation"]["responses"]["202"]["content"]["application/json"];
type Problem = operations["create_generation"]["responses"]["422"]["content"]["application/problem+json"];
type Model = components["schemas"]["Model"];

const asked: Asked = { prompt: "a red apple", seed: 7, guidance: { interval: [0.2, 0.8] }, task: "text-to-image" };

// @ts-expect-error: there is no such task
const dreamt: Asked = { prompt: "a red apple", task: "dream" };

// @ts-expect-error: a number
const spelt: Asked = { prompt: "a red apple", seed: "seven" };

async function draw(url: string): Promise<string[]> {
  const path: keyof paths = "/v1/generations";
  const headers = { "Content-Type": "application/json", Prefer: "wait=30" };
  const answer = await fetch(url + path, { method: "POST", headers, body: JSON.stringify(asked) });
  if (!answer.ok) {
    const problem: Problem = await answer.json();
    throw new Error((problem.errors ?? []).map((error) => `${error.field}: ${error.detail}`).join());
  }
  const generation: Answer = await answer.json();
  return generation.status === "succeeded" ? generation.images.map((image) => image.url) : [];
}

export function smallest(models: Model[]): number {
  return Math.min(...models.map((model) => model.size.minimum * (model.video?.num_frames ?? 1)));
}

export { draw, dreamt, spelt };
