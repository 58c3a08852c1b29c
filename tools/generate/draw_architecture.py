"""Draw docs/*.svg from the code: imports between rooms, an image's life, a training step.

    python tools/generate/draw_architecture.py

An arrow between rooms that follows from others is left out. Boxes of the other two pictures name
their code, which must exist.
"""

import ast
import importlib
import itertools
import operator
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the checkout, before any installed package
PACKAGE, DOCS = ROOT / "jaxrobust", ROOT / "docs"
NOT_ROOMS = {"moved", "main", "evaluate", "__main__", "__init__"}  # old names, and entry points
WIDTH, GAP, LINE, BETWEEN = 190, 26, 14, 46  # pixels: box, gap, line, between rows
SIZE = 11  # font size


class Box(NamedTuple):
    """A box of a picture: its title, and small lines below."""

    title: str
    lines: tuple[str, ...] = ()


class Step(NamedTuple):
    """A box of a flow: its text, its code, and the boxes that follow."""

    title: str
    code: str  # MODULE:NAME below jaxrobust, or MODULE
    then: tuple[str, ...] = ()
    back: str = ""  # an earlier box that follows again


def _steps(text: str) -> dict[str, Step]:
    """Read lines of `KEY: TITLE` and `CODE -> BOXES THAT FOLLOW <- AN EARLIER BOX`."""
    steps, lines = {}, text.strip().splitlines()
    for head, below in zip(lines[::2], lines[1::2], strict=True):
        key, _, title = head.partition(": ")
        rest, _, back = below.strip().partition(" <- ")
        code, _, then = rest.partition(" -> ")
        steps[key] = Step(title, code, tuple(then.split()), back)
    return steps


IMAGE = _steps("""
image: An image and its label
    evaluation.network.images:ImageSet -> clean
clean: One forward pass: misclassified images are done
    evaluation.engine.engine:forward -> replay ledger
replay: Points that fooled other networks or radii, one pass each
    evaluation.engine.replay:run -> attack
attack: The next attack runs on the surviving images
    evaluation.engine.cascade:Attack.run -> jobs
jobs: Jobs: an image with one target and one restart
    evaluation.engine.schedule:Jobs -> slots
slots: Each slot holds a job; one program steps all slots
    evaluation.engine.slots:Slots -> verdict
verdict: A slot is free: its image is fooled, or the job is over
    evaluation.engine.schedule:Jobs.collect -> confirm <- jobs
confirm: Confirmation: a final pass with exact products, the norm in float64
    evaluation.engine.cascade:Attack.confirm -> refute ledger
refute: Refutation: the job continues after that step
    evaluation.engine.schedule:Jobs.refute <- jobs
ledger: The verdict and its point are on disk; a resumed evaluation starts here
    evaluation.engine.ledger:Ledger.add -> record <- attack
record: All attacks are over: flags, accuracies, one record
    evaluation.records.records
""")
TRAINING = _steps("""
batch: The batch, split over the devices of the mesh (data x fsdp)
    runtime.devices.sharding:global_arrays -> augment
state: The state; large arrays are split over fsdp
    training.update.step:TrainState -> keys gather
keys: A key for each image, from the step number
    attacks:image_keys -> attack
augment: Mixing and erasing, on the device
    training.update.mixing:BatchAugmentation -> attack
gather: Parameters are gathered once, in the compute type
    runtime.devices.sharding:spread -> attack
attack: Each device attacks its own images, part by part, without communication
    training.update.step:device_gradients -> loss
loss: Loss and gradients of the adversarial images
    training.update.step:adversarial_gradients -> reduce
reduce: Gradients are averaged once; each device keeps its part
    runtime.devices.sharding:Spread -> update
update: Optimizer, and the average of the weights
    training.update.step:train_step -> guard
guard: The new state is used if all is finite, otherwise the old one
    training.update.step:train_step <- state
""")


def rooms() -> tuple[dict[str, Box], dict[str, set[str]]]:
    """Read the rooms with their folders and imports."""
    boxes: dict[str, Box] = {}
    below: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in NOT_ROOMS or path.name == "__main__.py":
            continue
        inside = sorted(p.parent.name for p in (PACKAGE / room).glob("*/__init__.py"))
        boxes[room] = Box(room, tuple(_wrapped(" ".join(inside))))
        below.setdefault(room, set()).update(_imported(path) - {room} - NOT_ROOMS)
    return boxes, _direct(below)


def _imported(path: Path) -> set[str]:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        imported |= {name.split(".")[1] for name in names if name.startswith("jaxrobust.")}
    return imported & {path.stem for path in PACKAGE.iterdir()}


def _direct(below: Mapping[str, set[str]]) -> dict[str, set[str]]:
    def all_below(room: str) -> set[str]:
        return set().union(*({name} | all_below(name) for name in below[room]), set())

    return {
        room: {n for n in names if not any(n in all_below(other) for other in names - {n})}
        for room, names in below.items()
    }


def flow(steps: Mapping[str, Step]) -> tuple[dict[str, Box], dict[str, set[str]]]:
    """Convert a flow to boxes and arrows, and look up each name in the code."""
    boxes = {}
    for key, step in steps.items():
        module, colon, name = step.code.partition(":")
        imported = importlib.import_module(f"jaxrobust.{module}")
        if name:
            operator.attrgetter(name)(imported)
        code = (module, f":{name}") if colon else (module,)
        boxes[key] = Box("\n".join(_wrapped(step.title)), code)
    return boxes, {key: set(step.then) for key, step in steps.items()}


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 30, break_long_words=False, break_on_hyphens=False)


