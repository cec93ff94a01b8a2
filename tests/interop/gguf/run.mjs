// Greedy tokens of node-llama-cpp: node run.mjs FILE '{"prompts": ["text", [1, 2]], "newTokens": 8}'
// NODE_LLAMA: address of another version's index.js.
const {getLlama} = await import(process.env.NODE_LLAMA ?? "node-llama-cpp");
const [file, task] = process.argv.slice(2);
const {prompts, newTokens} = JSON.parse(task);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 64, threads: 1});
const found = [];
for (const prompt of prompts) {
  const sequence = context.getSequence();
  const given = typeof prompt === "string" ? model.tokenize(prompt, true) : prompt;
  const written = [];
  for await (const token of sequence.evaluate(given, {temperature: 0, yieldEogToken: true})) {
    written.push(token);
    if (written.length === newTokens) break;
  }
  found.push({given, written});
  sequence.dispose();
}
process.stdout.write(JSON.stringify(found));
await llama.dispose();
