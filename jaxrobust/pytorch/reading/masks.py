"""Boolean masks as indices: where they are known, the places that they name are written down.

XLA computes with sizes that are known. A mask that no image changes says how many it chooses."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrobust.pytorch.program import Of, OperatorCall

_INDEXED = {"aten.index.Tensor", "aten.index_put.default"}


def resolved(
    exported: Any, steps: Sequence[OperatorCall], values: Mapping[str, Any]
) -> tuple[OperatorCall, ...]:
    """Put places for known masks into the steps of a program; a mask of images is refused."""
    nodes = {node.name: node for node in exported.graph.nodes}
    return tuple(
        _resolved(step, nodes, values) if step.operator in _INDEXED else step for step in steps
    )


def _resolved(step: OperatorCall, nodes: dict[str, Any], values: Mapping[str, Any]) -> OperatorCall:
    import torch

    indices: list[Any] = []
    for index in step.operands[1]:
        node = nodes.get(index.name) if isinstance(index, Of) else None
        value = node.meta.get("val") if node is not None else None
        if value is None or value.dtype != torch.bool:
            indices.append(index)
            continue
        known = values.get(index.name)
        if known is not None:
            indices += [tuple(places.tolist()) for places in known.nonzero(as_tuple=True)]
        elif _puts_one_number(step, nodes):
            indices.append(index)
        else:
            raise ValueError(
                f"{step.line}: a mask that depends on the images chooses how many numbers there "
                "are, and sizes that depend on the images cannot be compiled; use "
                "torch.where(mask, x, 0), which keeps the size"
            )
    return step._replace(operands=(step.operands[0], tuple(indices), *step.operands[2:]))


def _puts_one_number(step: OperatorCall, nodes: dict[str, Any]) -> bool:
    if step.operator != "aten.index_put.default" or not isinstance(step.operands[2], Of):
        return False
    value = nodes[step.operands[2].name].meta.get("val")
    return len(value.shape) == 0 and sum(each is not None for each in step.operands[1]) == 1
