"""Result records: a number together with everything that is needed to repeat it."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxrobust.attacks import registry
from jaxrobust.evaluation.network import checks, images, randomised
from jaxrobust.evaluation.records import comparable, verdicts
from jaxrobust.models.table import multiply_adds
from jaxrobust.runtime.devices import hardware
from jaxrobust.runtime.files import jsonl, provenance
from jaxrobust.types import VERDICT_PRECISION, Params
from jaxrobust.weights.store import hashes

# Every record has these keys, schema 2 those of `_SINCE_2` too; what nobody knows is null.
_KEYS: dict[str, tuple[type, ...]] = {
    "time": (str,),
    "commit": (str,),
    "config_sha256": (str,),
    "weights": (str,),
    "weights_sha256": (str,),
    "dataset": (str,),
    "split": (str,),
    "image_ids": (str,),
    "preprocessing": (str,),
    "dtype": (str,),
    "matmul_precision": (str,),
    "attacks": (list,),  # their settings, norm and radius among them; empty: there was none
    "clean": (float, int),  # accuracy, a fraction of the images
    "robust": (float, int),  # after all attacks
    "seed": (int,),
    "flags": (dict,),  # what makes the number doubtful, and what to do about it
    "versions": (dict,),
    "device": (str,),
}
_SINCE_2: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "verdicts": (str,),  # the file beside the record that has them image by image
    "interval": (dict,),  # clean, robust: exact, of 95 %
    "costs": (list,),  # of each attack: images fooled, passes, seconds, how it steps
    "size": (dict,),  # parameters, multiply_adds (of one image)
    "training": (dict,),  # of the whole run: phases with their attacks, passes over images in all
}
_REPLAY = "none: what fooled elsewhere, projected"


def accuracy_record(
    *,
    config: dict[str, Any] | None,
    weights: str | None,
    params: Params | None,
    stats: Params | None,
    dataset: str,
    split: str,
    image_ids: str,
    preprocessing: str,
    dtype: str | None,
    attacks: list[dict[str, Any]],
    clean: float,
    robust: float | None,
    seed: int,
    ids_sha256: str | None = None,
    classes: Sequence[str] = (),
    flags: dict[str, str] | None = None,
    n: int | None = None,
    known: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the record of one network's clean and robust accuracy (fractions of the images).

    What is None is null there: of a function of images nobody knows config, weights and type.

    Args:
      config: the resolved config that the network was made from; only its hash is kept.
      weights: which ones, in words ("train, step 440, ema").
      params, stats: those weights; only their hash is kept.
      dataset, split, preprocessing: where the images come from.
      image_ids: which ones, by their place in the split ("0..999").
      dtype: the network's compute type; its products are made at `VERDICT_PRECISION`, which the
        record names, wherever a verdict falls.
      attacks: the settings of each, norm and epsilon among them; empty if there was none.
      clean: accuracy before any attack.
      robust: accuracy after all of them; None if there was none.
      seed: of the attacks' draws.
      ids_sha256: of the list of ids that makes the split, if one does (`Source.ids_sha256`).
      classes: their names in the order of labels, where they have any; only their hash is kept.
      flags: what puts the number in doubt, and why.
      n: number of images that were evaluated; None: the intervals are not known.
      known: of `verdicts`, `costs`, `size` and `training` (`_SINCE_2`) what is known.
      more: what only some evaluations have to say; its keys follow the others.
    """
    lists = {"ids_sha256": ids_sha256, "classes_sha256": hashes.classes_sha256(classes)}
    named = params is not None and stats is not None
    record = written(
        config_sha256=None if config is None else hashes.config_sha256(config),
        weights=weights,
        weights_sha256=hashes.weights_sha256(params, stats) if named else None,  # type: ignore
        dataset=dataset,
        split=split,
        image_ids=image_ids,
        preprocessing=preprocessing,
        dtype=dtype,
        attacks=attacks,
        clean=clean,
        robust=robust,
        seed=seed,
        flags=flags or {},
        interval=n and {"clean": interval(clean, n), "robust": interval(robust, n)},
        **(known or {}),
    )
    return record | {key: value for key, value in lists.items() if value} | (more or {})


