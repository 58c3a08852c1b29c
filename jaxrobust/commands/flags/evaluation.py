"""The flags of `jaxrobust evaluate`."""

from dataclasses import dataclass

from jaxrobust.commands.flags.shared import SubjectFlags, shared
from jaxrobust.runtime.commandline.arguments import how_many, number
from jaxrobust.runtime.commandline.fields import flag


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(SubjectFlags):
    """The network to attack, the attacks, and the folder for the record."""

    image_size: tuple[int, ...] = flag(  # type: ignore[assignment]
        "Image size in pixels, with one record per size; default: from the run or data set.", ()
    )
    attack: str = flag(
        "Attack: clean, autoattack, parts of it such as apgd-ce or apgd-ce,apgd-t, one with K "
        "steps such as pgd-20, or your own my_attack.py:attack (logits_fn, key, images, labels).",
        "autoattack",
    )
    points: tuple[str, ...] = flag(
        "Your adversarial images: .npz with ids int[M], images [M,H,W,C] in [0, 1] or uint8.", ()
    )
    version: str = flag(
        "Version of AutoAttack: standard, plus, rand, or custom for named attacks; or fast, which "
        "does not count as AutoAttack.",
        "standard",
    )
    finish: bool = flag("Whether to complete a --version=fast evaluation to standard.", False)
    rule: str | None = flag(
        "How --version=rand combines the draws for an image: majority (correct in more than half; "
        "the default), mean (of the softmax probabilities), or one-draw, as in auto-attack; the "
        "one-draw result is always listed too."
    )
    draws: int | None = flag(
        "Number of draws per image for --version=rand or --certify; default: 20 or 100,000."
    )
    threat: tuple[str, ...] = flag(
        "Norm and radius, such as linf:4/255; with several, each and their union get a record.", ()
    )
    radius_at: int | None = flag(
        "Image size at which --threat applies; at other sizes, l2 radii scale with the side, l1 "
        "and l0 radii with its square."
    )
    ladder: str | None = flag(
        "Radii that share adversarial images, such as linf:0:16/255:9, the smallest first."
    )
    union_only: bool = flag(
        "Whether to run each --threat, or each attack of --worst_case, only on images that "
        "survived the previous ones. This is cheaper but measures only the union or worst case.",
        False,
    )
    worst_case: bool = flag(
        "Whether to run the attacks of Tang et al. 2022 on all images (PGD-20 and AutoAttack in "
        "linf, PGD-20 in l2 and l1), and count the images that withstand all of them. Radii: "
        "8/255, 1.5 and 40 at 32 px; 8/255, 8 and 1600 at 224 px; or from --threat.",
        False,
    )
    steps: int | None = flag("Number of steps of a named attack; default: the attack's.")
    targets: int | None = flag("Number of targets of a targeted attack; default: the attack's.")
    restarts: int | None = flag("Number of restarts of a named attack; default: the attack's.")
    relative_step: float | None = flag(
        "Step size of an attack with K steps, in units of epsilon / K.", reads=number
    )
    step: float | None = flag(
        "Absolute step size, in the same units as the radius, such as 0.8/255.", reads=number
    )
    start: str | None = flag(
        "Where attacks with K steps start: image, random (as in AutoAttack, or ART with --l1_rule "
        "art), uniform (in the linf or l2 ball, not clipped to [0, 1] before the first gradient) "
        "or uniform-boxed (as in foolbox)."
    )
    l1_rule: str | None = flag(
        "How attacks with K steps move and project in l1: sparse (the default), as in APGD, or "
        "art, as in ART 1.10, which steps along the full gradient and scales back."
    )
    search_dtype: str = flag(
        "Search dtype: float32, or bfloat16, which is faster; verdicts use float32.", "float32"
    )
    corruptions: str | None = flag(
        "Common corruptions to evaluate instead of an attack: all, kinds such as fog,snow, or a "
        "kind with a severity such as fog-3."
    )
    frost: str | None = flag("Folder of the frost photographs, frost1.png to frost5.jpg.")
    certify: float | None = flag(
        "Standard deviation of the noise for randomized smoothing, such as 0.25; this certifies an "
        "l2 radius for each image, without attacks.", reads=number
    )  # fmt: skip
    against: str | None = flag(
        "Record to compare with, as for jaxrobust compare: FOLDER or FOLDER#NUMBER. Images go "
        "through all attacks in random order, and the command stops once one network is ahead."
    )
    tie: float | None = flag(
        "With --against, also stop once networks differ by less than this (points).", reads=number
    )
    until_width: float | None = flag(
        "Stop once the interval of robust accuracy is narrower than this (points).", reads=number
    )
    alpha: float | None = flag(
        "Error probability of --against and --until_width, however often they check (default: "
        "0.05), or of a --certify certificate (default: 0.001).",
        reads=number,
    )
    n: int = flag("Number of images, spread over the classes, or all.", "all", reads=how_many)
    batch: int | None = flag("Batch size (for AutoAttack, per process); has no effect on verdicts.")
    seed: int = shared("seed", 0)
    replay: tuple[str, ...] = flag(
        "Folder of an evaluation of these images; its adversarial images are tried first.", ()
    )
    noreplay: bool = flag("Whether to attack without replaying results from other radii.", False)
    again: bool = flag("Whether to repeat a finished evaluation and add a second record.", False)
    selected: bool = flag("Whether to evaluate the weights that jaxrobust select chose.", False)
    bundle: str | None = flag(
        "New folder for adversarial images, hashes and a program that checks the result."
    )
    out: str | None = flag(
        "Folder of the records; default: RUN/evaluation or runs/evaluation-NAME."
    )
