"""FLAT low-rank compression; ``heads``, ``mlp`` and ``allocate`` work on tensors, only ``stage`` works on a model."""
