"""The flags of an evaluation, as stated on the command line; without JAX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrobust.weights.fetch import shipped

ALONE = "user"  # stands for the attacks of an evaluation with only the user's
AUTOATTACK = "autoattack"
FAST = "fast"  # part of "standard"'s jobs, the rest only on a sample: not AutoAttack
VERSIONS = ("standard", "plus", "rand", FAST, "custom")  # of AutoAttack
# `registry` knows the attacks, but needs JAX; tests/commands/test_refusals.py compares both.
FIXED = ("fgsm", "pgd-K", "cw-K", "margin-K", "mim-K")
SEARCHES = (
    *("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "mim", "square"),
    *("sparse-pgd", "sparse-pgd-p", "sparse-rs"),
)
SETTINGS = ("steps", "targets", "restarts")  # of a named attack
LENGTHS = ("relative_step", "step")  # of attacks with fixed steps
_FIXED = (*LENGTHS, "start", "l1_rule")
STOPS = ("against", "until_width")


class GivenFlags(NamedTuple):
    """The flags of `jaxrobust evaluate`; None means not given."""

    workdir: str | None = None
    phase: str | None = None
    model: str | None = None
    function: str | None = None
    torch: str | None = None
    torch_args: dict[str, Any] | None = None
    torch_output: str | None = None
    weights: str | None = None
    options: dict[str, Any] | None = None
    selected: bool = False
    shipped: str | None = None  # name of a packaged run, which `of_shipped` expands
    dataset: str | None = None
    split: str | None = None
    classes: str | None = None
    data_dir: str | None = None
    preprocessing: str | None = None  # None: `pipeline.preprocessing_id`
    num_classes: int | None = None
    image_size: int | None = None
    n: int = 0  # images of the split, spread over its classes; 0: all
    norm: str | None = None
    epsilon: float | None = None
    # Or clean, one of `fixed_steps`, or names of `registry.searching`, with commas.
    attack: str = AUTOATTACK
    version: str = "standard"  # of AutoAttack: also plus, rand, custom; or fast, a part of it
    finish: bool = False  # complete an evaluation of the fast version to the standard one
    search_dtype: str = "float32"  # compute type of AutoAttack's search; verdicts use float32
    batch: int | None = None  # images at a time, rounded up to the devices; AutoAttack: per process
    seed: int = 0  # of the attacks' draws
    steps: int | None = None  # of a named attack, replacing its default; likewise the next two
    targets: int | None = None
    restarts: int | None = None
    relative_step: float | None = None  # fixed steps: each step is this times epsilon / K
    step: float | None = None  # fixed steps: their length in units of the norm
    start: str | None = None  # fixed steps: a row of `fixed_steps.STARTS`; None: the default
    l1_rule: str | None = None  # fixed steps in L1: a row of `attacks.L1_RULES`; None: sparse
    rule: str | None = None  # for verdicts of version rand, see `randomised.verdict`
    draws: int | None = None  # number of draws for the rule
    worst_case: bool = False
    union_only: bool = False  # attack in each ball only the survivors of the balls before it
    replay: tuple[str, ...] = ()  # folders of evaluations whose adversarial images are tried first
    noreplay: bool = False  # do not replay this network's results at other radii either
    again: bool = False  # compute a second record even if one exists
    against: str | None = None  # stop once this record is behind or ahead: see `stops`
    until_width: float | None = None  # points; stop once the interval is narrower
    tie: float | None = None  # points; also stop once both differ by less
    alpha: float | None = None  # of a stop; None: 0.05
    corruptions: str | None = None
    frost: str | None = None
    certify: float | None = None
    points: tuple[str, ...] = ()
    users: tuple[Any, ...] = ()  # from --points and --attack, read by `of_users`
    bundle: str | None = None
    out: str | None = None

    @property
    def names(self) -> tuple[str, ...] | None:
        """List the attacks of the search; None: those of the version."""
        if self.attack == ALONE:
            return ()
        return None if self.attack == AUTOATTACK else tuple(self.attack.split(","))

    @property
    def searches(self) -> bool:
        """Return whether each image is attacked until it is fooled, as AutoAttack does."""
        from jaxrobust.attacks import registry

        names = registry.searching().keys()
        return self.attack in (AUTOATTACK, ALONE) or set(self.attack.split(",")) <= names

    @property
    def replays(self) -> bool:
        """Return whether stored adversarial images can be replayed: not on randomized networks."""
        return self.searches and self.version != "rand"

    @property
    def fixed(self) -> Any:
        """Find the attack with fixed steps, a `FixedSteps`; None if it is another kind."""
        from jaxrobust.attacks import fixed_steps

        return fixed_steps.parse(self.attack)

    @property
    def changes(self) -> dict[str, Any]:
        """List the settings that replace the attack's defaults."""
        settings = {key: getattr(self, key) for key in (*SETTINGS, *_FIXED)}
        return {key: value for key, value in settings.items() if value is not None}

    @property
    def method(self) -> str:
        """Name the attack with its settings, for the record."""
        from jaxrobust.evaluation.network import randomised
        from jaxrobust.evaluation.records import stopping

        judged = [randomised.verdict(self.rule, self.draws).words()] * (self.version == "rand")
        if self.version == FAST:
            return stopping.FAST_METHOD
        names = [] if self.attack == ALONE else self.attack.split(",")
        names = [f"{AUTOATTACK} {self.version}"] if self.attack == AUTOATTACK else names
        attacks = " + ".join([*names, *(user.name for user in self.users)])
        if self.attack == AUTOATTACK:
            return ", ".join([attacks, *judged])
        version = [self.version] if self.version != "standard" else []
        words = [f"{key} {as_flag(key, value)}" for key, value in self.changes.items()]
        return ", ".join([attacks, *version, *words, *judged])

    def overrides(self) -> dict[str, dict[str, Any]] | None:
        """List each attack's changes to settings that it has, as `autoattack` takes them."""
        from jaxrobust.attacks import ensembles

        changes, overrides = self.changes, {}
        for name in self.names or ():
            of_name = {key: changes[key] for key in ensembles.adjustable(name) if key in changes}
            if of_name:
                overrides[name] = of_name
        return overrides or None


