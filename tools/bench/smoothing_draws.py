"""`python -m tools.bench.smoothing_draws`: draws per second of randomised smoothing, and PyTorch's.

Both certify the same image with the same weights, of a WRN-28-10 at 32 px, by turns: ours as
`evaluate --certify` does, PyTorch's in batches of its best size among a few.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxrobust.runtime.commandline.arguments import Arguments
from jaxrobust.runtime.processes.launch import keep_large_buffers
from tools import guarded, timed

SIZES = (16, 64, 256)  # batches that are tried


def parse() -> argparse.Namespace:
    parser = Arguments(__doc__)
    parser.flag("draws", type=int, default=512, help="Number of draws in a turn.")
    parser.flag("rounds", type=int, default=3, help="Number of turns of each side.")
    parser.flag("network", default="wrn_28_10", help="Network; default: %(default)s.")
    return parser.parse_args()


def main() -> None:
    args = parse()
    import jax
    import numpy as np
    import torch

    from jaxrobust import convert, models
    from jaxrobust.evaluation.engine import engine, smoothing
    from jaxrobust.publish import torch_networks
    from tools.bench import torch_reference

    about = {"num_classes": 10}
    theirs = torch_networks.network(args.network, img_size=32, **about)
    theirs = torch_reference.randomised(theirs, seed=0).eval()
    arrays = {key: value.numpy() for key, value in theirs.state_dict().items()}
    params, stats = convert.from_torch(args.network, arrays, image_size=32, **about)
    net = models.create(args.network, image_size=32, **about)
    logits_fn = jax.tree_util.Partial(lambda p, s, x: net.apply(p, s, x)[0], params, stats)
    image = np.random.default_rng(0).random((32, 32, 3), np.float32)
    x, sigma = torch.tensor(image).permute(2, 0, 1)[None], 0.25

    def ours(runner: engine.Engine) -> None:
        np.asarray(smoothing.counts(runner, image, 0, 0, args.draws, sigma=sigma, seed=0))

    @torch.inference_mode()
    def torch_counts(batch: int) -> None:
        counts = torch.zeros(10, dtype=torch.int64)
        for _ in range(0, args.draws, batch):
            noisy = x + sigma * torch.randn(batch, 3, 32, 32)
            counts += torch.bincount(theirs(noisy).argmax(1), minlength=10)

    programs = {}
    for size in (size for size in SIZES if size <= args.draws):
        runner = engine.trace(engine.make(logits_fn, slots=size, image_size=32), image.shape)
        programs["jaxrobust", size] = lambda runner=runner: ours(runner)
        programs["PyTorch", size] = lambda size=size: torch_counts(size)
    spent: dict[tuple[str, int], list[float]] = {key: [] for key in programs}
    for run in programs.values():
        run()  # compiles
    for _ in range(args.rounds):
        for key, run in programs.items():
            _, wall, _ = timed(run)
            spent[key].append(args.draws / wall)
    print(f"{args.network}, 32 px, {jax.device_count()} devices, {torch.get_num_threads()} threads")
    best: dict[str, float] = {}
    for (side, size), speeds in spent.items():
        shown = ", ".join(f"{speed:.1f}" for speed in speeds)
        print(f"{side:10} {size:4} at a time: {shown} draws/s")
        best[side] = max(best.get(side, 0.0), statistics.median(speeds))
    print(f"jaxrobust / PyTorch, each at its best: {best['jaxrobust'] / best['PyTorch']:.2f}")


if __name__ == "__main__":
    keep_large_buffers()
    guarded("smoothing_draws", main)
