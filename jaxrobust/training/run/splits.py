"""The splits of a config's data set, and batches of them on the devices."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust import models
from jaxrobust.config import Config, TestSection, decoders
from jaxrobust.data.sources import registry
from jaxrobust.data.stream import loading, pipeline, plan
from jaxrobust.data.stream.pipeline import Damage
from jaxrobust.data.transforms.preparing import evaluation_transform
from jaxrobust.evaluation.engine.accuracy import EvaluatedImages
from jaxrobust.runtime.devices import sharding
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.text.progress import say
from jaxrobust.training import build
from jaxrobust.training.run.phase import PhaseRun
from jaxrobust.types import Batch


def opened(config: Config, key: str) -> registry.Source:
    """Open a split of the config's data set, checked against its model."""
    data, model = config.data, config.model
    source = registry.open_source(
        data.name, data[key], data_dir=data.dir, classes=data.classes, num_classes=model.num_classes
    ).for_channels(model.in_channels)
    if source.channels != model.in_channels:
        raise ValueError(
            f"{data.name} has {source.channels} channels; set model.in_channels={source.channels}"
        )
    return source


def extra(config: Config) -> registry.Source | None:
    """Open the second source of training images; None if there is none."""
    data = config.data
    if data.extra is None:
        return None
    return registry.open_source(
        data.extra, data.extra_split, data_dir=data.dir, classes=data.classes
    ).for_channels(config.model.in_channels)


def _source_options(config: Config) -> dict[str, Any]:
    data = config.data
    return {"views": data.views, "extra": extra(config), "extra_share": data.extra_share}


def examples(config: Config, name: str, source: registry.Source) -> int:
    """Count the rows per epoch of a phase; may exceed it by less than a batch."""
    options, length, size = (
        _source_options(config),
        config.data.epoch_images,
        config[name].batch_size,
    )
    if length is not None:
        setting = f"data.epoch_images={length} is"
        if options["extra"] is None:
            remedy = "leave it out, or set data.extra"
            raise ValueError(f"{setting} only valid with a second image source; {remedy}")
        if length < size:
            short = f"less than {name}.batch_size={size}; an epoch needs at least one step"
            raise ValueError(f"{setting} {short}")
    if options["extra"] is None and options["views"] == 1 and 0 <= options["extra_share"] <= 1:
        return len(source)
    rows = plan.plan(source, batch_size=size, **options).examples  # rejects what does not fit
    return rows if length is None else length


def check_preprocessing(config: Config, source: registry.Source) -> None:
    """Reject a `data.preprocessing` whose images have another size than the network's."""
    size, wanted = config.model.image_size, config.data.preprocessing
    models.check_size(size)  # before making an image of that size
    transform = evaluation_transform(pipeline.preprocessing_id(source, size, wanted))
    try:
        shape = transform(source[0].image).shape[:2]
    except ValueError:  # the first image is damaged; later ones will tell
        return
    if shape != (size, size):
        raise ValueError(
            f"data.preprocessing={wanted!r} makes images of {shape[0]}x{shape[1]} pixels, but "
            f"model.image_size={size}; set both to the same size"
        )


def evaluated(config: Config, key: str, settings: TestSection, workdir: Path) -> EvaluatedImages:
    """Open a split for an evaluation; `settings` are those of `evaluation` or `test`."""
    source = opened(config, key)
    return EvaluatedImages(
        source,
        image_size=config.model.image_size,
        batch_size=settings.batch_size,
        limit=settings.images,
        seed=config.seed,
        preprocessing=config.data.preprocessing,
        workers=decoders(config.data),
        meets=None if config.data.strict else damage(config, workdir, source),
    )


def damage(config: Config, workdir: Path, source: registry.Source) -> Damage:
    """Collect the damaged images of a split that a run has met, including before interruptions.

    Each process appends to its own file; all start with what all have met.
    """
    rows = [r for path in sorted(workdir.glob("damaged-*.jsonl")) for r in jsonl.read(path)]
    file = workdir / f"damaged-{jax.process_index()}.jsonl"

    def note(record: int) -> None:
        row = {"split": source.split, "record": record, "name": source.describe(record)}
        jsonl.append(file, row)

    return Damage(
        source,
        config.data.max_damaged,
        partial(say, every_process=True),
        known=[row["record"] for row in rows if row["split"] == source.split],
        note=note,
    )


def batches(config: Config, name: str, source: registry.Source, start: int) -> pipeline.Batches:
    """Stream this process's part of a phase's training batches, starting at a position."""
    return pipeline.train_batches(
        source,
        batch_size=config[name].batch_size,
        seed=config.seed + list(config.phases).index(name),
        augmentation=config.data.augmentation,
        image_size=config.model.image_size,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=decoders(config.data),
        strict=config.data.strict,
        first_view=config.data.first_view,
        **_source_options(config),
    )


def device_batch(mesh: jax.sharding.Mesh, batch: Any) -> Batch:
    """Assemble the global batch from this process's part of it."""
    return Batch(*sharding.global_arrays(mesh, (batch.images, batch.labels)))


def blank(run: PhaseRun) -> loading.TrainBatch:
    """Make images for a step that no host takes."""
    global_batch = build.abstract_batch(run.config, run.name)
    rows = len(global_batch.images) // jax.process_count()
    images, labels = (np.zeros((rows, *x.shape[1:]), x.dtype) for x in global_batch)
    return loading.TrainBatch(images, labels, np.full(rows, -1, np.int32))
