"""Pretrained models, read lazily: Hugging Face folders and GGUF files."""
