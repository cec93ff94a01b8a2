"""FLAT low-rank compression: tensors in ``heads``, ``mlp`` and ``allocate``, the model only in ``stage``."""
