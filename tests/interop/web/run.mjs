// node run.mjs ENGINE FOLDER TASK: prints what transformers.js writes, as JSON.
//
// ENGINE is node (onnxruntime-node), or wasm or webgpu in headless Chromium (environment variable CHROMIUM: its path).
// TASK is {"prompts": [...], "newTokens": N}.

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { basename, dirname, extname, join, normalize, resolve } from "node:path";
import { fileURLToPath } from "node:url";

import { answers } from "./answers.mjs";

const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
// Without a GPU Chromium computes WebGPU on the CPU.
const FLAGS = [
  ...["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  ...["--no-first-run", "--disable-quic", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
  ...["--enable-features=Vulkan", "--ignore-gpu-blocklist"],
];
const here = dirname(fileURLToPath(import.meta.url));
const [engine, folder, taskText] = process.argv.slice(2);
const task = JSON.parse(taskText);
const root = resolve(folder);

async function inNode() {
  const library = await import("@huggingface/transformers");
  library.env.localModelPath = dirname(root);
  library.env.allowRemoteModels = false;
  return answers(library, basename(root), task, {});
}

/** A server of this folder, of its node_modules, and of the exported folder below /models. */
function serve() {
  return new Promise((ready) => {
    const server = createServer(async (request, response) => {
      const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
      const file = path.startsWith("/models/") ? join(dirname(root), path.slice(8)) : join(here, path);
      // Threads of WebAssembly need a page that is isolated from others.
      const headers = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };
      try {
        const content = path === "/" ? "<!doctype html>" : await readFile(file);
        const type = path === "/" ? "text/html" : (TYPES[extname(file)] ?? "application/octet-stream");
        response.writeHead(200, { ...headers, "Content-Type": type }).end(content);
      } catch {
        response.writeHead(404, headers).end();
      }
    });
    server.listen(0, "127.0.0.1", () => ready(server));
  });
}

async function inBrowser() {
  const { chromium } = await import("playwright-core");
  const server = await serve();
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: FLAGS });
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(0);
    page.on("console", (message) => console.error(message.text()));
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    return await page.evaluate(
      async ([engine, name, task]) => {
        if (engine === "webgpu" && !(await navigator.gpu?.requestAdapter())) return { absent: "no WebGPU adapter" };
        const library = await import("/node_modules/@huggingface/transformers/dist/transformers.js");
        const { answers } = await import("/answers.mjs");
        library.env.localModelPath = "/models/";
        library.env.allowLocalModels = true;
        library.env.allowRemoteModels = false;
        library.env.useBrowserCache = false;
        library.env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
        return answers(library, name, task, { device: engine });
      },
      [engine, basename(root), task],
    );
  } finally {
    await browser.close();
    server.close();
  }
}

console.log(JSON.stringify(await (engine === "node" ? inNode() : inBrowser())));
