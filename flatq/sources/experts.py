"""Experts in a checkpoint: one tensor per expert and linear, or all experts of a layer in one tensor.

flatq's decoder has the experts of a layer as slices of three matrices (``flatq.model.experts``), so tensors are put
together while they are read. Both spellings are read: ``experts.5.gate_proj.weight`` of published checkpoints, and
``experts.gate_up_proj`` with three axes, as transformers 5 has them in memory.

Axes: E experts, f inner channels of one expert, m d_model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatq.model.config import DecoderConfig
from flatq.model.dims import MLP_LINEARS
from flatq.model.family import Family

NAME = re.compile(
    r"model\.layers\.(\d+)\.(.+)\.experts\.(?:(\d+)\.(\w+)\.weight|(gate_up_proj|down_proj)(?:\.weight)?)"
)


@dataclass(frozen=True, slots=True)
class Gathered:
    """A linear of all experts of a layer.

    Attributes:
        names: the checkpoint's tensors that it is made of, in order.
        shape: of the whole, as far as the tensors fit together; of the first that does not, otherwise.
        join: makes it from the tensors.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    join: Callable[[Sequence[Tensor]], Tensor]


def gathered(
    family: Family, config: DecoderConfig, usual: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Gathered]:
    """The linears of experts in a checkpoint, by flatq's name.

    Args:
        family: of the checkpoint; without experts there are none.
        config: its configuration.
        usual: each name of the checkpoint, and its name in a plain checkpoint.
        shapes: of the tensors, by name of the checkpoint.
    """
    single: dict[str, dict[int, str]] = {}
    found: dict[str, Gathered] = {}
    linears = {hub.rpartition(".")[2]: ours for ours, hub, _ in family.names.inside if ours in MLP_LINEARS}
    for name, plain in usual.items():
        match = NAME.fullmatch(plain) if config.experts else None
        if match is None:
            continue
        layer, _, expert, linear, stack = match.groups()
        if stack is not None:
            found |= _unstacked(f"layers.{layer}", stack, name, shapes[name])
        elif linear in linears:
            single.setdefault(f"layers.{layer}.{linears[linear]}.weight", {})[int(expert)] = name
    return found | {
        ours: _joined(ours, tuple(names[number] for number in range(config.experts)), shapes)
        for ours, names in single.items()
        if sorted(names) == list(range(config.experts))
    }


def missing_experts(config: DecoderConfig, usual: Mapping[str, str]) -> list[str]:
    """Experts that a checkpoint with one tensor per expert lacks or should not have, one for each linear of a layer."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for plain in usual.values():
        match = NAME.fullmatch(plain) if config.experts else None
        if match is not None and match[3] is not None:
            numbers.setdefault((f"model.layers.{match[1]}.{match[2]}.experts", match[4]), set()).add(int(match[3]))
    wanted = set(range(config.experts))
    return [
        f"tensor {path}.{min(wanted - there)}.{linear}.weight is missing: the layer has {len(there)} of "
        f"{config.experts} experts"
        if wanted - there
        else f"tensor {path}.{max(there)}.{linear}.weight is of an expert beyond the {config.experts} of config.json"
        for (path, linear), there in numbers.items()
        if there != wanted
    ]


def of_an_expert(plain: str) -> bool:
    """Whether a name of a plain checkpoint is that of an expert's tensor, or of all experts of a layer."""
    return NAME.fullmatch(plain) is not None


def _joined(ours: str, names: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]) -> Gathered:
    axis = 1 if ours.endswith(".down.weight") else 0
    first, *others = (shapes[name] for name in names)
    odd = next((shape for shape in others if shape != first), None)
    if odd is not None or len(first) != 2:
        return Gathered(names, odd or first, lambda parts: parts[0])
    shape = [*first]
    shape[axis] *= len(names)
    return Gathered(names, tuple(shape), lambda parts: torch.cat([*parts], axis))


def _unstacked(layer: str, stack: str, name: str, shape: tuple[int, ...]) -> dict[str, Gathered]:
    """``gate_up_proj`` [E, 2 f, m] or ``down_proj`` [E, m, f]."""
    if len(shape) != 3:
        return {}
    experts, rows, columns = shape
    if stack == "down_proj":
        down = Gathered((name,), (rows, experts * columns), lambda parts: parts[0].permute(1, 0, 2).flatten(1))
        return {f"{layer}.down.weight": down}
    whole = (experts * (rows // 2), columns)
    return {
        f"{layer}.gate.weight": Gathered((name,), whole, lambda parts: parts[0][:, : rows // 2].flatten(0, 1)),
        f"{layer}.up.weight": Gathered((name,), whole, lambda parts: parts[0][:, rows // 2 :].flatten(0, 1)),
    }