def as_flag(key: str, value: Any) -> str:
    """Format a setting for people; a step such as 0.8/255 exactly, so that it can be reread."""
    return value if isinstance(value, str) else repr(value) if key == "step" else f"{value:g}"


def several_of(sizes: Sequence[int | None], threat: Sequence[str], ladder: str | None) -> list[str]:
    """List the flags that ask for more than one evaluation."""
    many = {"--image_size": len(sizes) > 1, "--threat": len(threat) > 1, "--ladder": bool(ladder)}
    return [name for name, is_given in many.items() if is_given]


def of_shipped(flags: GivenFlags) -> GivenFlags:
    """Expand the name of a packaged run into flags; flags that are set stay.

    Raises:
      ValueError: another network is named too, or a phase that the run lacks.
    """
    if flags.shipped is None:
        return flags
    if networks := written(flags, "workdir", "model", "weights", "function", "torch"):
        raise ValueError(
            f"{flags.shipped} already names a network; leave {' and '.join(networks)} out"
        )
    weights = f"{flags.shipped}:{flags.phase}" if flags.phase else flags.shipped
    shipped.weights(weights)  # raises if there is no such phase
    if Path(weights).exists():
        raise ValueError(
            f"{weights} is a packaged network, but a path here has the same name; write "
            f"./{weights} for the path, or run the command in another folder"
        )
    out = flags.out or f"runs/evaluation-{weights.replace(':', '-')}"
    dataset = flags.dataset or shipped.RUNS[flags.shipped].dataset
    return flags._replace(weights=weights, shipped=weights, phase=None, out=out, dataset=dataset)


def written(flags: GivenFlags, *names: str) -> list[str]:
    """List the flags among `names` that are set, as on the command line."""
    values = {name: getattr(flags, name) for name in names}
    valued = ("attack", "version", "search_dtype")
    return [
        f"--{name}={value}" if name in valued else f"--{name}"
        for name, value in values.items()
        if value != GivenFlags._field_defaults[name]
    ]


def stop_of(flags: GivenFlags) -> str | None:
    """Return the flag that stops an evaluation, or None."""
    if flags.against:
        return "--against"
    return None if flags.until_width is None else "--until_width"
