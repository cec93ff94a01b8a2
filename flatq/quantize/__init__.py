"""GPTQ post-training quantization; ``gptq`` works on tensors, only ``stage`` works on a model."""
