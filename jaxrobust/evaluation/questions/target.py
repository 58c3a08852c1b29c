"""The evaluated subject: a network, its weights, the images and the threat."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrobust import models
from jaxrobust.config import NetworkSpec, decoders
from jaxrobust.data import resolve, same_preprocessing
from jaxrobust.data.sources import npz, registry
from jaxrobust.data.stream import pipeline
from jaxrobust.evaluation.network import tracing
from jaxrobust.models.interface.network_inputs import cast
from jaxrobust.models.kernels.cpu.rewriting import fast_formulas
from jaxrobust.runtime import pytorch
from jaxrobust.runtime.commandline import functions
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.text.progress import say
from jaxrobust.types import Classifier, Threat, Weights, threats
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import certificates, weights_folder
from jaxrobust.weights.trained import runs
from jaxrobust.weights.trained.history import History, checked

FUNCTION, TORCH = "--function", "--torch"
_TURNS = 8  # images per slot, below which idle slots cost more than they save


@dataclass(frozen=True)
class Subject:
    """A network, the images and the threat; None means not known yet."""

    network: NetworkSpec
    dataset: str | None = None
    split: str = "test"
    data_dir: str | None = None
    classes: str | None = None  # only these of the data set
    workers: int = 0  # processes that decode
    threat: Threat | None = None
    norm: str = "linf"  # the norm of a radius, until a threat is set
    batch_size: int = 128
    tested: str | None = None  # the preprocessing of its run's tests
    expected: str | None = None  # the preprocessing that imported weights expect for photographs
    config: Any = None  # the source of the network, for the record
    chosen: dict[str, Any] | None = None  # the images on which --selected chose the weights
    history: History | None = None  # the training history of the weights
    function: functions.Named | None = None  # from images to logits, if that is the network
    net: Classifier | None = None  # of that function, after `with_arrays`
    arrays_sha256: str | None = None  # likewise
    built: Any = None  # PyTorch module (`named.Built`) that `in_jax` converts to the function
    slots: int | None = None  # the cheapest number for it, by measurement
    keyed: bool = False  # whether it also takes one key per image for random draws

    @property
    def image_size(self) -> int:
        """The image size; only a settled subject has one."""
        assert self.network.image_size is not None, "settled"
        return self.network.image_size

    def within(self, threat: Threat) -> "Subject":
        """Return the same subject under another threat."""
        return replace(self, threat=threat, norm=threat.norm)

    @property
    def ball(self) -> Threat:
        """The threat of a settled subject, with radius 0 if it is not attacked."""
        return self.threat or Threat(self.norm, 0.0)

    def slots_for(self, count: int) -> int | None:
        """Return the number of slots for `count` images; None: the engine's default."""
        return self.slots if self.slots and count >= _TURNS * self.slots else None

    @property
    def flag(self) -> str | None:
        """The flag of a user's network; None for a network of the package."""
        return TORCH if self.built else FUNCTION if self.function else None

    def create(self, dtype: str) -> Classifier:
        """Create the network's functions, which compute in `dtype`; a function sets its own."""
        if self.net and self.built:  # it computes in the type of its arrays
            apply = self.net.apply
            return self.net._replace(
                apply=lambda p, arrays, x, **key: apply(p, cast(arrays, jnp.dtype(dtype)), x, **key)
            )
        return self.net or self.network.create(dtype=dtype)

    def origin(self) -> dict[str, Any] | None:
        """Describe the user's function that is or makes the network; None: of the package."""
        if self.function is None:
            spec = self.network
            return models.origin(spec.name, **spec.sizes(), **spec.options)
        more = {} if self.built is None else dict(self.built.record)
        return self.function.record() | {"arrays_sha256": self.arrays_sha256} | more


def of_run(workdir: Path, phase: str | None = None) -> Subject:
    """Describe the network of a run's phase (default: the last phase with weights)."""
    config = runs.run_config(workdir, phase)
    data, attack = config.data, config.attack
    return Subject(
        network=NetworkSpec.of_config(config),
        dataset=data.name,
        split=data.test_split,
        data_dir=data.dir,
        classes=data.get("classes"),
        workers=decoders(data),
        threat=Threat.only(attack),
        norm=threats(attack)[0].norm,
        batch_size=config.test.batch_size,
        tested=data.get("preprocessing"),
        config=config,
    )