def written(**known: Any) -> dict[str, Any]:
    """Return a record of what is known; the other keys that every record has are None."""
    if known.get("costs"):
        costs = [c | {"step_rule": _rule(c["attack"])} for c in known["costs"]]
        known = known | {"costs": costs}
    return dict.fromkeys((*_KEYS, *_SINCE_2)) | {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": provenance.commit(),
        "matmul_precision": VERDICT_PRECISION,
        "flags": {},
        **known,
        "versions": provenance.versions(),
        "device": hardware.devices(),
        "schema": verdicts.SCHEMA,
    }


def _rule(attack: str) -> str | None:
    """Say what the steps of an attack are; those of a sum of several are not known."""
    return _REPLAY if attack == verdicts.REPLAY else registry.rule(attack)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of them.

    Raises:
      ValueError: it is none.
    """
    check(record, str(path))
    jsonl.append(path, record)


def save(
    path: Path, found: verdicts.Verdicts, record_of: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Add what `record_of` makes to a file of records, its verdicts beside it, and return it."""
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} gets a line of JSON; give a file such as results.jsonl")
    record = record_of()
    file = verdicts.file_of(record["evaluation"])
    record["verdicts"] = file
    if jax.process_index() == 0:
        verdicts.write(path.with_name(file), record["evaluation"], found)
        append(path, record)
    return record


def check(record: dict[str, Any], where: str) -> None:
    """Refuse what is no record of this schema or an older one.

    Raises:
      ValueError: a newer schema, or a key that is missing or has another type; with what to do.
    """
    schema = record.get("schema", 1)
    if not isinstance(schema, int) or schema > verdicts.SCHEMA:
        raise ValueError(
            f"{where} has a record of schema {schema}, and this version knows up to "
            f"{verdicts.SCHEMA}; install a newer jaxrobust"
        )
    for key, kinds in (_KEYS | (_SINCE_2 if schema > 1 else {})).items():
        value = record.get(key)
        if (key not in record and schema > 1) or not isinstance(value, (*kinds, type(None))):
            raise ValueError(
                f"{where} has a record whose {key} is {value!r:.40}; remove that line, or get the "
                "file again"
            )


def interval(accuracy: float | None, n: int) -> list[float] | None:
    """Return the exact 95 % interval of an accuracy on n images; None: there is none."""
    return None if accuracy is None else list(checks.binomial_interval(round(accuracy * n), n))


# What only some evaluations of AutoAttack have to say: what was replayed, and below.
_OUTCOMES = ("search_sample", "clipped")  # what was found, which tells no evaluation from others
SAID = ("replayed", "robust_beyond", "draws", *_OUTCOMES)
_KNOWN = ("model", "weights", "weights_sha256", "dataset", "split", "preprocessing", "dtype")


def of_result(result: Any, known: dict[str, str | None]) -> dict[str, Any]:
    """Return the record of an `AutoAttackResult`, see there; `known` is what its caller knows."""
    if unknown := sorted(known.keys() - set(_KNOWN)):
        raise ValueError(f"a record has no {', '.join(unknown)}; one of {', '.join(_KNOWN)}")
    about, n = result.about, len(result.clean)
    ball = {key: about[key] for key in ("norm", "epsilon")}
    height, width, channels = about["image"]
    model = {"name": known.get("model"), "num_classes": about["classes"], "options": None}
    model |= {"image_size": height if height == width else None, "in_channels": channels}
    names = [attack["name"] for attack in result.attacks]
    # With attacks of its own, a version is only where they started from.
    method = " + ".join(names) if about["chosen"] else f"autoattack {about['version']}"
    if how := about.get("draws"):
        method += f", {randomised.Verdict(how['rule'], how['draws']).words()}"
    return written(
        **{key: value for key, value in known.items() if key != "model"},
        image_ids=about["image_ids"],
        attacks=[ball | settings for settings in result.attacks],
        clean=float(result.clean.mean()) if n else None,
        robust=float(result.robust.mean()) if n else None,
        seed=about["seed"],
        flags=dict(result.flags),
        interval={
            "clean": interval(float(result.clean.mean()), n),
            "robust": interval(float(result.robust.mean()), n),
        }
        if n
        else None,
        costs=[cost._asdict() for cost in result.costs],
    ) | {
        "evaluation": number_of(told_apart(about) | {"attacks": result.attacks}),
        "model": model,
        "method": method,
        "search_dtype": None,
        "accuracy_after": {k: float(v) if n else None for k, v in result.accuracy_after.items()},
        "version": about["version"],
        "images_sha256": about["images_sha256"],
        "fingerprint": about["fingerprint"],
        **{key: about[key] for key in SAID if key in about},
        "function": dict.fromkeys(("name", "file", "sha256"))
        | {"arrays_sha256": about["arrays_sha256"]},
    }


