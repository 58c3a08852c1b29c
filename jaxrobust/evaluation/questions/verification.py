"""Check a bundle's claimed accuracy, robust or under common corruptions, with your own network.

A robust accuracy takes a forward pass per image, one more per fooled image, and an attack on a
sample of the survivors. Corruptions take a pass per image and corruption.
"""

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrobust import models
from jaxrobust.attacks import ensembles
from jaxrobust.data import Prepared, Source
from jaxrobust.data.source import KINDS
from jaxrobust.data.sources import cifar_c, registry
from jaxrobust.data.splits import spread
from jaxrobust.data.stream import corrupted_images
from jaxrobust.data.transforms import corruptions
from jaxrobust.data.transforms.corruptions import SEVERITIES
from jaxrobust.evaluation.bundles import bundle as bundles
from jaxrobust.evaluation.bundles import claims, findings, standing
from jaxrobust.evaluation.bundles.contradictions import CLEAN, kind
from jaxrobust.evaluation.bundles.findings import ClaimFindings, CorruptionFindings
from jaxrobust.evaluation.bundles.standing import StandingSample
from jaxrobust.evaluation.questions import corrupted, flags, measuring, questions
from jaxrobust.evaluation.questions import target as subjects
from jaxrobust.evaluation.questions.flags import GivenFlags
from jaxrobust.evaluation.records import of_weights, stopping
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.runtime.files import whole
from jaxrobust.runtime.text.progress import say
from jaxrobust.weights.store import hashes


class VerificationSettings(NamedTuple):
    """A bundle, the network to check it with, and the location of its images."""

    bundle: Path
    weights: str | None = None
    function: str | None = None
    dataset: str | None = None
    split: str | None = None
    classes: str | None = None
    data_dir: str | None = None
    batch: int | None = None
    frost: str | None = None  # folder of photographs, if corruptions are computed
    sample: int = standing.IMAGES  # number of standing images to attack
    seed: int | None = None  # of that sample and its attacks; None: unpredictable


class Verification(NamedTuple):
    """The result of checking a bundle by forward passes and attacks, with remarks."""

    bundle: claims.Bundle
    findings: ClaimFindings | CorruptionFindings
    other_network: bool  # the network differs from the record's
    denied: list[str]  # why the claim cannot be confirmed here, whatever the passes show
    remark: str | None  # on the program in the bundle
    flags: dict[str, str]  # reasons found here to doubt the network's numbers
    sample: StandingSample | None = None  # None: common corruptions, where every answer is known

    @property
    def contradiction(self) -> str | None:
        """How attacks on standing images contradict the claim, or None."""
        return self.sample.contradicts if self.sample else None

    @property
    def confirmed(self) -> bool:
        """Tell whether the bundle's whole claim holds for the network and images of its record."""
        return self.findings.whole and not self.denied and not self.contradiction

    @property
    def why_not(self) -> list[str]:
        """The reasons why the bundle's claim is not confirmed."""
        contradiction = [self.contradiction] if self.contradiction else []
        return [*self.denied, *findings.why_not(self.findings), *contradiction]


def verify(settings: VerificationSettings) -> dict[str, Any]:
    """Print the findings of forward passes and attacks, and return them for JSON."""
    done = check(settings)
    judged, sample = done.findings, done.sample
    more: dict[str, Any] = {"bundle": done.bundle.number, "other_network": done.other_network}
    of_sample: list[str] = []
    if sample and isinstance(judged, ClaimFindings):
        more["sample"], of_sample = sample.plain(judged.standing), sample.lines(judged.standing)
        judged = judged._replace(fallen=judged.fallen + len(sample.fallen))
    *rows, last = findings.lines(done.bundle, judged)
    if done.contradiction:
        last = f"Contradicted: {done.contradiction}"
    doubts = [f"flag {name}: {text}" for name, text in done.flags.items()]
    remarks = [*done.denied, *([done.remark] if done.remark else [])]
    print("\n".join([*rows, *of_sample, *doubts, last, *remarks]))
    return judged.plain() | {"whole": done.confirmed} | more


