"""The blocks of a module: which of its numbered parts each step of a program belongs to."""

from typing import Any

_WEIGHTED = 3  # parts with weights of their own, from which on a numbered part is a block


def blocks(module: Any, exported: Any) -> dict[str, str]:
    """Return the name of the innermost block for each step that belongs to one.

    A block is a part whose name ends with a number, as in lists and sequences (`layer1.0`,
    `stages.2.blocks.5`), and that has several parts with weights: a convolution and its norm are
    none.
    """
    known = {
        name
        for name, part in module.named_modules()
        if name[-1:].isdigit() and _parts_with_weights(part) >= _WEIGHTED
    }
    found = {}
    for node in exported.graph.nodes:
        within = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if inside := [name for name in within if name in known]:
            found[node.name] = inside[-1]
    return found


def _parts_with_weights(part: Any) -> int:
    return sum(any(True for _ in each.parameters(recurse=False)) for each in part.modules())
