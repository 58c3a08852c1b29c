"""A PyTorch module as a `Trainable`: the programs of its two modes, and its state dict."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxrobust.interop.program import Program
from jaxrobust.interop.reading import exporting, hierarchy, refusals
from jaxrobust.interop.reading.drawing import is_draw
from jaxrobust.interop.reading.refusals import line
from jaxrobust.interop.reading.results import chosen, chosen_output
from jaxrobust.interop.trainable import Trainable, state_dict
from jaxrobust.types import Classifier, unmasked


def trainable(module: Any, image: tuple[int, int, int], *, output: str | None = None) -> Trainable:
    """Write down both modes of a module for images H, W, C.

    Args:
      module: `torch.nn.Module` on the CPU, in float32; of images f32[B,C,H,W] in [0, 1] it gives
        logits f32[B,K]. Parameters that do not require gradients stay as they are.
      image: sides and channels of an image.
      output: which of several results are the logits, as of `interop.torch.from_module`.
    Raises:
      ValueError: the module has what cannot be trained here; the message names its line.
    """
    check(module)
    exporting.check(module, random=True, modes=False)
    with _as_it_was(module):
        module.eval()
        evaluation = _program(module, image, output, train=False)
        module.train()
        training = _program(module, image, output, train=True)
    return _of(module, evaluation, training, image)


# Of float32 logits, relative to the largest: rounding of a deep network; a wrong rule gives 1e-1.
_ROUNDING = 1e-3


def check_agreement(module: Any, network: Trainable, net: Classifier) -> None:
    """Compare a module that holds a network's weights with it, in both modes where nothing draws.

    Args:
      module: made anew, for it gets the network's state dict and is put into training mode.
      net: the network's functions, which are compiled.
    Raises:
      ValueError: they give other logits.
    """
    import torch

    params, stats = net.init(jax.random.key(0))
    state = state_dict(network, {**params, **stats})
    module.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in state.items()})
    x = np.random.default_rng(0).random((2, *network.image), np.float32)
    for train in (False, True)[: 1 if network.training.draws else 2]:
        module.train(train)
        with torch.no_grad():
            made = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        theirs = chosen(made, next(iter(network.training.results))).numpy()
        ours = np.asarray(jax.jit(functools.partial(net.apply, train=train))(params, stats, x)[0])
        largest = np.abs(theirs[:, unmasked(theirs)]).max()
        apart = float(np.abs(ours - theirs).max() / max(largest, 1e-6))
        if not apart <= _ROUNDING:
            mode = "training" if train else "evaluation"
            raise ValueError(
                f"its program gives other logits than PyTorch in {mode} mode: {apart:.1e} of the "
                f"largest apart, where rounding explains {_ROUNDING}; report it with the module"
            )


def check(module: Any) -> None:
    """Raise `ValueError` for weights that are none yet, or of which none is trained."""
    import torch

    refusals.check(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{name} is not initialised: the module is lazy; call it on a batch of images once "
                "before you return it"
            )
        if tensor.is_complex():
            raise ValueError(
                f"{name} is of complex numbers, which no optimiser here takes; keep its real and "
                "imaginary parts as two parameters"
            )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            "it has no parameter that requires a gradient, so there is nothing to train; call "
            "module.requires_grad_(True) on the parts that shall be trained"
        )


@contextlib.contextmanager
def _as_it_was(module: Any) -> Iterator[None]:
    """Put back modes and buffers, which the looks at a module change."""
    modes = {part: part.training for part in module.modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])


def _program(
    module: Any, image: tuple[int, int, int], output: str | None, *, train: bool
) -> Program:
    exported, single = exporting.exported(module, image)
    mode = "in training mode" if train else "in evaluation mode"
    if single:
        raise ValueError(
            f"{mode} its code is written for one number of images; compute with x.shape[0]"
        )
    exported = exporting.decomposed(exported)
    _check_images_stay(exported)
    if not train:
        _check_draws(exported)
    program, _ = exporting.read(exported, random=train, trainable=True)
    logits = chosen_output(exported, program, output)
    axes = {
        node.name: _image_axis(node)
        for node in exported.graph.nodes
        if node.name in set(program.draws)
    }
    changed = program.moved.keys() - _norm_buffers(module)
    if changed:
        name = min(changed)
        raise ValueError(
            f"the buffer {name} changes {mode}, and it is no batch norm's; training here keeps "
            "only those: compute what it holds from the images, or make it a parameter"
        )
    results = {logits: program.results[logits]}
    blocks = hierarchy.blocks(module, exported)
    return program._replace(results=results, image_axes=axes, blocks=blocks)


def _check_images_stay(exported: Any) -> None:
    import torch

    kind = torch.export.graph_signature.OutputKind.USER_INPUT_MUTATION
    for spec in exported.graph_signature.output_specs:
        if spec.kind == kind:
            written = [node for node in exported.graph.nodes if node.name == spec.arg.name]
            raise ValueError(
                f"{line(written[0])}: it changes the images that it is given, in place, which the "
                "next step of an attack would meet; compute x * 2 instead of x.mul_(2)"
            )


def _check_draws(exported: Any) -> None:
    for node in exported.graph.nodes:
        if node.op == "call_function" and is_draw(str(node.target)):
            raise ValueError(
                f"{line(node)}: {node.target} draws random numbers in evaluation mode, and attacks "
                "on what is never the same twice say little; draw only where self.training is true"
            )


def _norm_buffers(module: Any) -> set[str]:
    import torch

    kinds = torch.nn.modules.batchnorm._NormBase
    return {
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        if isinstance(part, kinds) or _tracks(part)
        for buffer, _ in part.named_buffers(recurse=False)
    }


def _tracks(part: Any) -> bool:
    """Tell whether a module is a batch norm by what it keeps, whoever wrote it."""
    return {"running_mean", "running_var"} <= {
        name for name, _ in part.named_buffers(recurse=False)
    }


def _image_axis(node: Any) -> int:
    """Find the axis of what a node draws that holds images; `ValueError`: no axis or several."""
    value = node.meta["val"]
    shape = (value[0] if isinstance(value, tuple | list) else value).shape
    axes = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(axes) != 1:
        raise ValueError(
            f"{line(node)}: {node.target} draws {tuple(map(str, shape))} in training, the same for "
            "all images of a batch; draw for each image (x.new_empty(x.shape[0], 1, 1, 1)), so "
            "that a step is the same however its batch is divided"
        )
    return axes[0]


def _of(
    module: Any, evaluation: Program, training: Program, image: tuple[int, int, int]
) -> Trainable:
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    state = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in [*params.items(), *state.items()]:
        own = first.setdefault(id(tensor), name)
        if own != name:
            tied[name] = own
    tensors = {**state, **dict(module.named_buffers()), **dict(module.named_parameters())}
    arrays = {
        name: np.array(tensor.detach().numpy())
        for name, tensor in tensors.items()
        if name not in tied
    }
    moved = training.moved
    floats = {name: a for name, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
    stats = {name: a for name, a in arrays.items() if name in floats or name in moved}
    evaluation, training = (
        program._replace(weights={k: tied.get(name, name) for k, name in program.weights.items()})
        for program in (evaluation, training)
    )
    return Trainable(
        evaluation=evaluation,
        training=training,
        params={name: a for name, a in floats.items() if name in params},
        stats={name: a for name, a in stats.items() if name not in params},
        tied=tied,
        integers={name: a for name, a in arrays.items() if name not in floats and name in state},
        names=tuple(state),
        image=image,
        head=_head(module, params),
    )


def _head(module: Any, params: Mapping[str, Any]) -> tuple[str, ...]:
    """Find what a module says of itself as timm's do: the names of its classifying parts."""
    said = getattr(module, "default_cfg", None)
    named = said.get("classifier") if isinstance(said, Mapping) else None
    parts = (named,) if isinstance(named, str) else tuple(named or ())
    there = [any(name.startswith(f"{part}.") for name in params) for part in parts]
    return parts if all(there) else ()
