"""How to run the files in other programs: sections of the folder's README. Tests run the blocks of code."""

from __future__ import annotations

from flatq_onnx.options import OnnxOptions

PYTHON = """## onnxruntime in Python

```python
import json
import numpy as np, onnxruntime as ort, tokenizers
folder, prompt, new = ".", "The sea is", 20
about = json.load(open(f"{folder}/flatq_onnx.json"))
session = ort.InferenceSession(f"{folder}/{about['model']}")
ids = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json").encode(prompt).ids
space, number = len(ids) + new, about["float_type"]
shapes = [(1, layer["heads"], FREE, layer[width]) for layer in about["cache"] for width in ("key_width", "value_width")]
names = [name for name in about["inputs"] if name.startswith("past_key_values.")]
feed = {name: np.zeros(shape, CACHE) for name, shape in zip(names, shapes)}
feed |= {"num_logits_to_keep": np.array(1), "input_ids": np.array([ids])}
known = 0
while len(ids) < space:
    known += feed["input_ids"].shape[1]
STEP
    logits, *cache = session.run(None, feed)
    ids.append(int(logits[0, -1].argmax()))
    feed.update(zip(names, cache), input_ids=np.array([ids[-1:]]))
print(tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json").decode(ids))
```
"""
# A cache that is written in place has space for all positions from the start, and the mask has its length.
IN_PLACE = """    feed["cache_position"] = np.array([known - feed["input_ids"].shape[1]])
    feed["attention_mask"] = (np.arange(space) < known).astype(np.int64)[None]"""
GROWING = """    feed["attention_mask"] = np.ones((1, known), np.int64)"""

CPP = """## onnxruntime in C++

The graph says what its cache looks like. Header and library are in onnxruntime's releases; the header may be older than
the library, not newer. `g++ -std=c++17 run.cpp -I include -L lib -lonnxruntime -o run`, then `./run` and the tokens of
the prompt.

```cpp
#include <onnxruntime_cxx_api.h>
#include <algorithm>
#include <cstring>
#include <iostream>
int main(int count, char** given) {
  std::vector<int64_t> ids, mask, PLACEkept{1};
  for (int i = 1; i < count; ++i) ids.push_back(std::stoll(given[i]));
  Ort::Env env;
  Ort::Session session(env, "model.onnx", Ort::SessionOptions());
  Ort::AllocatorWithDefaultOptions memory;
  const auto names = session.GetInputNames(), results = session.GetOutputNames();
  std::vector<const char*> inputs, outputs;
  for (auto& name : names) inputs.push_back(name.c_str());
  for (auto& name : results) outputs.push_back(name.c_str());
  std::vector<Ort::Value> feed(inputs.size());
  std::vector<size_t> caches;
  const int64_t space = ids.size() + 20;
  for (size_t i = 0; i < feed.size(); ++i) {
    const auto info = session.GetInputTypeInfo(i);
    auto shape = info.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() != 4) continue;
    caches.push_back(i), shape[0] = 1, shape[2] = FREE;
    feed[i] = Ort::Value::CreateTensor(memory, shape.data(), 4, info.GetTensorTypeAndShapeInfo().GetElementType());
    std::memset(feed[i].GetTensorMutableRawData(), 0, feed[i].GetTensorSizeInBytes());
  }
  auto put = [&](const char* name, std::vector<int64_t>& of, std::vector<int64_t> shape) {
    auto& value = feed[std::find(names.begin(), names.end(), name) - names.begin()];
    value = Ort::Value::CreateTensor<int64_t>(memory.GetInfo(), of.data(), of.size(), shape.data(), shape.size());
  };
  for (int64_t known = 0; int64_t(ids.size()) < space;) {
    std::vector<int64_t> next(ids.begin() + known, ids.end());
STEP
    put("input_ids", next, {1, int64_t(next.size())});
    put("attention_mask", mask, {1, int64_t(mask.size())});
    put("num_logits_to_keep", kept, {});
    auto found = session.Run({}, inputs.data(), feed.data(), feed.size(), outputs.data(), outputs.size());
    const float* logits = found[0].GetTensorData<float>();
    ids.push_back(std::max_element(logits, logits + found[0].GetTensorSizeInBytes() / sizeof(float)) - logits);
    for (size_t i = 0; i < caches.size(); ++i) feed[caches[i]] = std::move(found[i + 1]);
    std::cout << ids.back() << std::endl;
  }
}
```
"""
CPP_IN_PLACE = """    place[0] = known, known = ids.size();
    mask.assign(space, 0), std::fill_n(mask.begin(), known, 1);
    put("cache_position", place, {1});"""
CPP_GROWING = """    known = ids.size(), mask.assign(known, 1);"""

GENAI = """## onnxruntime-genai in Python

```python
import onnxruntime_genai as og
model = og.Model(".")
tokenizer = og.Tokenizer(model)
settings = og.GeneratorParams(model)
settings.set_search_options(max_length=64)
generator = og.Generator(model, settings)
generator.append_tokens(tokenizer.encode("The sea is"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""

OPTIMUM = """## optimum in Python

```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
model, tokenizer = ORTModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".", padding_side="left")
tokens = model.generate(**tokenizer("The sea is", return_tensors="pt"), max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0]))
```
"""

JAVASCRIPT = """## transformers.js in Node

```javascript
import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";
env.localModelPath = process.argv[2]; // the folder that holds this one
env.allowRemoteModels = false;
const name = process.argv[3]; // the name of this folder
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name);
const tokens = await model.generate({ ...tokenizer("The sea is"), max_new_tokens: 20, do_sample: false });
console.log(tokenizer.batch_decode(tokens, { skip_special_tokens: true })[0]);
```

In a browser the same code loads the folder from a server: `env.allowLocalModels = true` and `env.localModelPath` is the
address of the folder that holds this one. `device: "webgpu"` runs it on the GPU.
"""


def usage(options: OnnxOptions) -> str:
    """Sections for the programs that run a folder of this target."""
    if options.target == "genai":
        return GENAI
    if options.target == "optimum":
        return OPTIMUM
    if options.target == "web":
        return JAVASCRIPT
    in_place = options.attention == "reduced"
    free = "space" if in_place else "0"
    python = (
        PYTHON.replace("FREE", free)
        .replace("CACHE", "np.int8" if options.cache_type == "int8" else "number")
        .replace("STEP", IN_PLACE if in_place else GROWING)
    )
    if options.activations == "fp16":  # C++ has no type for the logits
        return python
    cpp = (
        CPP.replace("FREE", free)
        .replace("PLACE", "place{0}, " if in_place else "")
        .replace("STEP", CPP_IN_PLACE if in_place else CPP_GROWING)
    )
    return f"{python}\n{cpp}"
