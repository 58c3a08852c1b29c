"""A PyTorch module as a `Trainable`: the programs of its two modes, and its state dict."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxrobust.pytorch.program import Of, OperatorCall, Program, differences
from jaxrobust.pytorch.reading import changing, exporting, refusals, steps, wrappers
from jaxrobust.pytorch.reading.refusals import is_draw, line
from jaxrobust.pytorch.trainable import Trainable, state_dict
from jaxrobust.types import Classifier, unmasked

_COUNTER, _INVERSE = "num_batches_tracked", "aten.reciprocal.default"
_BATCH_NORM, _MOMENTUM = "_native_batch_norm_legit", -2  # the position of an operand
_OF_EVALUATION = "aten._native_batch_norm_legit_no_training.default"
# Relative to the largest float32 number: rounding of a deep network; wrong rules give 1e-1.
_ROUNDING = 1e-3
_MEAN = "running_mean"
_SPREAD = 0.1  # of a standard deviation: the smallest scale for errors of a mean
_STEP = 0.1  # change of parameters between two passes, to reveal frozen ones
_WEIGHTED = 3  # a numbered part with at least this many weighted parts is a block


def trainable(module: Any, image: tuple[int, int, int], *, output: str | None = None) -> Trainable:
    """Export both modes of a module for images H, W, C.

    Args:
      module: `torch.nn.Module` on the CPU, in float32, from images f32[B,C,H,W] in [0, 1] to
        logits f32[B,K]. Parameters that do not require gradients stay frozen.
      image: sides and channels of an image.
      output: names the logits among several results, as in `pytorch.torch.from_module`.
    Raises:
      ValueError: training does not support the module; the message names the line.
    """
    module = wrappers.inside(module)
    _check(module)
    exporting.check(module, random=True, modes=False)
    with _unchanged(module), wrappers.uncompiled(), _cumulative(module) as norms:
        changing.check(module, image)
        module.eval()
        evaluation = _averaged(_program(module, image, output, train=False), norms)
        module.train()
        training = _averaged(_program(module, image, output, train=True), norms)
    return _of(module, evaluation, training, image)


def check_agreement(module: Any, network: Trainable, net: Classifier) -> None:
    """Compare a module with its network at equal weights, in both modes if nothing draws.

    This happens twice, before and after a change of all parameters. All tensors after a pass in
    training mode are compared too.

    Args:
      module: a new one, because it gets the network's state dict and is put into training mode.
      net: the network's functions, which are compiled.
    Raises:
      ValueError: logits differ, or tensors after a pass do.
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
                result = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
            expected = steps.chosen(result, next(iter(network.training.results))).numpy()
            logits, new_stats = passes[train](params, stats, x)
            fault = f"gives different logits from PyTorch in {mode} mode"
            _check_close(logits, expected, expected[:, unmasked(expected)], fault)
            stats = new_stats if train else stats
            state = state_dict(network, {**params, **stats})
            their_state = {name: t.numpy() for name, t in module.state_dict().items()}
            for name, array in their_state.items():
                scale, variance = array, f"{name.removesuffix(_MEAN)}running_var"
                if name.endswith(_MEAN) and variance in their_state:
                    # After another norm, a mean is 0 up to rounding, which scales with the spread.
                    scale = np.append(array, _SPREAD * np.sqrt(their_state[variance]))
                fault = f"leaves a different {name} from PyTorch after a pass in {mode} mode"
                _check_close(state[name], array, scale, fault)
        params = {name: _stepped(array) for name, array in params.items()}


def _check_close(values: Any, expected: np.ndarray, scale: np.ndarray, fault: str) -> None:
    """Refuse values with errors beyond rounding, relative to the largest number of `scale`."""
    error = differences(values, expected)[0].max(initial=0)
    error /= max(np.abs(scale[np.isfinite(scale)]).max(initial=0), 1e-6)
    if not error <= _ROUNDING:
        raise ValueError(
            f"its program {fault}: they differ by {error:.1e} of the largest value, but rounding "
            f"explains only {_ROUNDING}. A pass may depend on earlier passes only through buffers; "
            "if yours does, report this error with the module"
        )


def _stepped(array: Any) -> Any:
    """Change each number by up to a tenth; none crosses 0."""
    step = _STEP * np.cos(np.arange(array.size, dtype=np.float32)).reshape(array.shape)
    return np.where(array == 0, _STEP * np.abs(step), array * (1 + step)).astype(np.float32)


def _check(module: Any) -> None:
    """Raise `ValueError` for lazy weights, or if no weight is trained."""
    import torch

    refusals.check(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{name} is not initialized: the module is lazy; call it once on a batch of images "
                "before you return it"
            )
        if tensor.is_complex():
            raise ValueError(
                f"{name} is complex, which no optimizer here supports; keep its real and "
                "imaginary parts as two parameters"
            )
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            "it has no parameter that requires a gradient, so there is nothing to train; call "
            "module.requires_grad_(True) on the parts to train"
        )


