"""A PyTorch module as a `Trainable`: the programs of its two modes, and its state dict."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxrobust.pytorch.program import Of, OperatorCall, Program
from jaxrobust.pytorch.reading import changing, exporting, hierarchy, refusals, wrappers
from jaxrobust.pytorch.reading.drawing import is_draw
from jaxrobust.pytorch.reading.refusals import line
from jaxrobust.pytorch.reading.results import chosen, chosen_output
from jaxrobust.pytorch.trainable import Trainable, state_dict
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
    module = wrappers.inside(module)
    check(module)
    exporting.check(module, random=True, modes=False)
    with _as_it_was(module), wrappers.uncompiled(), _cumulative(module) as norms:
        changing.check(module, image)
        module.eval()
        evaluation = _averaged(_program(module, image, output, train=False), norms)
        module.train()
        training = _averaged(_program(module, image, output, train=True), norms)
    return _of(module, evaluation, training, image)


_COUNTER, _INVERSE = "num_batches_tracked", "aten.reciprocal.default"
_BATCH_NORM, _MOMENTUM = "_native_batch_norm_legit", -2  # the place of an operand
_OF_EVALUATION = "aten._native_batch_norm_legit_no_training.default"

# Of the largest float32 number: rounding of a deep network; a wrong rule gives 1e-1.
_ROUNDING = 1e-3
_MEAN = "running_mean"
_SPREAD = 0.1  # of a standard deviation: the least that errors of a mean are measured by
_STEP = 0.1  # by which parameters differ between two passes, so that one that is a constant shows


def check_agreement(module: Any, network: Trainable, net: Classifier) -> None:
    """Compare a module that holds a network's weights with it, in both modes where nothing draws.

    That is done twice, before and after a change of all parameters, and what a pass in training
    mode leaves of all tensors is compared too.

    Args:
      module: made anew, for it gets the network's state dict and is put into training mode.
      net: the network's functions, which are compiled.
    Raises:
      ValueError: they give other logits, or leave other tensors.
    """
    import torch

    params, stats = net.init(jax.random.key(0))
    x = np.random.default_rng(0).random((2, *network.image), np.float32)
    passes = {train: jax.jit(functools.partial(net.apply, train=train)) for train in (False, True)}
    for _ in range(2):
        state = state_dict(network, {**params, **stats})
        module.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in state.items()})
        for train in (False, True)[: 1 if network.training.draws else 2]:
            mode = "training" if train else "evaluation"
            module.train(train)
            with torch.no_grad(), wrappers.uncompiled():
                made = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
            theirs = chosen(made, next(iter(network.training.results))).numpy()
            logits, after = passes[train](params, stats, x)
            said = f"gives other logits than PyTorch in {mode} mode"
            _check_close(logits, theirs, theirs[:, unmasked(theirs)], said)
            stats = after if train else stats
            ours = state_dict(network, {**params, **stats})
            for name, tensor in module.state_dict().items():
                said = f"leaves another {name} than PyTorch after a pass in {mode} mode"
                size = _sizes(name, module.state_dict())
                _check_close(ours[name], tensor.numpy(), size, said)
        params = {name: _stepped(array) for name, array in params.items()}


def _sizes(name: str, state: Mapping[str, Any]) -> np.ndarray:
    """Return the numbers that errors of a tensor are measured by.

    Behind another norm a mean is 0 but for rounding, which follows the spread of its values.
    """
    sizes = state[name].numpy()
    variance = state.get(f"{name.removesuffix(_MEAN)}running_var")
    if not name.endswith(_MEAN) or variance is None:
        return sizes
    return np.append(sizes, _SPREAD * np.sqrt(variance.numpy()))


def _check_close(ours: Any, theirs: np.ndarray, size: np.ndarray, said: str) -> None:
    ours, theirs = np.asarray(ours, np.float64), theirs.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        apart = np.where(same, 0, np.abs(ours - theirs)).max(initial=0)
    apart /= max(np.abs(size[np.isfinite(size)]).max(initial=0), 1e-6)
    if not apart <= _ROUNDING:
        raise ValueError(
            f"its program {said}: {apart:.1e} of the largest apart, where rounding explains "
            f"{_ROUNDING}; a pass may depend on earlier ones through buffers alone; if yours does, "
            "report it with the module"
        )


def _stepped(array: Any) -> Any:
    """Move each number by up to a tenth, none over 0."""
    step = _STEP * np.cos(np.arange(array.size, dtype=np.float32)).reshape(array.shape)
    return np.where(array == 0, _STEP * np.abs(step), array * (1 + step)).astype(np.float32)


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
    """Put back modes and tensors, which the looks at a module change."""
    modes = {part: part.training for part in module.modules()}
    tensors = [*module.parameters(), *module.buffers()]
    before = [(tensor.data, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for tensor, (data, numbers) in zip(tensors, before, strict=True):
            data.copy_(numbers)
            tensor.data = data


@contextlib.contextmanager
def _cumulative(module: Any) -> Iterator[dict[float, str]]:
    """Give batch norms of cumulative averages, 1/n, a momentum each by which programs know them."""
    import torch

    norms = {
        2.0**-40 * (1 + place): (name, part)
        for place, (name, part) in enumerate(module.named_modules())
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        and part.momentum is None
        and part.num_batches_tracked is not None
        and type(part).forward.__module__.startswith(("torch.", "timm."))
    }
    for mark, (_, part) in norms.items():
        part.momentum = mark  # type: ignore[assignment]
    try:
        yield {mark: f"{name}.{_COUNTER}".lstrip(".") for mark, (name, _) in norms.items()}
    finally:
        for _, part in norms.values():
            part.momentum = None


def _averaged(program: Program, norms: Mapping[float, str]) -> Program:
    """Put 1/n, of each norm's counter, where its mark is the momentum."""
    value_of = {key: value for value, key in program.weights.items()}
    by_name = {step.name: step for step in program.steps}
    counts = {}  # value of a counter in the course of a pass -> its name
    for counter, value in program.moved.items():
        while value in by_name and counter in norms.values():
            counts[value] = counter
            value = by_name[value].operands[0].name
    now, steps, blocks = dict(value_of), [], dict(program.blocks)
    for step in program.steps:
        if step.name in counts:
            now[counts[step.name]] = step.name
        if _BATCH_NORM in step.operator and (norm := norms.get(step.operands[_MOMENTUM])):
            momentum: Any = 0.0  # nothing moves
            if norm in program.moved and step.operator != _OF_EVALUATION:
                inverse = OperatorCall(
                    f"{step.name}_momentum", _INVERSE, (Of(now[norm]),), {}, step.line
                )
                steps.append(inverse)
                momentum = Of(inverse.name)
                if step.name in blocks:
                    blocks[inverse.name] = blocks[step.name]
            operands = list(step.operands)
            operands[_MOMENTUM] = momentum
            step = step._replace(operands=tuple(operands))
        steps.append(step)
    return program._replace(steps=tuple(steps), blocks=blocks)


def _program(
    module: Any, image: tuple[int, int, int], output: str | None, *, train: bool
) -> Program:
    exported, single = exporting.exported(module, image, trainable=True)
    mode = "in training mode" if train else "in evaluation mode"
    if single:
        raise ValueError(
            f"{mode} its code is written for one number of images; compute with x.shape[0]"
        )
    changing.check_memory(exported, _norm_buffers(module))
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
    buffers = dict(module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in [*params.items(), *state.items(), *buffers.items()]:
        own = first.setdefault(id(tensor), name)
        if own != name:
            tied[name] = own
    tensors = {**state, **buffers, **dict(module.named_parameters())}
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