def check(settings: VerificationSettings) -> Verification:
    """Check a bundle's claims on a network; raise `ValueError` if that is impossible."""
    if bool(settings.weights) == bool(settings.function):
        raise ValueError("give the network: --weights W, or --function my_net.py:logits_fn")
    bundle = claims.read(settings.bundle)
    model = bundle.record["model"]
    network_flags = _given(settings, bundle.record)
    flags.check(network_flags)
    subject, source = subjects.settled(
        flags.origin(network_flags),
        network={"num_classes": model["num_classes"], "image_size": model["image_size"]},
        **_source_of(settings, bundle.record),
        **({} if bundle.corrupted else bundle.threat),
    )
    name, subject, weights = flags.weights(network_flags, subject, source)
    sha256 = subject.arrays_sha256 or hashes.weights_sha256(*weights)
    prepared = _prepared(source, bundle)
    other_network = _other(bundle.record, subject, sha256)
    other_attacks = None if bundle.corrupted else _other_attacks(bundle.record)
    denied = [other_network, _other_split(bundle, source), other_attacks]
    say(f"{subject.network.name}{f' ({name})' if name else ''} on {source.where()}")
    batch = settings.batch or 64
    network = measuring.networks_of(subject, weights)("float32")
    shown = {CLEAN: prepared}
    if bundle.corrupted:
        shown = _corrupted(settings, bundle, source, prepared)
    judged = findings.judge(
        bundle,
        lambda name, ids: shown[name][np.asarray(ids)],
        bundles.forward(network, prepared.shape[1:], batch),
        count=len(prepared),
        batch=batch,
        tell=say,
        labels=prepared.labels(),
    )
    data: dict[str, Any] = {
        "dataset": source.name,
        "split": source.split,
        "files_sha256": source.files_sha256,
    }
    doubts = of_weights.training_flags(of_weights.training(subject.history or [], **data))
    sample = None
    if isinstance(judged, ClaimFindings):
        seed = secrets.randbits(32) if settings.seed is None else settings.seed
        drawn: Any = {"count": settings.sample, "seed": seed, "batch": settings.batch}
        sample = standing.attacked(bundle, judged, prepared, network, **drawn)
        doubts |= sample.flags
    reasons = [text for text in denied if text]
    remark = _other_program(bundle.folder)
    return Verification(bundle, judged, bool(other_network), reasons, remark, doubts, sample)


def _given(settings: VerificationSettings, record: dict[str, Any]) -> GivenFlags:
    placed = flags.placed(GivenFlags(function=settings.function, weights=settings.weights))
    if placed.workdir:
        phase = str(record["weights"]).partition(",")[0]
        there = phase and (Path(placed.workdir) / phase).is_dir()
        return placed._replace(phase=phase if there else None)
    if placed.weights and not Path(placed.weights).is_dir():
        model = record["model"]
        return placed._replace(model=model["name"], options=model["options"] or None)
    return placed


def _source_of(settings: VerificationSettings, record: dict[str, Any]) -> dict[str, Any]:
    """Locate the images of a record; raise if only the record names their files."""
    # The author of the record may have made these files too.
    paths = "|".join(re.escape(name) for name, kind in KINDS.items() if kind.is_path)
    patterns = {"dataset": rf"({paths}):.*|hf:[./~].*", "split": ".*@.*"}
    for flag, pattern in patterns.items():
        value = str(record[flag])
        lists = flag == "split" and re.fullmatch(r"[^@]*@(robustbench|selection)(\[.*\])?", value)
        if not getattr(settings, flag) and re.fullmatch(pattern, value) and not lists:
            raise ValueError(
                f"the record names its images by a path, {value}, which the author of the "
                f"bundle may have made; give your own path, as in --{flag} {value}"
            )
    place = {key: getattr(settings, key) for key in ("dataset", "split", "classes", "data_dir")}
    return place | {key: place[key] or record[key] for key in ("dataset", "split")}


def _prepared(source: Any, bundle: Any) -> Prepared:
    size, _, channels = bundle.about["image"]
    source = source.for_channels(channels)
    if source.channels != channels:
        raise ValueError(
            f"the bundle's images have {channels} channels, but {source.where()} has "
            f"{source.channels}; give the --dataset and --split of its record"
        )
    preprocessing = bundle.record["preprocessing"]
    places = range(len(source))
    return Prepared(source, image_size=size, preprocessing=preprocessing, places=places)


