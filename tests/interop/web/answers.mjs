// What transformers.js writes with an exported folder; the same module runs in Node and in a page.

/**
 * Greedy tokens for each prompt alone, for each as a chat (if there is a template), and for all in one padded batch.
 *
 * @param {object} library the module @huggingface/transformers
 * @param {string} name of the folder, below env.localModelPath
 * @param {{prompts: string[], newTokens: number}} task
 * @param {object} options of from_pretrained, e.g. {device: "webgpu"}
 */
export async function answers({ AutoModelForCausalLM, AutoTokenizer }, name, task, options) {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  tokenizer.padding_side = "left";
  let began = performance.now();
  const model = await AutoModelForCausalLM.from_pretrained(name, options);
  const loadSeconds = (performance.now() - began) / 1000;
  const write = async (inputs) => {
    const tokens = await model.generate({ ...inputs, max_new_tokens: task.newTokens, do_sample: false });
    return tokens.tolist().map((row) => row.slice(inputs.input_ids.dims[1]).map(Number));
  };
  const found = { single: [], chat: [], batch: [], loadSeconds };
  began = performance.now();
  for (const prompt of task.prompts) found.single.push((await write(tokenizer(prompt)))[0]);
  found.secondsPerToken = (performance.now() - began) / 1000 / found.single.flat().length;
  if (tokenizer.chat_template) {
    for (const prompt of task.prompts) {
      const chat = [{ role: "user", content: prompt }];
      const inputs = tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true });
      found.chat.push((await write(inputs))[0]);
    }
  }
  if (task.prompts.length > 1) found.batch = await write(tokenizer(task.prompts, { padding: true }));
  return found;
}
