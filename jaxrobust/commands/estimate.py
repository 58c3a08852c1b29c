"""`python -m jaxrobust.estimate CONFIG --on cpu|gpu|v5e:8x8|h100:8`: what a run will cost.

Prints hours, chip-hours, images/s and memory of each phase and of the AutoAttack after it, and the
money where `--price` says what an hour of a chip costs. On devices that are here the programs are
compiled and run for a moment; for others the operations of the model are divided by the chips' peak
and an assumed utilisation, and for TPUs the step is compiled too, where libtpu is installed.

Exit codes: 0 done; 2 a mistake, with one sentence on stderr; 3 another reason that is named.
"""

import argparse
import shutil
import sys
import tempfile
import time

from jaxrobust.estimate import changes
from jaxrobust.estimate import devices as targets
from jaxrobust.runtime.commandline import arguments
from jaxrobust.runtime.commandline.arguments import Arguments, answer, config_name, number
from jaxrobust.runtime.text import patience

BEGUN = time.perf_counter()
UTILISATION = 0.2  # assumed where nothing is measured; --utilisation says another one


def parse() -> argparse.Namespace:
    """Return the command line; `changes` are the words that change the config."""
    words, changed = changes.divided(sys.argv[1:])
    parser = Arguments(
        __doc__,
        prog=arguments.program or "python -m jaxrobust.estimate",
        usage="%(prog)s CONFIG --on DEVICES [--config.key=value ...] [flags]",
        epilog="Any key of the config is set as for training: --config.train.epochs=20.",
    )
    parser.add_argument("config", help="Config, as for training: its file, or FILE:ARGUMENTS.")
    parser.flag(
        "on",
        required=True,
        metavar="DEVICES",
        help="Devices: cpu, gpu or tpu for those that are here, or chips such as v5e:8x8 or "
        "h100:8.",
    )
    parser.flag("price", help="Price of one chip for one hour, in any currency.")
    parser.flag(
        "utilisation",
        help=f"Assumed share of the chips' bfloat16 peak; default: {UTILISATION}. A step never "
        "counts as faster than the roofline of its executable, where that is known.",
    )
    parser.flag("batch", type=int, help="Images per chip and step; default: the config's.")
    parser.flag("fsdp", type=int, help="Number of devices that share the state; 0: all.")
    parser.flag(
        "seconds",
        type=float,
        default=3.0,
        help="Seconds for which each step and each attack is measured; default: 3.",
    )
    parser.flag("robust", default="0.5", help="Share of images that is assumed to be robust.")
    parser.flag("images", type=int, help="Number of images of AutoAttack; 0: leave it out.")
    parser.flag("fast", action="store_true", help="Do not compile for TPUs that are not here.")
    parser.flag("json", action="store_true", help="Print one JSON object on the last line.")
    args = parser.parse_args(words)
    args.changes = changed
    return args


def run(args: argparse.Namespace) -> dict:
    """Print the estimate and return it.

    Raises:
      ValueError: a mistake in the command or in the config.
    """
    price = None if args.price is None else number("price", args.price)
    utilisation = number("utilisation", args.utilisation or str(UTILISATION))
    robust = number("robust", args.robust)
    rules = {
        "price": (price is None or 0 < price < float("inf"), price, "above 0"),
        "utilisation": (0 < utilisation <= 1, utilisation, "above 0 and at most 1, such as 0.4"),
        "robust": (0 <= robust <= 1, robust, "from 0 to 1"),
        "seconds": (0 < args.seconds < 3600, args.seconds, "above 0 and below 3600"),
        "batch": (args.batch is None or args.batch >= 1, args.batch, "at least 1"),
        "images": (args.images is None or args.images >= 0, args.images, "at least 0"),
    }
    for flag, (inside, value, wanted) in rules.items():
        if not inside:
            raise ValueError(f"--{flag}={value} must be {wanted}")
    with patience.of("loading JAX and looking for its devices"):
        targets.prepare(args.on)
        target = targets.target(args.on)
    if price is not None and target.name == "cpu":
        raise ValueError(
            "--price is that of one chip for one hour, and --on cpu has no chips; name some with "
            "--on, such as v5e:8x8, or leave --price out"
        )
    if args.utilisation and target.here:
        raise ValueError(
            f"--utilisation is assumed for chips that are not here, and --on {args.on} is "
            "measured; leave it out"
        )
    return _account(args, target, utilisation, price, robust)


def _account(
    args: argparse.Namespace,
    target: targets.Target,
    utilisation: float,
    price: float | None,
    robust: float,
) -> dict:
    compiles = target.compiles and not target.here and not args.fast
    with patience.of("loading the package"):
        import jax

        from jaxrobust.config import phases
        from jaxrobust.estimate import account, page
        from jaxrobust.runtime.devices import topology

        chips = topology.devices(args.on, flag="--on") if compiles else None
        config = changes.configured(args.config, args.changes)

    for name in phases(config):
        if args.batch is not None:
            config[name].batch_size = args.batch * target.chips
    if args.fsdp is not None:
        config.mesh.fsdp = args.fsdp

    with tempfile.TemporaryDirectory() as empty:
        # As where nothing is cached yet: a later phase finds what an earlier one has compiled.
        jax.config.update("jax_compilation_cache_dir", empty)
        found = account.account(
            config,
            target,
            utilisation=utilisation,
            seconds=args.seconds,
            chips=chips,
            images=args.images,
            robust=robust,
            start=time.perf_counter() - BEGUN if target.here else 0.0,
        )
    found = {"config": config_name(args.config), "changes": args.changes, "price": price} | found
    if price is not None:
        found = account.priced(found, price)
    width = shutil.get_terminal_size((100, 24)).columns  # 100: where it is no terminal
    print(page.page(found, width=max(width, 60)))
    return found


if __name__ == "__main__":
    from jaxrobust.runtime.processes.launch import keep_large_buffers, use_every_core

    keep_large_buffers()
    use_every_core()  # as the AutoAttack does; training takes the first device alone
    answer(run, parse(), "nothing is lost; the same command begins again")
