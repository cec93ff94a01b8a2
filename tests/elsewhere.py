"""A device without hardware: tensors in ordinary memory that say they are elsewhere, and meet no tensor of the CPU.

    python -m tests.elsewhere RECIPE OUT...    flatq plan and flatq run RECIPE --device elsewhere, of every pair

On a GPU a product of a tensor there and one here is an error, and nothing on a machine without a GPU would show it.
Here it is one, too: a run that ends well has moved everything that it had to move. What it computes is computed by the
CPU, so it ends with the CPU's own bytes. Not shown: a GPU's rounding, memory and speed.

torch calls ``__torch_dispatch__`` for every operation on such a tensor, and ``Away`` for those that make one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "elsewhere"
unchanged_attention = functional.scaled_dot_product_attention
CROSSING = {"aten.copy_", "aten._to_copy", "aten.to"}  # the ways from one device to another
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_"}  # may take their indices from the CPU


class Elsewhere(Tensor):
    """A tensor that lies in ``here``."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        place: dict[str, Any] = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=torch.device(NAME, 0), **place)
        made.here = here
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.here})"

    def tolist(self) -> Any:
        """Python numbers; torch gives none of a subclass."""
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class Away(TorchDispatchMode):
    """Where ``device="elsewhere"`` makes such a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute on the CPU, and say that the result is where a device would have left it."""
    leaves = tree_leaves((args, kwargs))
    devices = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
    if "meta" in devices:
        return func(*args, **kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    away = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
    if away:
        refuse_strangers(func, args, tensors)
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.here, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    result = func(*args, **kwargs)
    if str(func.overloadpacket) == "aten.copy_":
        return tensors[0]
    given = {id(tensor) for tensor in tensors}
    stays_away = NAME in devices if devices else bool(away)

    def placed(x: Tensor) -> Tensor:
        """The very tensor that was given if it was changed in place, never a view from one device into the other."""
        if not stays_away:
            return x.clone() if id(x) in away else x
        return away[id(x)] if id(x) in away else Elsewhere(x.clone() if id(x) in given else x)

    with torch.inference_mode(False):  # torch cannot take views of a subclass that was made in that mode
        return tree_map_only(Tensor, placed, result)


def refuse_strangers(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """An error if a tensor of the CPU takes part that is more than a number, as CUDA makes it one."""
    name = str(func.overloadpacket)
    if name in CROSSING:
        return
    if name in INDEXING:
        tensors = [leaf for leaf in tree_leaves((args[0], args[2:])) if isinstance(leaf, Tensor)]
    strangers = [tuple(x.shape) for x in tensors if x.dim() and not isinstance(x, Elsewhere)]
    if strangers:
        raise RuntimeError(f"{name}: some tensors are {NAME}, and {strangers} on the CPU")


def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """By the CPU's own kernel: for a device that it does not know torch takes one that rounds otherwise."""
    operands = (query, key, value)
    if any(x.requires_grad or not isinstance(x, Elsewhere) for x in operands):
        return unchanged_attention(*operands, **options)
    options["attn_mask"] = options["attn_mask"].here if options["attn_mask"] is not None else None
    with torch.inference_mode(False), torch.no_grad():
        return Elsewhere(unchanged_attention(*(x.here for x in operands), **options))


class Backend(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What torch asks a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Of autocast."""
        return [torch.bfloat16]


def main(*pairs: str) -> None:
    """Runs, in a process of its own: a device's name is for the whole process."""
    from flatq.pipeline import run as pipeline
    from flatq.plan import preview
    from flatq.recipe.grammar import Recipe

    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    functional.scaled_dot_product_attention = attention
    for caller in (pipeline, preview):
        caller.resolve_device = lambda wanted: NAME if wanted == NAME else "cpu"  # type: ignore[assignment]
    for recipe, out in zip(pairs[::2], pairs[1::2], strict=True):
        with Away():
            preview.plan(Recipe.load(Path(recipe)), device=NAME)
            pipeline.run(Recipe.load(Path(recipe)), Path(out), device=NAME)


if __name__ == "__main__":
    main(*sys.argv[1:])
