"""Weights in transit: as stored, with what is known about them, then as a network's.

A source (`fetch.sources`) is read into an `Artifact` (`reading`). Its arrays become those of a
`Network` (`naming.networks`).
"""

from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust import models
from jaxrobust.runtime import pytorch
from jaxrobust.types import Classifier
from jaxrobust.weights.store import hashes

Arrays = dict[str, Any]  # np.ndarray or alike: they hash and convert the same


class WeightFacts(NamedTuple):
    """What is known about stored weights; None: unknown."""

    where: str = ""  # the place of the weights, for messages and records
    source: str | None = None  # the same for `config.json`, without this machine's folders
    file: Path | None = None  # the file with the arrays; None: they are in a run's checkpoint
    workdir: Path | None = None  # of the run that trained them
    model: str | None = None  # a name of `models.available()`
    options: dict[str, Any] | None = None  # further fields of its row
    num_classes: int | None = None
    image_size: int | None = None  # pixels
    preprocessing: str | None = None  # an id of `data.evaluation_transform`
    norm: str | None = None  # of the threat that they were trained or published for
    epsilon: float | None = None  # its radius, in units of [0, 1] pixels
    accuracies: list[dict[str, Any]] | None = None  # records, or what others published
    training: list[dict[str, Any] | None] | None = None  # a `trained.history`
    published: str | None = None  # the RobustBench id under which the file is read
    which: str | None = None  # "ema" or "raw"
    place: str = ""  # keys in a checkpoint, joined by "/"; empty: none
    settings: dict[str, Any] = {}  # noqa: RUF012  # timm's, read only
    record: dict[str, Any] = {}  # noqa: RUF012  # the `config.json` of an imported folder, read only


class Artifact(NamedTuple):
    """Arrays by their stored names, and what is known about them."""

    arrays: Arrays
    facts: WeightFacts = WeightFacts()


class Network(NamedTuple):
    """A network of ours with its complete weights, float32 on the host, and their origin."""

    name: str
    params: Arrays
    stats: Arrays
    num_classes: int
    image_size: int
    options: dict[str, Any]  # the fields of its row that it overrides
    facts: WeightFacts = WeightFacts()
    matched: tuple[str, ...] = ()  # our names, from the stored weights
    fresh: tuple[str, ...] = ()  # our names, newly drawn
    seed: int = 0  # of the draws
    dropped: dict[str, str] = {}  # noqa: RUF012  # stored name -> why it is left out
    # Our name -> old shape, new shape.
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}  # noqa: RUF012
    normalized_by: str = "stored with the weights"  # where its mean and std come from

    @property
    def in_channels(self) -> int:
        """Count the channels of the images."""
        return self.options.get("in_channels") or self.stats["normalize.mean"].size

    @property
    def weights_sha256(self) -> str:
        """Hash the weights, as records do."""
        return hashes.weights_sha256(self.params, self.stats)

    def create(self, **overrides: Any) -> Classifier:
        """Create the network's functions, overriding more fields of its row, such as the type."""
        return models.create(self.name, **self.sizes | overrides)

    @property
    def sizes(self) -> dict[str, Any]:
        """Return the sizes of its images and classes, and its options."""
        sizes = {key: getattr(self, key) for key in ("num_classes", "image_size", "in_channels")}
        return sizes | self.options

    @property
    def normalises_itself(self) -> bool:
        """Return whether mean and std belong to a PyTorch module's own layer `normalize`."""
        return pytorch.is_name(self.name) and pytorch.find("normalises")(self.name, self.sizes)

    @property
    def normalised(self) -> bool:
        """Return whether our first layer changes the images."""
        if self.normalises_itself or "normalize.mean" not in self.stats:  # a user's function
            return False
        mean, std = self.stats["normalize.mean"], self.stats["normalize.std"]
        return bool((mean != 0).any() or (std != 1).any())
