"""Training steps and AutoAttack steps, compiled for absent chips: `--topology`."""

import argparse
import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from tools.hlo import bundles

if TYPE_CHECKING:  # JAX is imported where it is used, after `topology` has set its environment
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from jaxrobust.attacks import Setting
    from jaxrobust.types import LogitsFn

FLOAT32_PRODUCTS = 6  # bfloat16 products that a TPU makes for one full-precision float32 product


def _chips(args: argparse.Namespace) -> list[Any]:
    """Describe the chips of `--topology`; for GPUs, say what their figures lack."""
    from jaxrobust.doctor.programs import gpus, topology

    if getattr(args, "bundles", None):
        if args.topology.partition(":")[0] in gpus.CHIPS:
            raise ValueError(
                f"--bundles reads schedules for TPUs; for {args.topology}, give --traffic instead"
            )
        os.environ["LIBTPU_INIT_ARGS"] = bundles.flags(args.bundles)
    chips = topology.devices(args.topology)
    if chips[0].platform == "gpu":
        print(
            "Compiled, not run: no times are measured, no matrix tiles are tuned, and cuDNN "
            "plans nothing."
        )
        if getattr(args, "attention", None):
            from tools.gpu.programs import plain_attention

            plain_attention()
    return chips


def step(args: argparse.Namespace, load: Callable[..., "ConfigDict"]) -> None:
    """Compile the step of `bench_step` for absent chips, and print."""
    from tools.hlo import figures as hlo_figures

    chips = _chips(args)
    from jaxrobust.runtime.commandline.arguments import config_name
    from jaxrobust.runtime.devices import hardware
    from jaxrobust.training import build
    from jaxrobust.training.run import warnings

    config, fitted = warnings.fitted_batches(load(args, len(chips)), len(chips))
    for line in fitted:
        print(line)
    phase = build.phase(config, "train", 1000 * config.train.batch_size, devices=chips)
    images = config.train.batch_size // len(chips)
    fsdp, parts = phase.mesh.shape["fsdp"], config.train.microbatches
    share = "" if fsdp == len(chips) else f", --fsdp {len(chips)}"
    figures = hlo_figures.compiled(
        phase.step,
        *build.abstract_arguments(config, "train", phase),
        remedy=f"--batch {max(images // 2, 1)}{share} or --microbatches {2 * parts}",
        schedules=args.bundles,
    )
    chip = hardware.chip(chips[0].device_kind)
    flops = build.flops_per_image(config, "train") * images
    result = {
        "config": config_name(args.config),
        "model": config.model.name,
        "dtype": config.model.dtype,
        "topology": args.topology,
        "device": f"{len(chips)} x {chips[0].device_kind}",
        "batch_per_chip": images,
        "microbatches": parts,
        "fsdp": fsdp,
        "image_size": config.model.image_size,
        "attack_steps": config.attack.steps,
        "flops": flops,  # of the model, per chip and step
        **figures,
    }
    print(
        f"{result['model']} {result['image_size']} px, {images} images per chip in {parts} parts, "
        f"APGD-{result['attack_steps']}, {result['dtype']}, {result['device']} ({args.topology}), "
        f"state shared by {fsdp}"
    )
    result |= hlo_figures.show(figures, chip, flops=flops, images=images, by_part=args.traffic)
    if args.json:
        print(json.dumps(result))


class Block(NamedTuple):
    """A part of a network, alone."""

    name: str  # its path
    call: Callable[..., Any]  # of its variables and its input
    variables: Any  # as shapes
    features: Any  # its input, as shapes


class _Reached(Exception):
    """Raised when the first block is called, with its arguments."""


