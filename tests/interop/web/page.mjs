// A page in headless Chromium (environment variable CHROMIUM: its path), served from this folder.

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm" };
// Without a GPU Chromium computes WebGPU on the CPU.
const FLAGS = [
  ...["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  ...["--no-first-run", "--disable-quic", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
  ...["--enable-features=Vulkan", "--ignore-gpu-blocklist"],
];
const here = dirname(fileURLToPath(import.meta.url));

/** A server of this folder, of its node_modules, and of the folder models below /models. */
function serve(models) {
  return new Promise((ready) => {
    const server = createServer(async (request, response) => {
      const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
      const file = path.startsWith("/models/") ? join(models, path.slice(8)) : join(here, path);
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

/** What a function returns in the page; it must not use anything from outside but `argument`. */
export async function inPage(models, made, argument) {
  const { chromium } = await import("playwright-core");
  const server = await serve(models);
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: FLAGS });
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(0);
    page.on("console", (message) => console.error(message.text()));
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    return await page.evaluate(made, argument);
  } finally {
    await browser.close();
    server.close();
  }
}
