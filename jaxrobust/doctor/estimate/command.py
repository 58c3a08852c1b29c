"""The estimate command: check the flags, compute the estimate, and print it as a page."""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrobust.doctor.estimate import changes
from jaxrobust.doctor.estimate import devices as targets
from jaxrobust.runtime.commandline.arguments import config_name, number
from jaxrobust.runtime.commandline.fields import flag
from jaxrobust.runtime.text import patience
from jaxrobust.training.update.value_checks import must_be

UTILISATION = 0.2  # assumed if nothing is measured


@dataclass(frozen=True, kw_only=True)
class EstimateSettings:
    """The config to estimate, the devices, and the assumptions."""

    config: str = flag(
        "Config, as for training: its file, or FILE:ARGUMENTS.", word=True, required=True
    )
    on: str = flag(
        "Devices: cpu, gpu or tpu for this machine's, or chips such as v5e:8x8 or h100:8.",
        required=True,
        metavar="DEVICES",
    )
    num_slices: int = flag(
        "Number of TPU slices that train together, each as specified by --on; default: 1.", 1
    )
    price: float | None = flag("Price of one chip for one hour, in any currency.", reads=number)
    utilisation: float | None = flag(
        f"Assumed share of the chips' bfloat16 peak; default: {UTILISATION}. A step never counts "
        "as faster than the roofline of its executable, if that is known.",
        reads=number,
    )
    batch: int | None = flag("Images per chip and step; default: the config's.")
    fsdp: int | None = flag("Number of devices that share the state; 0: all.")
    seconds: float = flag("Seconds to measure each step and each attack; default: 3.", 3.0)
    robust: float = flag("Assumed share of robust images.", "0.5", reads=number)
    images: int | None = flag("Number of images for AutoAttack; 0: leave it out.")
    fast: bool = flag("Do not compile for TPUs that this machine lacks.", False)
    target: float | None = flag(
        "AutoAttack accuracy in percent, instead of a config: estimates the cost of reaching it, "
        "from a scaling law fitted to published runs.",
        reads=number,
    )
    dataset: str | None = flag("Data set for --target; the law only covers cifar10.")


def check(settings: EstimateSettings) -> None:
    """Raise if numbers are out of range."""
    price, utilisation, batch, images = (
        settings.price,
        settings.utilisation,
        settings.batch,
        settings.images,
    )
    if settings.dataset is not None:
        raise ValueError(
            "--dataset is only for --target; a config names its data set, so leave --dataset out"
        )
    must_be("--price", price, price is None or 0 < price < float("inf"), "above 0")
    inside = utilisation is None or 0 < utilisation <= 1
    must_be("--utilisation", utilisation, inside, "above 0 and at most 1, such as 0.4")
    must_be("--robust", settings.robust, 0 <= settings.robust <= 1, "from 0 to 1")
    must_be("--seconds", settings.seconds, 0 < settings.seconds < 3600, "above 0 and below 3600")
    must_be("--batch", batch, batch is None or batch >= 1, "at least 1")
    must_be("--images", images, images is None or images >= 0, "at least 0")
    must_be("--num_slices", settings.num_slices, settings.num_slices >= 1, "at least 1")


def answer(settings: EstimateSettings, changed: list[str], begun: float) -> dict[str, Any]:
    """Print the estimate and return it.

    Args:
      changed: words that change the config, `--config.key=value`.
      begun: start time of the process, from `time.perf_counter`.
    """
    check(settings)
    with patience.of("loading JAX and looking for its devices"):
        targets.prepare(settings.on)
        target = targets.target(settings.on, settings.num_slices)
    if settings.price is not None and target.name == "cpu":
        raise ValueError(
            "--price is the price of one chip for one hour, but --on cpu has no chips; name some "
            "with --on, such as v5e:8x8, or leave --price out"
        )
    if settings.utilisation and target.here:
        raise ValueError(
            f"--utilisation is assumed for chips that this machine lacks, but --on {settings.on} "
            "is measured; leave it out"
        )
    compiles = target.compiles and not target.here and not settings.fast
    with patience.of("loading the package"):
        import jax

        from jaxrobust.config import phases
        from jaxrobust.doctor.estimate import account, account_lines
        from jaxrobust.doctor.programs import topology

        slices = target.slices
        chips = topology.devices(settings.on, flag="--on", slices=slices) if compiles else None
        config = changes.configured(settings.config, changed)

    for name in phases(config):
        if settings.batch is not None:
            config[name].batch_size = settings.batch * target.chips
    if settings.fsdp is not None:
        config.mesh.fsdp = settings.fsdp

    with tempfile.TemporaryDirectory() as empty:
        # An empty cache, as on a first run; later phases still reuse programs of earlier ones.
        jax.config.update("jax_compilation_cache_dir", empty)
        estimate = account.account(
            config,
            target,
            utilisation=settings.utilisation or UTILISATION,
            seconds=settings.seconds,
            chips=chips,
            images=settings.images,
            robust=settings.robust,
            start=time.perf_counter() - begun if target.here else 0.0,
        )
        name = config_name(settings.config)
        options: dict[str, Any] = {"utilisation": settings.utilisation or UTILISATION}
        options["seconds"] = settings.seconds
        starts = account.start_costs(config, Path("runs") / name, target, **options)
    if starts:
        estimate["starts"] = starts
        estimate["known"] += [account.start_sentence(row) for row in starts]
    about = {"config": name, "changes": changed, "price": settings.price}
    estimate = about | estimate
    if settings.price is not None:
        estimate = account.priced(estimate, settings.price)
    width = shutil.get_terminal_size((100, 24)).columns  # 100 if not in a terminal
    print(account_lines.page(estimate, width=max(width, 60)))
    return estimate
