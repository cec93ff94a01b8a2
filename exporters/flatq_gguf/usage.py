"""How to run the file in llama.cpp: sections of the folder's README. A test runs the block of Python."""

from __future__ import annotations

USAGE = """## llama.cpp

```
llama-cli -m MODEL.gguf -p "The sea is" -n 20 --temp 0
```

The tokenizer, the chat template and the sampling settings are in the file, so a chat (`llama-cli -m MODEL.gguf -cnv`,
`llama-server -m MODEL.gguf`) needs no other. The first of several parts (`-00001-of-`) opens all.

## Ollama

```
ollama create mine -f Modelfile
ollama run mine
```

`Modelfile` has the publisher's sampling settings and end tokens, and the chat template if it can be written in Ollama's
language.

## llama-cpp-python

```python
from pathlib import Path
import llama_cpp
model = llama_cpp.Llama(str(min(Path(".").glob("*.gguf"))), verbose=False)
print("The sea is" + model("The sea is", max_tokens=20, temperature=0)["choices"][0]["text"])
```
"""
