"""Measurements of a network for `bench_gpu.py`, each in a process that has the GPU to itself."""

import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.runtime.commandline.arguments import config_name
from tools import OUT_OF_MEMORY, out_of_memory
from tools.gpu import figures, tables, trace
from tools.gpu.figures import ROOT, SIDES, NoTime

OURS, THEIRS = SIDES
STEP = {OURS: "step", THEIRS: "torch"}  # programs of bench_step.py, and of programs.py
# Below these batches, gradients and update need more memory than the batch itself.
MEMORY = {OURS: ("memory", "--batch=32"), THEIRS: ("torch_memory", "--batch=16")}
AUTOATTACK = {OURS: "autoattack", THEIRS: "pyautoattack"}
SHARE = 0.92  # share of memory that the first batch should fill
WORTH = 1.2  # once a batch fits, one that is larger by this factor is tried
ROUNDING = 0.05  # bfloat16 error relative to the logits' standard deviation (on CPU: 0.012)
ALIKE = 4.0  # an error this many times the other side's is more than rounding
LONGER = 15.3  # passes of standard AutoAttack relative to a short one, if no image is fooled
TRACED_STEPS = 3


class Variant(NamedTuple):
    """Our step with something changed."""

    name: str
    of: str = ""  # part of the names of the networks to which it applies
    flags: str = ""  # of XLA
    options: tuple[str, ...] = ()  # of bench_step.py and programs.py


VARIANTS = (
    Variant("plain attention", of="vit", options=("--attention=plain",)),
    Variant("no Triton products", flags="--xla_gpu_enable_triton_gemm=false"),
    Variant("latency hiding", flags="--xla_gpu_enable_latency_hiding_scheduler=true"),
    Variant("cuDNN layer norm", flags="--xla_gpu_enable_cudnn_layer_norm=true"),
    Variant("cuDNN fusions", flags="--xla_gpu_cudnn_gemm_fusion_level=3"),
    Variant("no command buffers", flags="--xla_gpu_enable_command_buffer="),
)


class Attack(NamedTuple):
    """A run of AutoAttack."""

    side: str
    length: str
    search: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.length}, search in {self.search}"


ATTACKS = (
    Attack(OURS, "short"),
    Attack(OURS, "short", "bfloat16"),
    Attack(THEIRS, "short"),
    Attack(OURS, "standard", "bfloat16"),
)


