"""Checkpoints with the true shapes of large models and as few layers as one likes, made of noise.

    python benchmarks/synthetic.py llama2-7b --layers 2 --out /tmp/llama2-7b-2

What flatq needs in memory and time follows from shapes, not from what a model knows. The noise has the statistics that
matter for the numerics: weights of the size that training leaves, a residual stream with a few channels that are
hundreds of times larger than the rest, so that Grams are badly conditioned as those of real models are.

A Hugging Face folder (config.json, one safetensors file, a tokenizer of single bytes), written tensor by tensor: memory
is one tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """A published model's widths."""

    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32_000
    theta: float = 10_000.0


SHAPES = {
    "llama2-7b": Shape(4096, 11008, 32, 32, 32),
    "llama2-13b": Shape(5120, 13824, 40, 40, 40),
    "llama2-70b": Shape(8192, 28672, 80, 64, 8),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128_256, 500_000.0),
    "llama3-70b": Shape(8192, 28672, 80, 64, 8, 128_256, 500_000.0),
    # Not a published model: 7B's proportions at an eighth of its width, for curves with many points.
    "llama2-7b/8": Shape(512, 1376, 32, 8, 8),
    # For trying a script.
    "toy": Shape(128, 352, 2, 4, 4, 320),
}


def tensors(shape: Shape, layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape, in the order of the file."""
    d, d_head = shape.d_model, shape.d_model // shape.heads
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, d)}
    for index in range(layers):
        rows = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        found |= {f"model.layers.{index}.self_attn.{n}_proj.weight": (h * d_head, d) for n, h in rows.items()}
        found[f"model.layers.{index}.self_attn.o_proj.weight"] = (d, d)
        found |= {f"model.layers.{index}.mlp.{n}_proj.weight": (shape.d_ff, d) for n in ("gate", "up")}
        found[f"model.layers.{index}.mlp.down_proj.weight"] = (d, shape.d_ff)
        found |= {f"model.layers.{index}.{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (d,), "lm_head.weight": (shape.vocab, d)}


def noise(name: str, size: tuple[int, ...], shape: Shape, generator: torch.Generator) -> Tensor:
    """A tensor with plausible statistics, bfloat16."""
    values = torch.empty(size, device=generator.device).normal_(generator=generator)
    if len(size) == 1:
        return (0.4 * torch.exp(0.3 * values)).bfloat16()
    if "embed_tokens" in name:
        values *= 0.02
        values[:, :: shape.d_model // 4] *= 100  # the few channels that dominate a trained residual stream
    else:
        values *= size[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values /= math.sqrt(2 * shape.layers)
    return values.bfloat16()


def generate(shape: Shape, layers: int, out: Path, seed: int = 0, device: str = "cpu") -> Path:
    """Write the folder, with noise that is made on a device; returns it."""
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "rope_theta": shape.theta,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    byte_tokenizer().save_pretrained(str(out))
    generator = torch.Generator(device).manual_seed(seed)
    header, end = {}, 0
    for name, size in tensors(shape, layers).items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = out / "model.safetensors.partial"
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, size in tensors(shape, layers).items():
            file.write(noise(name, size, shape, generator).cpu().view(torch.uint8).numpy().data)
    partial.rename(out / "model.safetensors")
    return out


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(generate(SHAPES[given.shape], given.layers, given.out, given.seed))


if __name__ == "__main__":
    main()
