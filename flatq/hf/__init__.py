"""The transformers face of flatq: ``AutoModelForCausalLM`` loads artifacts and exported folders."""
