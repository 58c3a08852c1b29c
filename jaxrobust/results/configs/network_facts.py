"""What somebody's network or weights say, before a config names them."""

from dataclasses import replace
from typing import Any

from jaxrobust.config import base, network_of
from jaxrobust.results.configs.chosen_values import NetworkChoice, side
from jaxrobust.results.configs.data_facts import DataFacts
from jaxrobust.weights import imports, load, reading
from jaxrobust.weights.fetch import sources


def look(data: DataFacts, **named: Any) -> NetworkChoice:
    """Look at the network that is named: whether it exports, and what its weights are for.

    `named`: fields of `NetworkChoice`.

    Raises:
      ValueError: a network that cannot be traced, weights that are none, or that do not say whose
        they are; says what to do.
    """
    choice = NetworkChoice(**named)
    if choice.torch and (choice.weights or choice.model):
        raise ValueError(
            "--torch is a network with its weights inside; leave --from and --model out"
        )
    if choice.torch_args and not choice.torch:
        raise ValueError("--torch_args are those of --torch; name the network too")
    if choice.torch:
        _check_torch(data, choice)
    if choice.weights:
        return _of_weights(choice, data)
    return choice


def _check_torch(data: DataFacts, choice: NetworkChoice) -> None:
    """Trace a PyTorch module, for images as the config will say; refuses with `--torch`'s words."""
    config = base()
    config.model.update(
        name=f"torch:{choice.torch}",
        num_classes=len(data.classes),
        image_size=choice.image_size or side(data),
        in_channels=data.channels,
        options=choice.torch_args or {},
    )
    network_of(config)


def _of_weights(choice: NetworkChoice, data: DataFacts) -> NetworkChoice:
    """Add the network of the weights, which are brought here if need be, and their classes."""
    here = imports.local(sources.parse(str(choice.weights)), model=choice.model)
    network = load.fitted(reading.artifact_of(here), choice.model)
    if network.in_channels != data.channels:
        raise ValueError(
            f"{choice.weights} take images with {network.in_channels} channels, and those of "
            f"{data.name} have {data.channels}; leave --from out"
        )
    size = choice.image_size or min(network.image_size, side(data))
    return replace(choice, model=network.name, classes=network.num_classes, image_size=size)
