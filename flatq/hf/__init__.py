"""Integration with transformers: ``AutoModelForCausalLM`` loads artifacts and exported folders."""
