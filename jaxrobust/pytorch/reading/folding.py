"""What of an exported program depends on no image, which PyTorch computes once.

So an orthogonal or normalised weight is an array here, with PyTorch's own bits. A weight that is
only laid out in another way stays the module's own, by its name."""

from collections.abc import Iterable
from typing import Any

from jaxrobust.pytorch.program import OWN
from jaxrobust.pytorch.reading.custom_gradients import HOLE

COMPUTED = "computed."  # begins the key of a weight that is computed of the module's own
_LAYOUT = {
    f"aten.{name}"
    for name in (
        *("view.default", "permute.default", "unsqueeze.default", "squeeze.dims", "alias.default"),
        *("expand.default", "slice.Tensor", "select.int", "split_with_sizes.default"),
        "clone.default",
    )
} | {"getitem"}


class Free:
    """The values that no image changes, as PyTorch computes them, perhaps in double precision."""

    def __init__(
        self, weights: dict[str, Any], constants: dict[str, Any], dtype: str, double: bool = False
    ) -> None:
        import torch

        self._own = getattr(torch, dtype)
        self._wide = torch.float64 if double else self._own
        self.constants = set(constants)  # and what is computed of nothing else
        self.values = {name: self._typed(value) for name, value in (constants | weights).items()}
        self._laid_out = set(weights)  # weights, and the same numbers in another layout

    def _typed(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            value = value.detach()
            return value.to(self._wide) if value.dtype == self._own else value
        if isinstance(value, torch.dtype) and value in (torch.uint16, torch.uint32, torch.uint64):
            return torch.int64  # of the places in `eye`; PyTorch cannot count in the others
        return self._wide if value is self._own else value

    def takes(self, node: Any, name: str, rows: Iterable[str]) -> bool:
        """Compute what a node, in the graph's order, gives; True: no step of the program does."""
        import torch

        inputs = node.args[0] if name == OWN else node.all_input_nodes
        if name == HOLE or not all(each.name in self.values for each in inputs):
            return False
        operands = torch.fx.map_arg((node.args, node.kwargs), self._read)
        if name == OWN:  # no gradient of it is asked for
            self.values[node.name] = operands[0][0]
        else:
            args, named = torch.fx.node.map_aggregate(operands, self._typed)
            with torch.no_grad():
                self.values[node.name] = node.target(*args, **named)
        names = {each.name for each in inputs}
        if names <= self.constants:
            self.constants.add(node.name)
        if name in _LAYOUT and (name in rows or name == "getitem") and names <= self._laid_out:
            self._laid_out.add(node.name)
            return not names
        return True

    def _read(self, node: Any) -> Any:
        return self.values.get(node.name)

    def is_number(self, name: str) -> bool:
        """Tell whether a value is a plain number, such as a size."""
        return isinstance(self.values.get(name), bool | int | float)