def of_file(name: str, path: Path, options: dict[str, Any] | None = None) -> Subject:
    """Describe a network `name` by its weights file, with these options or the file's own."""
    if pytorch.is_name(name) or not functions.is_name(name):  # other functions store no options
        options = certificates.options(name, options, certificates.stated(path), path)
    options = options or {}
    return Subject(NetworkSpec(name, options=options), config={"model": name, "options": options})


def of_folder(folder: Path, name: str | None, options: dict[str, Any] | None) -> Subject:
    """Describe a network by its imported weights; raise if `name` is another architecture."""
    about = weights_folder.about(folder)
    if about is None:
        raise ValueError(
            f"--weights {folder} is not a folder that jaxrobust import wrote; give a file"
        )
    architecture = about["architecture"]
    if models.computed(name or architecture, {}) != models.computed(architecture, {}):
        raise ValueError(f"{folder} holds a {architecture}; leave --model={name} out")
    subject = of_file(architecture, folder, options)
    sizes = {key: about[key] for key in ("num_classes", "image_size", "in_channels")}
    norm = about["norm"] or "linf"
    return replace(
        subject,
        network=replace(subject.network, **sizes),
        threat=None if about["epsilon"] is None else Threat(norm, about["epsilon"]),
        norm=norm,
        expected=about["preprocessing"],
        config=about,
        history=checked(about.get("training")),
    )


def of_function(name: str, *, random: bool = False) -> Subject:
    """Describe a function of images, or of images and keys if it is `random`."""
    return Subject(NetworkSpec(name), function=functions.find(FUNCTION, name), keyed=random)


def of_torch(
    name: str, arguments: dict[str, Any] | None, output: str | None, *, random: bool = False
) -> Subject:
    """Describe a PyTorch network, which may draw `random` numbers."""
    built = pytorch.find("built")(TORCH, name, arguments, output, random=random)
    return Subject(NetworkSpec(name), function=built.source, built=built, keyed=random)


_IMAGENET = re.compile(r"(tfds:)?imagenet2012\b")


def settled(
    origin: Subject,
    *,
    network: dict[str, Any] | None = None,
    norm: str | None = None,
    epsilon: float | None = None,
    **changes: Any,
) -> tuple[Subject, registry.Source]:
    """Complete a subject with `changes` that are not None and their consequences; open its images.

    A radius in one norm does not carry over to another.
    """
    sizes_of = {key: value for key, value in (network or {}).items() if value is not None}
    changes = {key: value for key, value in changes.items() if value is not None}
    subject = replace(origin, network=replace(origin.network, **sizes_of), **changes)
    if epsilon is not None:
        subject = subject.within(Threat(norm or origin.norm, epsilon))
    elif norm not in (None, origin.norm):
        subject = replace(subject, norm=norm, threat=None)
    dataset = subject.dataset
    if dataset is None:
        flag = subject.flag or "a network that is not a run"
        raise ValueError(f"{flag} needs --dataset NAME, such as digits, cifar10 or imagenet2012")
    if dataset != origin.dataset and "split" not in changes:
        # A part of another data set's split does not apply here.
        split = "validation@robustbench" if _IMAGENET.match(dataset) else "test"
        only = npz.only_split(dataset) if dataset.startswith(npz.PREFIX) else None
        subject = replace(subject, split=only or split)
    source = registry.open_source(
        dataset,
        subject.split,
        data_dir=subject.data_dir,
        classes=subject.classes,
        num_classes=subject.network.num_classes,
    )
    shape, sizes = source.image_shape, subject.network
    if sizes.image_size is None:
        sizes = replace(sizes, image_size=shape[0] if shape and shape[0] == shape[1] else 224)
    if sizes.num_classes is None:
        sizes = replace(sizes, num_classes=source.num_classes)
    if sizes.in_channels is None and (subject.function or functions.is_name(sizes.name)):
        sizes = replace(sizes, in_channels=source.channels)
    models.check_size(sizes.image_size or 224)
    return replace(subject, network=sizes), source.for_channels(sizes.in_channels)


