"""Records of each kind, key by key as those that lie on disks: tests/golden/records.

`python -m tests.evaluation.test_golden_records all` writes the golden records anew.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import evaluation
from tests.support import paths
from tests.support.evaluations import call

GOLDEN = paths.GOLDEN / "records"
# What depends on the machine, the versions or the hour; such a value stands as its type.
OTHER = ("time", "commit", "versions", "device", "seconds", "compile_seconds")
OTHER += ("program", "gradient", "probe", "question", "evaluation", "verdicts")
LOOSE = ("local_lipschitz",)  # a mean of floats, which another compiler rounds otherwise
NET = (
    "import numpy as np\n"
    "weights = np.random.default_rng(0).normal(size=(64, 10)).astype('f')\n"
    "def logits_fn(x):\n"
    "    return x.reshape(len(x), -1) @ weights\n"
)
DRAWN = (
    "import jax\n" + NET.replace("logits_fn(x)", "logits_fn(x, keys)") + "    + 0 * len(keys)\n"
).replace("weights\n    + ", "weights + ")
BALL = {"norm": "linf", "epsilon": "0.01", "attack": "apgd-ce", "steps": 2}
THREATS = {"threat": ["linf:0.01", "l2:0.05"], "attack": "apgd-ce", "steps": 2}
# kind -> flags of the command
COMMANDS: dict[str, dict[str, Any]] = {
    "clean": {"attack": "clean"},
    "fixed": BALL | {"attack": "pgd-3", "steps": None},
    "searched": BALL,
    "union": THREATS,
    "union-only": THREATS | {"union_only": True},
    "ladder": {"ladder": "linf:0:0.02:3", "attack": "apgd-ce", "steps": 2},
    "corruptions": {"attack": "clean", "corruptions": "brightness-1,contrast"},
    "rand": BALL | {"version": "rand", "draws": 3},
    "union-rand": THREATS | {"version": "rand", "draws": 3},
}
FAST = ("clean", "fixed", "union")
PROGRAMS = ("autoattack", "worst case")


def of_command(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Return the records that a command leaves."""
    with contextlib.chdir(folder):
        Path("nets.py").write_text(DRAWN if "rand" in kind else NET)
        x = np.random.default_rng(1).random((12, 8, 8, 3)).astype("f")
        label = (x[..., 0].reshape(12, -1) @ np.random.default_rng(0).normal(size=(64, 10))).argmax(
            1
        )
        x = x[..., :1] if kind != "corruptions" else x.repeat(4, 1).repeat(4, 2)
        if kind == "corruptions":
            Path("nets.py").write_text(NET.replace("(64, 10)", "(3072, 10)"))
        np.savez("data.npz", image=(255 * x).astype(np.uint8), label=label)
        given = {"function": "nets.py:logits_fn", "dataset": "npz:data.npz", "split": "all"}
        code, _, said = call(**given, out="out", **COMMANDS[kind])
        assert not code, said
        lines = Path("out/results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def of_program(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Return the record that a call of the library leaves."""
    weights = np.random.default_rng(0).standard_normal((16, 10)).astype("f")
    images = np.random.default_rng(1).random((12, 4, 4, 1)).astype("f")
    logits_fn = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, weights)
    labels = np.asarray(logits_fn(images)).argmax(1)
    if kind == "autoattack":
        how: dict[str, Any] = {"attacks": ("square",), "overrides": {"square": {"steps": 3}}}
        how |= {"norm": "l2", "epsilon": 0.5, "version": "custom", "verbose": False}
        result: Any = evaluation.autoattack(logits_fn, images, labels, **how)
    else:
        radii = {"linf": 0.1, "l2": 0.5, "l1": 1.0}
        result = evaluation.worst_case(logits_fn, images, labels, radii=radii, verbose=False)
    path = folder / "results.jsonl"
    result.save(path, model="mine", dataset="digits", split="test")
    return [json.loads(path.read_text())]


def masked(value: Any) -> Any:
    """Return a record whose values that are the machine's are names of types."""
    if isinstance(value, list):
        return [masked(each) for each in value]
    if not isinstance(value, dict):
        return value
    of_ledger = ("ledger", "sha256") if "ledger" in value else ()
    return {
        key: type(each).__name__ if key in (*OTHER, *of_ledger) else masked(each)
        for key, each in value.items()
    }


def made(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Return the masked records of a kind."""
    rows = (of_program if kind in PROGRAMS else of_command)(kind, folder)
    return [masked(row) for row in rows]


def golden(kind: str) -> list[dict[str, Any]]:
    """Return the golden records of a kind."""
    path = GOLDEN / f"{kind.replace(' ', '-')}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


class GoldenTest(parameterized.TestCase):
    def compare(self, kind: str) -> None:
        found, expected = made(kind, Path(self.create_tempdir())), golden(kind)
        for one, other in zip(found, expected, strict=True):
            for key in LOOSE:
                if key in other:
                    np.testing.assert_allclose(one.pop(key), other.pop(key), rtol=1e-5)
            self.assertEqual(one, other)
            if kind != "worst case":  # which the library wrote in another order than the command
                self.assertEqual([*one], [*other])

    @parameterized.parameters("autoattack", *FAST)
    def test_is_written_as_before(self, kind):
        self.compare(kind)

    @parameterized.parameters("worst case", *sorted(COMMANDS.keys() - {*FAST}))
    @pytest.mark.slow  # below the parameters, each of which it then marks
    def test_is_written_as_before_too(self, kind):
        self.compare(kind)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        absltest.main()
    import tempfile

    for name in sys.argv[1:] if sys.argv[1] != "all" else (*PROGRAMS, *COMMANDS):
        with tempfile.TemporaryDirectory() as place:
            lines = [json.dumps(row) for row in made(name, Path(place))]
        (GOLDEN / f"{name.replace(' ', '-')}.jsonl").write_text("\n".join(lines) + "\n")