@contextlib.contextmanager
def _unchanged(module: Any) -> Iterator[None]:
    """Restore a module's modes and tensors afterwards."""
    modes = {part: part.training for part in module.modules()}
    tensors = [*module.parameters(), *module.buffers()]
    numbers = [(tensor, tensor.data, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for tensor, data, copy in numbers:
            data.copy_(copy)
            tensor.data = data


@contextlib.contextmanager
def _cumulative(module: Any) -> Iterator[dict[float, str]]:
    """Give each batch norm with cumulative averages, 1/n, a unique momentum that marks it."""
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
    """Replace each marked momentum by 1/n with that norm's counter."""
    by_name = {step.name: step for step in program.steps}
    counts = {}  # value of a counter in the course of a pass -> its name
    for counter, value in program.moved.items():
        while value in by_name and counter in norms.values():
            counts[value] = counter
            value = by_name[value].operands[0].name
    current = {key: value for value, key in program.weights.items()}
    new_steps, blocks = [], dict(program.blocks)
    for step in program.steps:
        if step.name in counts:
            current[counts[step.name]] = step.name
        if _BATCH_NORM in step.operator and (norm := norms.get(step.operands[_MOMENTUM])):
            momentum: Any = 0.0  # nothing is averaged
            if norm in program.moved and step.operator != _OF_EVALUATION:
                name, count = f"{step.name}_momentum", (Of(current[norm]),)
                new_steps.append(OperatorCall(name, _INVERSE, count, {}, step.line))
                momentum = Of(name)
                if step.name in blocks:
                    blocks[name] = blocks[step.name]
            operands = list(step.operands)
            operands[_MOMENTUM] = momentum
            step = step._replace(operands=tuple(operands))
        new_steps.append(step)
    return program._replace(steps=tuple(new_steps), blocks=blocks)


def _program(
    module: Any, image: tuple[int, int, int], output: str | None, *, train: bool
) -> Program:
    import torch

    exported, single = exporting.exported(module, image, trainable=True)
    mode = "in training mode" if train else "in evaluation mode"
    if single:
        raise ValueError(f"{mode}, its code fixes the number of images; use x.shape[0]")
    norm_buffers = _norm_buffers(module)
    changing.check_memory(exported, norm_buffers)
    exported = exporting.decomposed(exported)
    nodes = {node.name: node for node in exported.graph.nodes}
    mutation = torch.export.graph_signature.OutputKind.USER_INPUT_MUTATION
    for spec in exported.graph_signature.output_specs:
        if spec.kind == mutation:
            raise ValueError(
                f"{line(nodes[spec.arg.name])}: it changes its input images in place, "
                "which the next step of an attack would see; compute x * 2 instead of x.mul_(2)"
            )
    for node in nodes.values() if not train else ():
        if node.op == "call_function" and is_draw(str(node.target)):
            raise ValueError(
                f"{line(node)}: {node.target} draws random numbers in evaluation mode, so attacks "
                "on it prove little; draw only if self.training is true"
            )
    program, _ = steps.read(exported, random=train, trainable=True)
    logits = steps.chosen_output(exported, program, output)
    axes = {name: _image_axis(node) for name, node in nodes.items() if name in program.draws}
    if changed := program.moved.keys() - norm_buffers:
        raise ValueError(
            f"the buffer {min(changed)} changes {mode}, but does not belong to a batch norm, as "
            "training requires; compute it from the images, or make it a parameter"
        )
    results = {logits: program.results[logits]}
    return program._replace(results=results, image_axes=axes, blocks=blocks_of(module, exported))


def blocks_of(module: Any, exported: Any) -> dict[str, str]:
    """Return the name of the innermost block for each step that belongs to one.

    A block is a part whose name ends with a number, as in lists and sequences (`layer1.0`,
    `stages.2.blocks.5`), and that has several parts with weights. A convolution with its norm is
    too small.
    """

    def weighted(part: Any) -> int:
        return sum(any(True for _ in p.parameters(recurse=False)) for p in part.modules())

    names = {
        name
        for name, part in module.named_modules()
        if name[-1:].isdigit() and weighted(part) >= _WEIGHTED
    }
    blocks = {}
    for node in exported.graph.nodes:
        within = [name for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
        if inside := [name for name in within if name in names]:
            blocks[node.name] = inside[-1]
    return blocks


def _norm_buffers(module: Any) -> set[str]:
    """Name the buffers of batch norms, recognized by their buffers and not by their class."""
    import torch

    names = set()
    for name, part in module.named_modules():
        buffers = [buffer for buffer, _ in part.named_buffers(recurse=False)]
        tracks = {"running_mean", "running_var"} <= {*buffers}
        if tracks or isinstance(part, torch.nn.modules.batchnorm._NormBase):
            names |= {f"{name}.{buffer}" if name else buffer for buffer in buffers}
    return names


def _image_axis(node: Any) -> int:
    """Find the image axis of a node's random draw; `ValueError`: no axis or several."""
    value = node.meta["val"]
    shape = (value[0] if isinstance(value, tuple | list) else value).shape
    axes = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(axes) != 1:
        raise ValueError(
            f"{line(node)}: {node.target} draws {tuple(map(str, shape))} in training, the same for "
            "all images of a batch; draw for each image (x.new_empty(x.shape[0], 1, 1, 1)), so "
            "that a step does not depend on how its batch is divided"
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
        first_name = first.setdefault(id(tensor), name)
        if first_name != name:
            tied[name] = first_name
    tensors = {**state, **buffers, **dict(module.named_parameters())}
    arrays = {n: np.array(t.detach().numpy()) for n, t in tensors.items() if n not in tied}
    floats = {n: a for n, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
    evaluation, training = (
        program._replace(weights={k: tied.get(name, name) for k, name in program.weights.items()})
        for program in (evaluation, training)
    )
    # The classifier parts that the module declares, as timm's do.
    config = getattr(module, "default_cfg", None)
    head = config.get("classifier") if isinstance(config, Mapping) else None
    head = (head,) if isinstance(head, str) else tuple(head or ())
    if not all(any(name.startswith(f"{part}.") for name in params) for part in head):
        head = ()
    return Trainable(
        evaluation=evaluation,
        training=training,
        params={name: a for name, a in floats.items() if name in params},
        stats={
            name: a
            for name, a in arrays.items()
            if (name in floats or name in training.moved) and name not in params
        },
        tied=tied,
        integers={name: a for name, a in arrays.items() if name not in floats and name in state},
        names=tuple(state),
        image=image,
        head=head,
    )
