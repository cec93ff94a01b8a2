// node run.mjs ENGINE FOLDER TASK: prints what transformers.js writes, as JSON.
//
// ENGINE is node (onnxruntime-node), or wasm or webgpu in headless Chromium (environment variable CHROMIUM: its path).
// TASK is {"prompts": [...], "newTokens": N}.

import { basename, dirname, resolve } from "node:path";

import { answers } from "./answers.mjs";
import { inPage } from "./page.mjs";

const [engine, folder, taskText] = process.argv.slice(2);
const task = JSON.parse(taskText);
const root = resolve(folder);

async function inNode() {
  const library = await import("@huggingface/transformers");
  library.env.localModelPath = dirname(root);
  library.env.allowRemoteModels = false;
  return answers(library, basename(root), task, {});
}

async function inBrowser([engine, name, task]) {
  if (engine === "webgpu" && !(await navigator.gpu?.requestAdapter())) return { absent: "no WebGPU adapter" };
  const library = await import("/node_modules/@huggingface/transformers/dist/transformers.js");
  const { answers } = await import("/answers.mjs");
  library.env.localModelPath = "/models/";
  library.env.allowLocalModels = true;
  library.env.allowRemoteModels = false;
  library.env.useBrowserCache = false;
  library.env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
  return answers(library, name, task, { device: engine });
}

const found = engine === "node" ? inNode() : inPage(dirname(root), inBrowser, [engine, basename(root), task]);
console.log(JSON.stringify(await found));