def levels(below: Mapping[str, Iterable[str]], *, from_top: bool) -> list[list[str]]:
    """Place each box as close to the end of its arrows, or to their start, as possible."""
    above = {name: {m for m in below if name in below[m]} for name in below}
    towards = above if from_top else below

    def level(name: str) -> int:
        return 1 + max(map(level, towards[name]), default=-1)

    rows: list[list[str]] = [[] for _ in range(1 + max(map(level, below)))]
    for name in below:
        rows[level(name)].append(name)
    return rows if from_top else rows[::-1]


def _with_bends(
    rows: list[list[str]], below: Mapping[str, Iterable[str]]
) -> tuple[list[list[str]], list[tuple[str, ...]]]:
    """Give arrows across several rows a position in each; return the arrows with positions."""
    at = {name: i for i, row in enumerate(rows) for name in row}
    rows, paths = [list(row) for row in rows], []
    for name in sorted(below):
        for other in sorted(below[name]):
            bends = [f"{name}>{other}>{i}" for i in range(at[name] + 1, at[other])]
            for bend in bends:
                rows[int(bend.rpartition(">")[2])].append(bend)
            paths.append((name, *bends, other))
    neighbours = defaultdict(list)
    for one, next_one in itertools.chain.from_iterable(map(itertools.pairwise, paths)):
        neighbours[one].append(next_one)
        neighbours[next_one].append(one)
    for _ in range(12):  # move each to the mean of its neighbors
        for order in (rows, rows[::-1]):
            place = {n: i - len(row) / 2 for row in order for i, n in enumerate(row)}
            for row in order:
                near = {n: [place[m] for m in neighbours[n] or [n]] for n in row}
                row.sort(key=lambda n: sum(near[n]) / len(near[n]))
                place |= {n: i - len(row) / 2 for i, n in enumerate(row)}
    return rows, paths


def svg(
    boxes: Mapping[str, Box],
    below: Mapping[str, set[str]],
    *,
    title: str,
    from_top: bool = False,
    back: Sequence[tuple[str, str]] = (),
) -> str:
    rows, paths = _with_bends(levels(below, from_top=from_top), below)
    height = {
        name: 22 + LINE * (box.title.count("\n") + len(box.lines)) for name, box in boxes.items()
    }
    wide = {n: WIDTH if n in boxes else 12 for row in rows for n in row}
    across = max(sum(wide[n] + GAP for n in row) for row in rows) + 2 * GAP + 60 * bool(back)
    top, tops, middle = 40, {}, {}
    for row in rows:
        tall = max(height.get(n, 0) for n in row)
        x = (across - 60 * bool(back) - sum(wide[n] + GAP for n in row) + GAP) / 2
        for n in row:
            middle[n] = x + wide[n] / 2
            tops[n] = (top, top + height.get(n, tall))
            x += wide[n] + GAP
        top += tall + BETWEEN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:.0f} {top:.0f}" '
        f'width="{across:.0f}" height="{top:.0f}" font-family="sans-serif" font-size="{SIZE}">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#5f6b73"/></marker></defs>',
        f'<rect width="{across:.0f}" height="{top:.0f}" fill="white"/>',
        f'<text x="{GAP}" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    parts += [_arrow([(middle[n], *tops[n]) for n in path]) for path in paths]
    for number, (name, other) in enumerate(back):
        parts.append(_back(middle, tops, name, other, across - 50 + 14 * number))
    parts += [_box(boxes[n], middle[n] - WIDTH / 2, tops[n], height[n]) for n in boxes]
    return "\n".join([*parts, "</svg>", ""])


def _arrow(places: Sequence[tuple[float, float, float]]) -> str:
    (x, _, y), *others = places
    path = f"M{x:.0f} {y:.0f}"
    for to, upper, lower in others:
        half = (y + upper) / 2
        path += f"C{x:.0f} {half:.0f} {to:.0f} {half:.0f} {to:.0f} {upper:.0f}"
        x, y = to, lower
        if (to, upper, lower) != places[-1]:
            path += f"L{x:.0f} {y:.0f}"
    return f'<path d="{path}" fill="none" stroke="#5f6b73" marker-end="url(#a)"/>'


def _back(middle, tops, name: str, other: str, x: float) -> str:
    low, high = (sum(tops[n]) / 2 for n in (name, other))
    begin, end = (middle[n] + WIDTH / 2 for n in (name, other))
    path = f"M{begin:.0f} {low:.0f}H{x:.0f}V{high:.0f}H{end:.0f}"
    style = 'fill="none" stroke="#b07d2b" stroke-dasharray="5 3" marker-end="url(#a)"'
    return f'<path d="{path}" {style}/>'


def _box(box: Box, x: float, place: tuple[float, float], height: float) -> str:
    y, _ = place
    size = f'width="{WIDTH}" height="{height}" rx="5"'
    made = f'<rect x="{x:.0f}" y="{y:.0f}" {size} fill="#eef3f8" stroke="#1f4e79"/>'
    lines = [(line, 'font-weight="bold"') for line in box.title.split("\n")]
    lines += [(line, 'fill="#555"') for line in box.lines]
    for number, (line, style) in enumerate(lines):
        at = f'x="{x + WIDTH / 2:.0f}" y="{y + 15 + LINE * number:.0f}" text-anchor="middle"'
        made += f"<text {at} {style}>{escape(line)}</text>"
    return made


def pictures() -> dict[str, str]:
    made = {"rooms.svg": svg(*rooms(), title="The folders; an arrow is an import")}
    for name, steps, title in (
        ("image.svg", IMAGE, "The life of an image in an evaluation"),
        ("step.svg", TRAINING, "A training step on a mesh of devices"),
    ):
        back = [(key, step.back) for key, step in steps.items() if step.back]
        made[name] = svg(*flow(steps), title=title, from_top=True, back=back)
    return made


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (DOCS / name).write_text(text)
        print(DOCS / name)


if __name__ == "__main__":
    main()