@contextlib.contextmanager
def _instead_of_blocks(module: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Replace block calls by `call`, with the block's own function, the block and arguments."""
    from flax import nnx

    with contextlib.ExitStack() as patched:
        for kind in {type(part) for _, part in nnx.iter_modules(module)}:
            own: Callable[..., Any] = kind.__call__  # type: ignore[operator]
            if "drop" in inspect.signature(own).parameters:

                def replaced(block: Any, *arguments: Any, own: Callable[..., Any] = own) -> Any:
                    return call(own, block, *arguments)

                patched.enter_context(mock.patch.object(kind, "__call__", replaced))
        yield


def blocks(net: Any, images: Any) -> list[Block]:
    """List a network's stem and the blocks that stochastic depth may drop, in order of calls."""
    import jax
    from flax import nnx

    from jaxrobust.models.modules.draws import Draws

    parts: dict[str, Block] = {}
    shapes = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype))

    def run(images: Any) -> Any:
        module = net.make(Draws(jax.random.key(0)))
        params = nnx.state(module, nnx.Param)
        nnx.update(module, jax.tree.map(lambda a: a.astype(net.dtype), params))
        paths = {id(part): ".".join(map(str, path)) for path, part in nnx.iter_modules(module)}
        whole, variables = nnx.split(module)

        def stem(variables: Any, images: Any) -> Any:
            module = nnx.merge(whole, variables)

            def reached(own: Any, block: Any, x: Any, *_: Any) -> Any:
                raise _Reached(x)

            with _instead_of_blocks(module, reached):
                try:
                    return module(images, False, None)
                except _Reached as first:
                    return first.args[0]

        def record(own: Any, block: Any, x: Any, drop: Any, train: Any) -> Any:
            graph, of_block = nnx.split(block)
            forward = lambda v, x: own(nnx.merge(graph, v), x, None, False)  # noqa: E731
            name = paths[id(block)]
            parts.setdefault(name, Block(name, forward, shapes(of_block), shapes(x)))
            return own(block, x, drop, train)

        parts["stem"] = Block("stem", stem, shapes(variables), shapes(images))
        with _instead_of_blocks(module, record):
            return module(images, False, None)

    jax.eval_shape(run, images)
    return [*parts.values()]


def block(args: argparse.Namespace, load: Callable[..., "ConfigDict"]) -> None:
    """Compile a single block of `bench_step`'s network for one absent chip."""
    from tools.hlo import figures as hlo_figures

    chips = _chips(args)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxrobust.config import network_of
    from jaxrobust.runtime.devices import hardware

    config = load(args, len(chips))
    images = config.train.batch_size // len(chips)
    net, side = network_of(config), config.model.image_size
    shape = jax.ShapeDtypeStruct((images, side, side, config.model.in_channels), jnp.float32)
    mesh = Mesh(np.array(chips[:1]), ("chip",))
    with jax.set_mesh(mesh):  # kernels query the chip that they are traced for
        stem, *found = blocks(net, shape)
    if not found:
        raise ValueError(
            f"--block: {config.model.name} is not divided into blocks; choose another "
            "network, such as vit_s, convnext_t, xcit_s12 or swin_b"
        )
    named = {"stem": stem} | {str(n): part for n, part in enumerate(found)}
    if args.block not in named:
        raise ValueError(
            f"--block {args.block}: {config.model.name} has a stem, and blocks 0 to {[*named][-1]}"
        )
    name, call, variables, features = named[args.block]
    params, rest = nnx.split_state(variables, nnx.Param, ...)
    sharding = NamedSharding(mesh, PartitionSpec())

    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (params, rest, features),
    )

    def forward(params: Any, rest: Any, x: Any) -> Any:
        return call(nnx.merge_state(params, rest), x)

    def attacked(params: Any, rest: Any, x: Any) -> Any:
        y, pull = jax.vjp(lambda x: forward(params, rest, x), x)
        return pull(y)

    def trained(params: Any, rest: Any, x: Any) -> Any:
        y, pull = jax.vjp(lambda params, x: forward(params, rest, x), params, x)
        return pull(y)

    chip = hardware.chip(chips[0].device_kind)
    print(
        f"{name} of {config.model.name}, {images} images of {side} px, {config.model.dtype}, one "
        f"{chips[0].device_kind}"
    )
    result: dict[str, Any] = {"model": config.model.name, "block": name, "batch_per_chip": images}
    programs = {"forward": forward, "input_gradient": attacked, "gradients": trained}
    for title, function in programs.items():
        figures = hlo_figures.compiled(jax.jit(function), *arguments, schedules=args.bundles)
        flops = figures["flops_executable"]
        print(f"{title.replace('_', ' ')}, {figures['hbm_bytes'] / 1e6:,.0f} MB of HBM")
        figures |= hlo_figures.show(figures, chip, flops=flops, images=images, by_part=args.traffic)
        result[title] = figures
    if args.json:
        print(json.dumps(result))


