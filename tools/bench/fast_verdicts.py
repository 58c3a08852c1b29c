"""`python -m tools.bench.fast_verdicts golden RUN ...`: misses and cost of `--version fast`.

Attacks each network by the standard and the fast version of AutoAttack, with separate ledgers, so
that neither sees the other's results. Writes a row of JSON for each network and norm: the share of
the passes, the images that only the standard version fools, the sample's bound on them, and how
often this bound would have held for samples from other seeds. The same command skips existing rows.

A network is `golden` (the small one of the golden values, trained on CIFAR-10), the folder of a
run, whose data set gives the images, or FILE.py:FUNCTION in PyTorch, for images of CIFAR-10.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxrobust.runtime.commandline.arguments import Arguments
from tools import guarded, timed

RADII = "linf:8/255,l2:0.5,l1:6"


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.add_argument("networks", nargs="+", help="golden, RUN folders, or FILE.py:FUNCTION.")
    parser.flag("threats", default=RADII, help="Norms and radii; default: %(default)s.")
    parser.flag("images", type=int, default=200, help="Number of images; default: %(default)s.")
    parser.flag("seed", type=int, default=0, help="Seed of all draws; default: %(default)s.")
    parser.flag("draws", type=int, default=200, help="Number of other samples; default: 200.")
    parser.flag("data_dir", help="Folder of CIFAR-10, as for evaluate.")
    parser.flag("batch", type=int, help="Number of slots.")
    parser.flag("out", default="runs/fast", help="Folder of rows and ledgers; default: runs/fast.")
    return parser.parse_args()


def network_of(name: str, count: int, data_dir: str | None) -> tuple[Any, Any, Any]:
    """Return (logits_fn, images f32[n,H,W,C], labels i32[n])."""
    import numpy as np

    from jaxrobust.data import Prepared, open_source
    from jaxrobust.data.stream import pipeline
    from jaxrobust.evaluation.questions import flags, measuring
    from jaxrobust.evaluation.questions.flags import GivenFlags
    from tools.bench.attacked_networks import our_network

    if Path(name).is_dir():
        given = GivenFlags(workdir=name, data_dir=data_dir, norm="linf", epsilon=0.1)
        _, subject, source = flags.settled(given)
        _, subject, weights = flags.weights(given, subject, source)
        logits_fn, size = measuring.networks_of(subject, weights)("float32"), subject.image_size
    else:
        logits_fn, size = our_network(name, converted=":" in name), 32
        source = open_source("cifar10", "test", data_dir=data_dir, num_classes=10)
    how = pipeline.preprocessing_id(source, size, None)
    count = min(count, len(source))
    prepared = Prepared(source, image_size=size, preprocessing=how, images=count)
    return logits_fn, np.asarray(prepared[np.arange(count)], np.float32), prepared.labels()


def passes_of(result: Any) -> int:
    """Count forward and backward passes, including those of the clean images."""
    return len(result.robust) + sum(cost.forward + cost.backward for cost in result.costs)


def stood(result: Any) -> Any:
    """Mark the images that withstood everything except the sample's extra attacks, bool[N]."""
    standing = result.robust.copy()
    standing[result.about["fast"]["fallen"]] = True
    return standing


def coverage(standing: Any, missed: Any, sampled: int, draws: int) -> dict[str, float]:
    """Draw the sample with other seeds, and count how often its bound would have held."""
    import numpy as np

    from jaxrobust.evaluation.records import stopping

    if not standing.any():
        return {}
    held, bounds = 0, []
    for seed in range(draws):
        chosen = stopping.draw_survivors(seed, np.arange(len(standing)), standing, sampled)
        found = int((chosen & missed).sum())
        bound = stopping.most_fooled(found, sampled, int(standing.sum())) - found
        held += bound >= int((missed & ~chosen).sum())
        bounds.append(bound)
    return {"covered": held / draws, "mean_at_most": float(np.mean(bounds))}


def row_of(name: str, threat: Any, data: tuple[Any, Any, Any], args: argparse.Namespace) -> Any:
    """Attack a network by both versions, and compare them."""
    from jaxrobust.evaluation import autoattack

    logits_fn, images, labels = data
    place = Path(args.out) / f"{Path(name).name.replace(':', '-')}-{threat.norm}"
    how: dict[str, Any] = {**threat.settings(), "seed": args.seed, "batch_size": args.batch}
    shutil.rmtree(place, ignore_errors=True)  # an interrupted one, whose costs are lost
    results, seconds = {}, {}
    for version in ("standard", "fast"):
        ledger = place / version / "ledger.jsonl"
        own: dict[str, Any] = {**how, "version": version, "ledger": ledger}
        call = functools.partial(autoattack, logits_fn, images, labels, **own)
        results[version], seconds[version], _ = timed(call)
    return compared(name, threat, results, args.draws) | {
        "seconds": {key: round(value, 1) for key, value in seconds.items()}
    }


def compared(name: str, threat: Any, results: Mapping[str, Any], draws: int) -> dict[str, Any]:
    """Compare cost and findings of the fast version with the standard one."""
    whole, fast = results["standard"], results["fast"]
    missed = fast.robust & ~whole.robust
    about = fast.about["fast"]
    standing = stood(fast)
    passes = {key: passes_of(result) for key, result in results.items()}
    of_standard = int((whole.clean & ~whole.robust).sum())
    return {
        "network": name,
        "threat": threat.written(),
        "images": len(whole.robust),
        "clean": float(whole.clean.mean()),
        "standard": float(whole.robust.mean()),
        "fast": float(fast.robust.mean()),
        "passes": passes,
        "share": passes["fast"] / passes["standard"],
        "fooled_by_standard": of_standard,
        "missed": int(missed.sum()),
        "only_fast": int((whole.robust & ~fast.robust).sum()),
        "by": {n: int((whole.fooled_by[missed] == n).sum()) for n in set(whole.fooled_by[missed])},
        **about,
        "bound_held": int(missed.sum()) <= about["at_most"],
        "missed_by_what_all_meet": int((standing & ~whole.robust).sum()),
        "draws": draws,
        **coverage(standing, standing & ~whole.robust, about["sampled"], draws),
    }


def main() -> None:
    args = parse()
    from jaxrobust.runtime.commandline import threats as threat_flags
    from jaxrobust.runtime.files import jsonl

    rows = Path(args.out) / "rows.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    threats = [threat_flags.parse(text) for text in args.threats.split(",")]
    keys = ("network", "threat", "images", "seed")
    done = {tuple(row[key] for key in keys) for row in jsonl.read(rows)}
    for name in args.networks:
        data = None
        for threat in threats:
            if (name, threat.written(), args.images, args.seed) in done:
                continue
            data = data or network_of(name, args.images, args.data_dir)
            row = row_of(name, threat, data, args) | {"images": args.images, "seed": args.seed}
            jsonl.append(rows, row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    guarded("fast_verdicts", main)
