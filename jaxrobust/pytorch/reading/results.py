"""Which of the results of a module are its logits."""

from typing import Any

from jaxrobust.pytorch.program import Program


def chosen_output(exported: Any, program: Program, requested: str | None) -> str:
    """Find the logits among the results; `ValueError`: `requested` is none, or several could be."""
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    shapes = {name: getattr(value, "shape", ()) for name, value in values.items()}
    results = {path: shapes.get(name or "", ()) for path, name in program.results.items()}
    could = [path for path, shape in results.items() if len(shape) == 2]
    listing = ", ".join(f"{path or 'a tensor'} {_shape(shape)}" for path, shape in results.items())
    if requested is not None and requested not in could:
        raise ValueError(f"it returns no logits {requested!r} [B,K]; there are {listing}")
    if requested is None and len(could) != 1:
        raise ValueError(
            f"it returns {listing}; say which are the logits [B,K] with --torch_output NAME"
            if could
            else f"it returns {listing}, and no logits [B,K]; make it return them"
        )
    return could[0] if requested is None else requested


def _shape(shape: Any) -> str:
    return "[" + ", ".join(str(n) if isinstance(n, int) else "B" for n in shape) + "]"


def chosen(result: Any, output: str) -> Any:
    """Return the logits among what a module returns, by the path that `exporting` gives them."""
    for key in output.split(".") if output else ():
        if isinstance(result, dict):
            result = result[key]
        elif isinstance(result, list | tuple) and key.isdigit():
            result = result[int(key)]
        else:
            result = getattr(result, key)
    return result