def abstract_step(
    mesh: "Mesh",
    setting: "Setting",
    logits_fn: "LogitsFn",
    *,
    slots: int,
    image: tuple[int, ...],
    search_fn: "LogitsFn | None" = None,
) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    """Return the engine's step program, its arguments as shapes, and the passes per step."""

    import jax
    import jax.numpy as jnp

    from jaxrobust.attacks import MACHINES
    from jaxrobust.evaluation.engine.schedule import SlotRows
    from jaxrobust.evaluation.engine.slots import begin, prepare_program, programs

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    flags, numbers = array(jnp.bool, slots), array(jnp.int32, slots)
    each: dict[str, Any] = dict.fromkeys(("fresh", "keep"), flags)
    each |= dict.fromkeys(("labels", "targets", "restarts", "first"), numbers)
    arrays = {"images": array(jnp.float32, slots, *image), "ids": array(jnp.uint32, slots)}
    rows = SlotRows(**each, **arrays)
    epsilon, root, number = array(jnp.float32), array(jnp.uint32, 2), array(jnp.uint32)
    state = jax.eval_shape(functools.partial(begin, setting), epsilon, root, number, rows)
    floor = array(jnp.int32, mesh.size)
    machine = MACHINES[setting.machine].make(setting, jnp.float32(0))
    passes = 1 + machine.gradient + (machine.check is not None)
    _, advance = programs(mesh, setting, "", "")
    both = (logits_fn, search_fn)
    made = jax.eval_shape(prepare_program(mesh, ""), *both, state.adversarial, state.keys)
    return advance, (*both, epsilon, state, array(jnp.int32), floor, made), passes


def abstract_verdict(
    mesh: "Mesh", logits_fn: "LogitsFn", *, slots: int, image: tuple[int, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return (the program of a deciding forward pass, its arguments), as above."""
    import jax
    import jax.numpy as jnp

    from jaxrobust.evaluation.engine.slots import forward_program

    root, draw = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.uint32)
    images = jax.ShapeDtypeStruct((slots, *image), jnp.float32)
    ids = jax.ShapeDtypeStruct((slots,), jnp.uint32)
    return forward_program(mesh, ""), (logits_fn, root, draw, images, ids)


def autoattack(args: argparse.Namespace) -> None:
    """Compile the steps of standard AutoAttack for absent chips, and print.

    A program makes steps until enough slots are done. Figures are for one step, and sizes for data
    that stays on a chip between steps. The last program is the deciding forward pass.
    """
    from tools.hlo import figures as hlo_figures

    chips = _chips(args)
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from jaxrobust import models
    from jaxrobust.attacks import ensembles
    from jaxrobust.evaluation.engine import engine
    from jaxrobust.evaluation.engine.slots import program_of
    from jaxrobust.models.table import multiply_adds
    from jaxrobust.runtime.devices import hardware

    net = models.create(args.model, image_size=args.image_size, dtype=args.dtype)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    flops = 2.0 * multiply_adds(net, *shapes, image_size=args.image_size)
    logits_fn = jax.tree_util.Partial(lambda p, s, x: net.apply(p, s, x)[0], *shapes)
    mesh = Mesh(np.array(chips), ("slots",), axis_types=(AxisType.Auto,))
    width = args.batch or 64
    image = (args.image_size, args.image_size, shapes[1]["normalize.mean"].shape[0])
    print(
        f"{args.model} {args.image_size} px, {width} slots per chip, {args.dtype}, {len(chips)} x "
        f"{chips[0].device_kind} ({args.topology}); figures of one step of all slots"
    )
    programs: dict[engine.Setting, list[str]] = {}
    for norm in args.norms:
        for setting in ensembles.plan(norm, "standard", None, None):
            programs.setdefault(program_of(setting), []).append(setting.name)
    chip, slots = hardware.chip(chips[0].device_kind), width * len(chips)
    result: list[dict[str, Any]] = []

    def add(line: str, program: Any, arguments: Any, passes: int, products: int, **about: Any):
        figures = hlo_figures.compiled(program, *arguments, remedy=f"--batch {max(width // 2, 1)}")
        print(line)
        all_ = products * passes * flops * width
        shown = hlo_figures.show(figures, chip, flops=all_, images=width, by_part=args.traffic)
        result.append(about | {"passes": passes} | figures | shown)

    for setting, attacks in programs.items():
        program, shaped, passes = abstract_step(mesh, setting, logits_fn, slots=slots, image=image)
        line = f"{', '.join(attacks)} ({setting.norm}), {passes} passes of the network in a step"
        add(line, program, shaped, passes, 1, attacks=attacks, norm=setting.norm)
    verdict, shaped = abstract_verdict(mesh, logits_fn, slots=slots, image=image)
    products = FLOAT32_PRODUCTS if args.dtype == "float32" else 1
    line = (
        f"verdicts, 1 pass of the network, {products} bfloat16 product(s) for one of {args.dtype}"
    )
    add(line, verdict, shaped, 1, products, attacks=["verdicts"], norm=None)
    if args.json:
        about = {"model": args.model, "dtype": args.dtype, "topology": args.topology}
        about |= {"image_size": args.image_size, "slots_per_chip": width}
        inside = sum(figures["collectives_in_attack_loop"] for figures in result)
        print(json.dumps(about | {"collectives_in_attack_loop": inside, "programs": result}))
