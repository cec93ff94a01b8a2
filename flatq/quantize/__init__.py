"""GPTQ post-training quantization: tensors in ``gptq`` and ``grid``, the model only in ``stage``."""
