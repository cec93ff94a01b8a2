// node wllama.mjs FILE TASK: prints what wllama, llama.cpp as WebAssembly, writes in headless Chromium, as JSON.
//
// TASK is {"prompts": [...], "chats": [...], "newTokens": N}; the environment variable CHROMIUM is the browser's path.

import { basename, dirname, resolve } from "node:path";

import { inPage } from "./page.mjs";

async function inBrowser([name, { prompts, chats, newTokens }]) {
  const { Wllama } = await import("/node_modules/@wllama/wllama/esm/index.js");
  const wllama = new Wllama({ default: "/node_modules/@wllama/wllama/esm/wasm/wllama.wasm" });
  const exact = { cache_type_k: "f32", cache_type_v: "f32", flash_attn: false };
  const small = { n_ctx: 64, n_threads: 1, n_gpu_layers: 0, useCache: false };
  await wllama.loadModelFromUrl(new URL(`/models/${name}`, location.href).href, { ...exact, ...small });
  const settings = { max_tokens: newTokens, temperature: 0 };
  const found = { texts: [], chats: [] };
  for (const prompt of prompts) {
    found.texts.push((await wllama.createCompletion({ prompt, ...settings })).choices[0].text);
  }
  for (const content of chats) {
    const answer = await wllama.createChatCompletion({ messages: [{ role: "user", content }], ...settings });
    found.chats.push(answer.choices[0].message.content);
  }
  return found;
}

const [file, task] = process.argv.slice(2);
console.log(JSON.stringify(await inPage(dirname(resolve(file)), inBrowser, [basename(file), JSON.parse(task)])));