def said(known: dict[str, Any]) -> list[str]:
    """Return lines for people on what only some evaluations have to say."""
    lines = []
    if known.get("clipped"):
        lines.append(images.Overshot(**known["clipped"]).words())
    if how := known.get("draws"):
        lines.append(_judged(how))
    return lines


def _judged(how: dict[str, Any]) -> str:
    """Return by what a randomised network's answers were judged, and what one draw gives."""
    judged = randomised.Verdict(how["rule"], how["draws"])
    line = f"verdicts by {judged.words()}: {randomised.RULES[judged.rule]}"
    one = how.get("one_draw")
    if judged.rule == randomised.ONE:
        return line
    if not one:  # of a union
        return f"{line}; by one draw it is not known, because its parts did not note that"
    most = "at most " if one.get("at_most") else ""
    ends = (one.get("interval") or {}).get("robust")
    between = f", 95 % interval {ends[0]:.1%} to {ends[1]:.1%}" if ends else ""
    return f"{line}; by one draw, as auto-attack judges: clean {one['clean']:.1%}, robust " + (
        f"{most}{one['robust']:.1%}{between}"
    )


def told_apart(about: dict[str, Any]) -> dict[str, Any]:
    """Return what a result says of itself that tells its evaluation from others: neither the probe
    and versions of its network nor what was found.
    """
    known = about["fingerprint"]
    exact = {key: value for key, value in known.items() if isinstance(value, str)}
    own = {key: value for key, value in about.items() if key not in _OUTCOMES}
    if how := own.get("draws"):
        own["draws"] = {key: how[key] for key in ("rule", "draws")}
    return own | {"fingerprint": exact}


def number_of(identity: dict[str, Any]) -> str:
    """Return the number of an evaluation, by what it evaluates and how."""
    return hashes.config_sha256(identity)[:12]


def size(net: Any, weights: Any, image_size: int, channels: int) -> dict[str, int]:
    """Return the parameters of a network, and its multiply-adds for one image."""
    arrays = weights.params or weights.stats  # those of a user's function
    adds = multiply_adds(net, *weights, image_size=image_size, in_channels=channels)
    return {"parameters": sum(a.size for a in arrays.values()), "multiply_adds": adds}


def ids_of(images: int) -> str:
    """Return the first images of a split, as records name them."""
    return f"0..{images - 1}"


def ranges(ids: Sequence[int]) -> str:
    """Return images of a split, in their order, as records name them: "0..99, 7, 200..299"."""
    parts: list[list[int]] = []
    for number in map(int, ids):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("..".join(map(str, part)) for part in parts)


def read(workdir: Path) -> list[dict]:
    """Return the records of a workdir, oldest first.

    Raises:
      ValueError: a damaged line, or what is no record; see `check`.
    """
    path = workdir / "results.jsonl"
    found = jsonl.read(path)
    for record in found:
        check(record, str(path))
    return found


def how(record: dict) -> str:
    """Return the attack of a record in words, with what replayed points decided."""
    if not record["attacks"]:
        return "none"
    tried = comparable.tried(record)
    replays = f" ({tried})" if tried else ""
    if record.get("method") == "union":
        of = "worst case" if record.get("worst_case") else "union"
        return f"{of} of {', '.join(record['accuracy_after'])}{replays}"
    a = record["attacks"][0]
    name = record.get("method") or f"{a['name'].upper()} {a['steps']} steps"
    return f"{name}, {a['norm']} {a['epsilon']:.4g}{replays}"