def _corrupted(
    settings: VerificationSettings, bundle: claims.Bundle, source: Source, clean: Prepared
) -> dict[str, Prepared]:
    """Prepare the images of a bundle of corruptions, by their names."""
    record, names = bundle.record, bundle.about["corruptions"]
    size, preprocessing, frost = bundle.about["image"][0], record["preprocessing"], None
    photographs = record["corruptions"].get("frost_sha256")
    if photographs and settings.frost is None:
        raise ValueError(
            "the bundle has images under frost, which needs photographs; give "
            "--frost FOLDER, with the same photographs"
        )
    if settings.frost is not None:
        frost = corrupted_images.photographs(settings.frost, size)
        if frost.sha256 != photographs:
            raise ValueError(
                f"--frost {settings.frost} has different photographs from the bundle's; give the "
                "same five files"
            )
    kinds = {True: "published files", False: "computed images"}
    is_files = source.name.startswith(cifar_c.PREFIX)
    if (record["corruptions"].get("images") == "files") != is_files:
        raise ValueError(
            f"the bundle was made from {kinds[not is_files]}, but {source.where()} has "
            f"{kinds[is_files]}; give the --dataset of its record"
        )
    asked = corruptions.chosen(",".join(name for name in names if name != CLEAN))
    if unknown := {name for name in names if name != CLEAN} ^ set(map(str, asked)):
        raise ValueError(f"the bundle uses {min(unknown)}, which this version does not support")
    sources = corrupted_images.each(
        source,
        asked,
        image_size=size,
        preprocessing=preprocessing,
        seed=record["seed"],
        frost=frost,
        classes=settings.classes,
        num_classes=record["model"]["num_classes"],
    )
    shown = {CLEAN: clean} if CLEAN in names else {}
    for name, of_name in sources.items():
        shown[name] = corrupted.prepared(of_name, size, preprocessing, clean.ids)
    return shown


def _other(record: dict[str, Any], subject: Any, sha256: str) -> str | None:
    """Report if the network or its weights differ from the record's, else return None."""
    # A user's function is compared by its name, its file's hash and its arrays, not by its folder.
    model, function = record["model"], record.get("function") or {}
    recorded = function.get("arrays_sha256") or record["weights_sha256"]
    network = subject.network
    here = (network.name, network.options, subject.origin() or {}, sha256)
    there = (model["name"], model["options"], function, recorded)

    def plain(name: str, options: Any, of_user: dict[str, Any], arrays: str) -> tuple[Any, ...]:
        essential = json.dumps(models.essential(name, options or {}))
        return name.rpartition(":")[2], essential, of_user.get("sha256"), arrays

    if plain(*here) == plain(*there):
        return None
    return (
        f"This network or its weights differ from the record's ({network.name}, "
        f"sha256 {sha256[:12]}...; there {model['name']}, {str(recorded)[:12]}...): what is "
        "confirmed holds for this network, but the claim itself is not confirmed"
    )


def _other_split(bundle: claims.Bundle, source: Source) -> str | None:
    about, ids = bundle.about, sorted(row["image"] for row in bundle.rows)
    if about.get("split_images") in (None, len(source)):
        if ids == list(range(len(ids))) or ids == spread.places(source, len(ids)).tolist():
            return None
        return (
            f"evaluate --n would choose other images from this split than the {len(ids):,} of the "
            "record, which may have been hand-picked: the claim itself is not confirmed"
        )
    return (
        f"{source.where()} has {len(source):,} images, but the bundle says "
        f"{about['split_images']:,}: this is another split or version of the data set, and the "
        "claim itself is not confirmed"
    )


def _other_attacks(record: dict[str, Any]) -> str | None:
    """Report if the method named in a record does not match its attacks, else return None."""
    method, attacks = record.get("method"), record["attacks"]
    names = [str(attack["name"]) for attack in attacks]
    users = [str(attack["name"]) for attack in attacks if "sha256" in attack]
    searched = [attack for attack in attacks if "sha256" not in attack]

    def is_of(version: str) -> bool:
        """Tell whether the attacks are exactly those of this version of AutoAttack."""
        plan = ensembles.plan(norm, version, None, None) if searched else ()
        return len(plan) == len(searched) > 0 and all(
            attack.get(key, value) == value
            for attack, setting in zip(searched, plan, strict=True)
            for key, value in setting._asdict().items()
            if key in ("name", "steps", "restarts")
        )

    norm = attacks[0]["norm"]
    versions = [
        name for name in ensembles.versions(norm) if name != ensembles.CUSTOM and is_of(name)
    ]
    heads = [names, *([f"{questions.AUTOATTACK} {version}", *users] for version in versions)]
    for head in (" + ".join(words) for words in heads):
        if method in (None, stopping.FAST_METHOD, head) or str(method).startswith(f"{head}, "):
            return None
    return (
        f"its record names the method {method!r:.40}, but its attacks differ: "
        f"{', '.join(names):.80}"
    )