def preprocessing(
    origin: Subject, image_size: int, source: registry.Source, flag: str | None = None
) -> str | None:
    """Choose the flag's preprocessing, else that of the run's tests or of imported weights.

    That of imported weights is for photographs, not for images of one size no larger than the
    network's. At another image size only a crop percentage keeps its meaning; anything else is
    dropped with a message.
    """
    small = source.image_shape and min(source.image_shape[:2]) <= image_size
    expected = None if small else origin.expected
    default = origin.tested or expected
    is_other_size = image_size != origin.network.image_size
    if default and is_other_size and resolve(default, image_size) == default:
        if not flag:
            instead = pipeline.preprocessing_id(source, image_size)
            say(
                f"{default} is for a different image size: using {instead} at {image_size} px; to "
                "change it, give --preprocessing ID"
            )
        default = expected = None
    if flag and expected and not same_preprocessing(flag, expected, image_size):
        raise ValueError(
            f"--preprocessing={flag}, but these weights expect {expected}; leave the flag out (or "
            f"give the file, --weights FOLDER/{weights_folder.WEIGHTS} with --model)"
        )
    return flag or default


def file_weights(network: NetworkSpec, path: Path) -> tuple[str, NetworkSpec, Weights]:
    """Read weights from a file or folder; return their name, the network with channels, them."""
    if line := certificates.line(path):
        say(line)
    path = path / weights_folder.WEIGHTS if path.is_dir() else path
    certificates.check(path)
    sizes: dict[str, Any] = {"num_classes": network.num_classes, "image_size": network.image_size}
    if functions.is_name(network.name):
        sizes["in_channels"] = network.in_channels
    if pytorch.is_name(network.name):
        params, stats = pytorch.find("load")(network, path)
    else:
        params, stats = convert.load(network.name, path, **sizes, **network.options)
    if not functions.is_name(network.name):
        network = replace(network, in_channels=len(stats["normalize.mean"]))
    everywhere = sharding.replicated(sharding.make_mesh())
    return path.name, network, Weights(*jax.device_put((params, stats), everywhere))


def in_jax(subject: Subject, images: np.ndarray, following: Sequence[str] = ()) -> Subject:
    """Convert the PyTorch network of a settled subject to a JAX function."""
    assert subject.built is not None and subject.function is not None
    fast = fast_formulas if jax.default_backend() == "cpu" else lambda function: function
    function, at_once = pytorch.find("in_jax")(TORCH, subject.built, images, fast, following)
    built = subject.built._replace(network=None)  # frees its memory
    slots = at_once * jax.local_device_count() if jax.default_backend() == "cpu" else None
    function_in_jax = subject.function._replace(function=function)
    return replace(subject, function=function_in_jax, built=built, slots=slots)


def with_arrays(subject: Subject) -> tuple[Subject, Weights]:
    """Turn a settled subject's function into a network, and its arrays into weights."""
    function, sizes = subject.function, subject.network
    assert function is not None and sizes.image_size and sizes.in_channels
    flag, image = str(subject.flag), (sizes.image_size,) * 2 + (sizes.in_channels,)
    written = f"{flag}={function.name}"
    mesh = sharding.make_mesh()
    with functions.explained(flag, function.name):
        argument = tracing.argument(written, function.function, mesh)
        operand = "keys" if subject.keyed else ""
        traced = tracing.trace(written, function.function, argument, image, 8, operand)
    if traced.classes != sizes.num_classes:
        more = traced.classes == (sizes.num_classes or 0) + 1
        background = ", without a background class (logits[:, 1:] if it comes first)" * more
        raise ValueError(
            f"{written} returns {traced.classes} logits, but the data set {subject.dataset} has "
            f"{sizes.num_classes} classes; return one logit per class, in the same "
            f"order{background}"
        )
    arrays = {str(number): array for number, array in enumerate(argument.args[0])}

    def apply(
        params: Any, stats: Any, images: Any, *, train: bool = False, key: Any = None
    ) -> tuple[Any, Any]:
        del params, train
        assert function is not None  # keeps it alive: `argument` refers to it weakly
        if subject.keyed and key is None:  # called to count operations
            key = jax.random.split(jax.random.key(0), len(images))
        inputs = (images, key) if subject.keyed else (images,)
        return argument.func([stats[name] for name in arrays], *inputs), stats

    net = Classifier(lambda key: ({}, {}), apply)
    weights = Weights({}, jax.device_put(arrays, sharding.replicated(mesh)))
    return replace(
        subject, net=net, arrays_sha256=tracing.weights(argument, traced.constants)
    ), weights