def environment(caches: Path) -> dict[str, str]:
    """Environment of measuring processes: one GPU, nearly all of its memory, caches of this run.

    The first process of a batch compiles with empty caches, and the later ones read its programs,
    so compile seconds are from the first.
    """
    defaults = {"CUDA_VISIBLE_DEVICES": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
    fixed = {
        "JAX_COMPILATION_CACHE_DIR": str(caches.absolute() / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches.absolute() / "torch"),
    }
    return defaults | os.environ | fixed


class Network(NamedTuple):
    """A network, and the file of its figures."""

    config: str
    options: tuple[str, ...]  # of all programs
    environment: dict[str, str]
    kept: figures.Figures
    steps: int = 10

    @property
    def name(self) -> str:
        return config_name(self.config)

    def of(
        self, what: str, kind: str, run: Callable[[], Any], guess: float | None = None, **more: Any
    ) -> Any:
        """Return the figure `what`; measure it if the file lacks it."""
        about = {"network": self.name, "options": [*self.options], "what": what}
        return self.kept.of(about | more, kind, run, guess)

    def rows(self, what: str) -> list[figures.Row]:
        """List the figures `what` in the file."""
        return figures.chosen(self.kept.rows, self.name, self.options, what)

    def with_flags(self, flags: str) -> "Network":
        """Return the network with more XLA flags."""
        flags = f"{self.environment.get('XLA_FLAGS', '')} {flags}".strip()
        return self._replace(environment=self.environment | {"XLA_FLAGS": flags})

    def summary(self) -> dict[str, Any] | None:
        """Return the figures of the steps, for JSON; None if no turn is finished."""
        sums = tables.summary(self.rows("step"))
        traced = [row["figure"] for row in self.rows("profile")][-1:]
        about = {"config": self.name, "options": [*self.options]}
        return sums and about | sums | dict(zip(["profile"], traced, strict=False))


# --- Processes ---


class Failed(RuntimeError):
    """A program ended with an error; `reason` is its message."""

    def __init__(self, where: str, code: int, stderr: str) -> None:
        super().__init__(f"{where}: exit code {code}\n{stderr[-4000:]}")
        lines = stderr.strip().splitlines() or ["no message"]
        # After the message, XLA prints its list of flags, and JAX a note about its traceback.
        sentences = [x for x in lines if re.match(r"[\w.]*(Error|Exception)\b|.*Unknown flag", x)]
        self.reason = re.sub(r"^F\d.*?\] ", "", (sentences or lines)[-1])


def _end_with_parent() -> None:
    """Let the kernel end this process with its parent, which frees the GPU for the next."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def process(network: Network, tool: str, *words: str, label: str) -> dict[str, Any] | None:
    """Return the JSON object of a tool; None: out of memory."""
    command = [sys.executable, str(ROOT / "tools" / tool), *words, *network.options]
    how: dict[str, Any] = {"env": network.environment, "capture_output": True, "text": True}
    limit = network.kept.limit()
    try:
        done = subprocess.run(command, **how, timeout=limit, preexec_fn=_end_with_parent)
    except subprocess.TimeoutExpired:
        raise NoTime(f"{label} (stopped after {limit:.0f} s)") from None
    # The driver's own failures to allocate may end the process before Python hears of them.
    killed = done.returncode < 0 and out_of_memory(RuntimeError(done.stderr))
    if done.returncode == OUT_OF_MEMORY or killed:
        say(network, label, "out of memory")
        return None
    if done.returncode == 2:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(re.sub(r"^(bench_step|programs): ", "", last))
    if done.returncode:
        raise Failed(f"{network.name}, {label}", done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def attempt(
    network: Network, side: str, batch: int, *more: str, variant: str = ""
) -> dict[str, Any] | None:
    """Measure the step of one side; None: out of memory."""
    words = [network.config, "--json", "--against=torch", "--program", STEP[side]]
    words += ["--dtype=bfloat16", "--rounds=1", f"--batch={batch}", f"--steps={network.steps}"]
    label = ", ".join(filter(None, [side, variant, f"batch {batch}"]))
    printed = process(network, "bench_step.py", *words, *more, label=label)
    if printed is None:
        return None
    of_program = ("images_per_s", "compile_s", "mfu", "peak_memory")
    result = {key: printed[key].get(STEP[side]) for key in of_program}
    say(network, label, f"{result['images_per_s']:.1f} images/s")
    return result | {"batch": batch, "device": printed["device"]}


def program(network: Network, what: str, *more: str) -> dict[str, Any] | None:
    """Run a program of programs.py."""
    label = ", ".join([what, *more])
    printed = process(network, "gpu/programs.py", what, network.config, *more, label=label)
    say(network, label, json.dumps(printed))
    return printed


def say(network: Network, label: str, what: str) -> None:
    print(f"{network.name}, {label}: {what}", file=sys.stderr, flush=True)


# --- Steps ---


def unlike(errors: dict[str, float]) -> str | None:
    """Explain how logits of both sides differ by more than rounding; None: they agree."""
    ours, theirs = (errors[side] for side in SIDES)
    # NaN is not below any limit.
    if max(errors.values()) <= ROUNDING and max(ours, theirs) <= ALIKE * min(ours, theirs):
        return None
    return (
        f"bfloat16 logits differ from float32 by {ours:.4f} (jaxrobust) and {theirs:.4f} (PyTorch) "
        f"of their standard deviation, and by {errors['between']:.4f} from each other: this is "
        "more than rounding, so no speed is measured; compare the two networks in float32 first"
    )


def agree(network: Network, *options: str, variant: str = "") -> None:
    """Stop if the two sides do not compute the same."""
    run = functools.partial(program, network, "logits", *options)
    errors = network.of("logits", "logits", run, variant=variant)
    if errors is None:
        raise RuntimeError("logits of 8 images do not fit into memory; is the GPU shared?")
    if reason := unlike(errors):
        raise RuntimeError(reason)


def memory_of(network: Network, side: str) -> dict[str, Any] | None:
    """Return the memory that a side's step needs; None: unknown."""
    # Tuning costs minutes, and affects seconds more than bytes.
    quick = network.with_flags("--xla_gpu_autotune_level=0")

    def run() -> dict[str, Any] | None:
        try:
            return program(quick, *MEMORY[side])
        except Failed as error:
            say(network, MEMORY[side][0], f"not known: {error.reason}")
            return None

    return network.of("memory", f"{side} memory", run, side=side)


def estimated(memory: dict[str, Any] | None, limit: int) -> int:
    """Estimate the largest batch that fits, rounded down to four binary digits."""
    batch = limit
    if memory and memory["per_image"] > 0:
        room = SHARE * memory["has"] - memory["fixed"]
        batch = min(limit, max(int(room / memory["per_image"]), 1))
    return batch - batch % (1 << max(batch.bit_length() - 4, 0))


Turn = Callable[[str, int, int], dict[str, Any] | None]  # (side, batch, number; 0: search)


def largest_fitting(run: Turn, side: str, memory: Any, limit: int) -> dict[str, Any]:
    """Return the figures of the largest batch that fits: the estimate, a half of it, ..."""
    start = estimated(memory, limit)
    sizes = [start >> halvings for halvings in range(start.bit_length())]
    fitting = next((figure for size in sizes if (figure := run(side, size, 0))), None)
    if fitting is None:
        raise ValueError(f"{side}: not even one image fits; use a smaller network or --image-size")
    if memory and fitting["peak_memory"] and fitting["batch"] == start:
        per_image = (fitting["peak_memory"] - memory["fixed"]) / start
        more = estimated(memory | {"per_image": per_image}, limit)
        if more >= WORTH * start:
            return run(side, more, 0) or fitting
    return fitting


def compare(run: Turn, memories: dict[str, Any], *, limit: int, rounds: int) -> None:
    """Run each side at its largest batch, and at the largest batch that fits both."""
    first = {side: largest_fitting(run, side, memories[side], limit) for side in SIDES}
    kinds = {side: figure["device"] for side, figure in first.items()}
    if len(set(kinds.values())) > 1:
        both = ", ".join(f"{side} on {kind}" for side, kind in kinds.items())
        raise ValueError(f"{both}: no comparison; install the CUDA builds of JAX and PyTorch")
    own = {side: figure["batch"] for side, figure in first.items()}
    common = min(own.values())
    turns = [(side, batch) for batch in sorted({common, *own.values()}) for side in SIDES]
    for number in range(1, rounds + 1):
        for side, batch in turns:
            if batch in (common, own[side]):
                run(side, batch, number)


def turn(network: Network, side: str, batch: int, number: int) -> dict[str, Any] | None:
    """Return the figures of a turn of one side."""

    def run() -> dict[str, Any] | None:
        figure = attempt(network, side, batch)
        if figure is None and number:
            raise RuntimeError(f"{side}: batch {batch} does not fit; is the GPU shared?")
        return figure

    known = [(row["of"]["side"], row["of"]["batch"]) for row in network.rows("step")]
    kind = f"{side} {'turn' if (side, batch) in known else 'first'}"
    return network.of("step", kind, run, side=side, batch=batch, turn=number)


def steps(network: Network, limit: int, rounds: int, batch: int | None = None) -> None:
    """Compare logits, then speeds: at one batch, or at the largest that fit."""
    agree(network)
    if batch:
        for number in range(1, rounds + 1):
            for side in SIDES:
                turn(network, side, batch, number)
        return
    memories = {side: memory_of(network, side) for side in SIDES}
    compare(functools.partial(turn, network), memories, limit=limit, rounds=rounds)


# --- What follows ---


def own_batch(network: Network, wanted: str) -> int:
    """Return the largest batch of our step, once measured."""
    rows = network.rows("step")
    batch = tables.largest(rows).get(OURS)
    turns = [row["of"] for row in rows if row["of"]["side"] == OURS and row["of"]["turn"]]
    if batch is None or all(of["batch"] != batch for of in turns):
        raise NoTime(f"{wanted}, after its steps")
    return batch


def varied(network: Network, variant: Variant) -> None:
    """Measure our step with a change; if it does not run, the figure is the reason."""
    batch, changed = own_batch(network, variant.name), network.with_flags(variant.flags)

    def run() -> dict[str, Any] | None:
        try:
            if variant.options:
                agree(changed, *variant.options, variant=variant.name)
            return attempt(changed, OURS, batch, *variant.options, variant=variant.name)
        except RuntimeError as error:
            return {"refused": getattr(error, "reason", str(error))[:200]}

    network.of("variant", "variant", run, variant=variant.name, batch=batch)


def profiled(network: Network, folder: Path) -> None:
    """Trace our step, and store where its time goes."""
    # The kernels of a replayed graph would not name their operations.
    eager = network.with_flags("--xla_gpu_enable_command_buffer=")._replace(steps=TRACED_STEPS)
    batch, folder = own_batch(network, "profile"), folder / network.name

    def run() -> dict[str, Any]:
        if attempt(eager, OURS, batch, f"--trace={folder.absolute()}") is None:
            raise RuntimeError(f"batch {batch} does not fit with --profile; is the GPU shared?")
        return trace.read(folder)

    print(trace.shown(folder, network.of("profile", "profile", run, batch=batch)))


def attacked(network: Network, images: int, attack: Attack) -> None:
    """Time AutoAttack; the expected time of a standard run is extrapolated from a short one."""
    guess = None
    short = {"side": attack.side, "variant": attack._replace(length="short").name, "batch": images}
    for row in network.rows("autoattack"):
        if attack.length == "standard" and row["figure"] and row["of"].items() >= short.items():
            guess = LONGER * row["figure"]["wall_s"] + row["figure"]["compile_s"]
    words = [f"--batch={images}", f"--length={attack.length}", f"--search_dtype={attack.search}"]
    run = functools.partial(program, network, AUTOATTACK[attack.side], *words)
    kind = f"{attack.side} {attack.search} {attack.length}"
    about = {"side": attack.side, "variant": attack.name, "batch": images}
    network.of("autoattack", kind, run, guess, **about)