def _other_program(folder: Path) -> str | None:
    path = folder / bundles.PROGRAM
    if path.is_file() and path.read_text(errors="replace") == bundles.program():
        return None
    return (
        f"{path} is not the program that this version writes: another version wrote it, or "
        "somebody changed it; before you run it, compare it with the program of its version"
    )


def write_images(settings: VerificationSettings, path: Path) -> dict[str, Any]:
    """Write images and labels in the format of the bundle's verify.py."""
    bundle, source, prepared = _opened(settings)
    if bundle.corrupted:
        return _write_corrupted(settings, path, bundle, source, prepared)
    if path.suffix != ".npy":
        raise ValueError(f"--write_images {path}: name a file that ends in .npy")
    with whole.writing(path) as part, part.open("wb") as opened:
        np.lib.format.write_array_header_1_0(
            opened, {"descr": "|u1", "fortran_order": False, "shape": prepared.shape}
        )
        for _, images in _pixels(prepared):
            opened.write(images.tobytes())
    labels = path.with_suffix(".labels.npy")
    np.save(labels, prepared.labels())
    print(f"{len(prepared)} images in {path}, their labels in {labels}")
    return {"images": len(prepared)}


def _write_corrupted(
    settings: VerificationSettings,
    folder: Path,
    bundle: claims.Bundle,
    source: Source,
    prepared: Prepared,
) -> dict[str, Any]:
    """Write corrupted images in the layout of CIFAR-10-C; severities not in the bundle are 0."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--write_images {folder} exists; name a new folder")
    images, count = _corrupted(settings, bundle, source, prepared), len(prepared)
    folder.mkdir(parents=True, exist_ok=True)
    with whole.explained(folder):
        for name, shown in images.items():
            stem, _, severity = name.partition("-")
            file, levels = folder / f"{stem}.npy", 1 if name == CLEAN else len(SEVERITIES)
            mode: Any = "r+" if file.exists() else "w+"
            shape = (levels * count, *shown.shape[1:])
            stored = np.lib.format.open_memmap(file, mode, np.uint8, shape)
            first = (int(severity or 1) - 1) * count
            for start, pixels in _pixels(shown):
                stored[first + start :][: len(pixels)] = pixels
            stored.flush()
            say(f"{name} is in {file}")
        np.save(folder / "labels.npy", prepared.labels())
    print(f"{count} images under {len(images)} corruptions in {folder}, with their labels")
    return {"images": count}


def _pixels(images: Prepared) -> Iterator[tuple[int, np.ndarray]]:
    """Yield batches of uint8[n,H,W,C], each with the place of its first image."""
    for start in range(0, len(images), 64):
        part = images[np.arange(start, min(start + 64, len(images)))]
        yield start, np.rint(part * np.float32(255)).astype(np.uint8)


def adversarial_images(settings: VerificationSettings) -> tuple[AccuracyRecord, np.ndarray]:
    """Return a bundle's record and its images after the attack, f32[N,H,W,C] in [0, 1].

    Images that no attack fooled are unchanged. `ValueError` if the data set's images differ.
    """
    bundle, _, prepared = _opened(settings)
    if bundle.corrupted:
        raise ValueError(
            f"{settings.bundle} covers common corruptions and has no adversarial images; "
            "--write_images writes its images"
        )
    points = np.empty((len(bundle.rows), *prepared.shape[1:]), np.float32)
    for place, row in enumerate(bundle.rows):
        image = prepared[np.array([row["image"]])][0]
        if claims.image_sha256(image) != row["sha256"]:
            raise ValueError(
                f"image {row['image']} differs from the evaluated one; give the --dataset and "
                "--split of the record, and the same version of the data set"
            )
        fooled = kind(row) == "fooled"
        points[place] = claims.point_of(bundle, row, image)[0] if fooled else image
    return AccuracyRecord.from_json(bundle.record), points


def _opened(settings: VerificationSettings) -> tuple[claims.Bundle, Source, Prepared]:
    """Open a bundle and its images, prepared as for the evaluation."""
    bundle = claims.read(settings.bundle)
    place = _source_of(settings, bundle.record)
    data = (place.pop("dataset"), place.pop("split"))
    classes = bundle.record["model"]["num_classes"]
    source = registry.open_source(*data, num_classes=classes, **place)
    return bundle, source, _prepared(source, bundle)
