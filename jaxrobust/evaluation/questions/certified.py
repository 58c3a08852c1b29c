"""Certified accuracy by randomized smoothing: one record of all radii, resumable at any image.

The certificate is for the smoothed network, which predicts the class of most noisy copies of an
image, not for the base network. No L2 attack can reduce its accuracy below the certified accuracy;
for each image this is wrong with probability at most alpha.
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrobust.evaluation.engine import engine, smoothing
from jaxrobust.evaluation.engine.smoothing import Certificate, Smoothing
from jaxrobust.evaluation.network import label_checks
from jaxrobust.evaluation.questions.recording import Evaluation
from jaxrobust.evaluation.questions.stated import GivenFlags
from jaxrobust.evaluation.records.record import AccuracyRecord, AttackCost, CertifiedAccuracies
from jaxrobust.runtime.files import jsonl
from jaxrobust.runtime.processes import hosts
from jaxrobust.runtime.text.progress import say

METHOD = "smoothing"
_STEPS = 8  # radii per sigma at which the record lists the accuracy

Certificates = dict[int, Certificate]  # by the place of the image


def settings(flags: GivenFlags) -> Smoothing:
    """Read the settings of the certification; `ValueError`: they cannot certify any image."""
    more: dict[str, Any] = {"draws": flags.draws, "alpha": flags.alpha}
    more = {key: value for key, value in more.items() if value is not None}
    wanted = Smoothing(sigma=float(flags.certify or 0), **more)
    try:
        smoothing.check(wanted)
    except ValueError as error:
        raise ValueError(f"--certify={flags.certify:g}: {error}") from error
    return wanted


def record(evaluation: Evaluation, flags: GivenFlags) -> AccuracyRecord:
    """Record the certified accuracies, unless recorded before; processes share the images.

    Each process writes its images to a file next to the record. The same command resumes after
    them, on any number of processes.
    """
    noise, question = settings(flags), evaluation.question
    number = evaluation.number(evaluation.subject, smoothing=[*noise, question.seed])
    if there := evaluation.recorded(number):
        return there
    words = f"{noise.draws:,} draws of noise {noise.sigma:g}, {question.n} images"
    say(f"{evaluation.subject.network.name} on {evaluation.source.where()}: {words}")
    start, labels = time.perf_counter(), evaluation.images.labels()
    by_image = _certified(evaluation, number, noise)
    certificates = [by_image[image] for image in evaluation.images.ids.tolist()]
    answers = np.array([certificate.answer for certificate in certificates])
    radii = np.array([certificate.radius for certificate in certificates])
    right = answers == labels
    steps = int(noise.largest_radius / noise.sigma * _STEPS) + 1
    grid = [step * noise.sigma / _STEPS for step in range(steps)]
    doubts = label_checks.check_answers(answers, labels, evaluation.source.num_classes)
    if broken := sum(certificate.unanswered > 0 for certificate in by_image.values()):
        doubts["nan-under-noise"] = (
            f"{broken} images have NaN or infinite logits for some noise; those draws count for "
            "no class"
        )
    facts: CertifiedAccuracies = {
        "sigma": noise.sigma,
        "draws": noise.draws,
        "selection": noise.selection,
        "alpha": noise.alpha,
        "accuracy": {f"{r:.6g}": float((right & (radii >= r)).mean()) for r in grid},
        "abstained": float((answers == smoothing.ABSTAINS).mean()),
        "average_radius": float(np.where(right, radii, 0).mean()),
        "images": f"smoothing-{number}.jsonl",
    }
    cost: AttackCost = {
        "attack": METHOD,
        "fooled": 0,
        "forward": question.n * (noise.selection + noise.draws),
        "backward": 0,
        "idle": 0,
        "seconds": time.perf_counter() - start,  # with compilation
        "compile_seconds": 0.0,
    }
    measured = AccuracyRecord(accuracy_after={}, costs=[cost], flags=doubts, certified=facts)
    return evaluation.write(number, f"{METHOD} {noise.sigma:g}", measured, None)


def _certified(evaluation: Evaluation, number: str, noise: Smoothing) -> Certificates:
    """Certify the images missing from this evaluation's files; all processes return all images."""
    question, labels = evaluation.question, evaluation.images.labels()
    done = hosts.everyone(_stored(evaluation.out, number, noise))[0]
    ids = evaluation.images.ids.tolist()
    todo = np.array([row for row, i in enumerate(ids) if i not in done], int)
    shape, process = evaluation.images.shape[1:], jax.process_index()
    runner = engine.make(
        evaluation.logits_of("float32"), slots=question.batch, image_size=max(shape[:2])
    )
    ledger = evaluation.out / f"smoothing-{number}{f'.{process}' if process else ''}.jsonl"
    new: Certificates = {}
    with jax.set_mesh(runner.mesh):
        runner = engine.trace(runner, shape)
        for row in hosts.share(todo).tolist():
            (image,), place = evaluation.images[np.array([row])], ids[row]
            new[place] = smoothing.certify(runner, image, place, noise, seed=question.seed)
            line = {"image": place, "label": int(labels[row]), **new[place]._asdict()}
            jsonl.append(ledger, line)
    for of_process in hosts.everyone(new):
        done |= of_process
    return done


def _stored(out: Path, number: str, noise: Smoothing) -> Certificates:
    """Read the certificates of earlier commands."""
    # Radii follow from the votes, so a file with altered radii is rejected.
    stored: Certificates = {}
    files = [out / f"smoothing-{number}.jsonl", *sorted(out.glob(f"smoothing-{number}.*.jsonl"))]
    for file, row in ((place, row) for place in files for row in jsonl.read(place)):
        certificate = Certificate(*(row[key] for key in Certificate._fields))
        abstains = smoothing.lower_bound(certificate.votes, noise) < 0.5
        if certificate.radius != smoothing.radius(certificate.votes, noise) or abstains != (
            certificate.answer == smoothing.ABSTAINS
        ):
            raise ValueError(
                f"{file} certifies more for image {row['image']} than its {certificate.votes:,} "
                "votes support; remove that line to certify the image again"
            )
        stored[row["image"]] = certificate
    return stored


def table(facts: CertifiedAccuracies) -> list[str]:
    """Format the certified accuracies at every quarter of sigma."""
    shares = list(facts["accuracy"].items())[:: _STEPS // 4]
    last = next((i for i, (_, share) in enumerate(shares) if not share), len(shares) - 1)
    rows = [f"certified at l2 {float(r):<10.4g}{share:7.1%}" for r, share in shares[: last + 1]]
    return [
        *rows,
        f"abstained on {facts['abstained']:.1%}, average radius {facts['average_radius']:.4g}; "
        f"sigma {facts['sigma']:g}, {facts['draws']:,} draws, alpha {facts['alpha']:g}",
    ]
