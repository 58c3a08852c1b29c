"""The loss that a training attack raises: by name, or of a file of the user's."""

import contextlib
import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.attacks import ROWS
from jaxrobust.config import plain
from jaxrobust.results.configs import refusals
from jaxrobust.runtime.commandline import functions
from jaxrobust.training import build
from jaxrobust.training.run import run as training_run
from jaxrobust.training.update import attack_losses
from jaxrobust.weights.trained import history
from tests.support import result_lines, sweeps
from tests.support import runs as training
from tests.support.paths import ROOT
from tests.support.steps import batch_of, small_config, standard

SOURCE = """
import jax
import jax.numpy as jnp
import numpy as np

def cross_entropy(outputs, targets):
    picked = jnp.take_along_axis(outputs, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(outputs, axis=1) - picked

def soft(outputs, targets):
    return -(targets * jax.nn.log_softmax(outputs)).sum(1)

def mean(outputs, targets):
    return cross_entropy(outputs, targets).mean()

def by_class(outputs, targets):
    return outputs

def nothing(outputs, targets):
    pass

def wrong(outputs, targets):
    return (outputs.argmax(1) != targets).astype(int)

def error(outputs, targets):
    return (outputs.argmax(1) != targets).astype(float)

def infinite(outputs, targets):
    return jnp.log(cross_entropy(outputs, targets) - 20)

def centred(outputs, targets):
    values = cross_entropy(outputs, targets)
    return values - values.mean()

def negative(outputs, targets):
    return -cross_entropy(outputs, targets)

def in_numpy(outputs, targets):
    return np.asarray(outputs).max(1)

def of_one(outputs):
    return outputs.max(1)

margin = 3
"""


class FilesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(contextlib.chdir(self.create_tempdir()))
        self.file = Path("my_losses.py")
        self.file.write_text(SOURCE)


class LossTest(FilesTest):
    @sweeps.rows(
        ("cee", {}, r"attack.loss='cee' is not a loss on labels; did you mean ce\? choose one"),
        ("kl", {}, "'kl' is not a loss on labels; choose one of ce, dlr, cw, cw-floor, ce-cw"),
        ("dlr-targeted", {}, "'dlr-targeted' is not a loss on labels; choose one of ce, dlr"),
        ("my_losses.py", {}, "or name your own function, such as my_losses.py:margin"),
        ("cw", {"label_smoothing": 0.1}, "mixed or smoothed here; set attack.labels='hard'"),
        ("dlr", {"model__num_classes": 2}, "'dlr' needs at least 3 classes, but the logits have 2"),
        ("none.py:margin", {}, "attack.loss=none.py:margin: cannot read none.py"),
        ("my_losses.py:cros_entropy", {}, r"did you mean cross_entropy\? it has cross_entropy, so"),
        ("my_losses.py:margin", {}, "margin is not a function, but of type int"),
        ("my_losses.py:mean", {}, r"mean returns float32\[\] for 4 images; return one float for"),
        ("my_losses.py:by_class", {}, r"by_class returns float32\[4, 10\] for 4 images; return"),
        ("my_losses.py:nothing", {}, r"nothing returns NoneType for 4 images"),
        ("my_losses.py:wrong", {}, r"wrong returns int32\[4\] for 4 images; return one float"),
        ("my_losses.py:error", {}, "error has no gradient with respect to the logits"),
        ("my_losses.py:infinite", {}, "infinite or its gradient is NaN or infinite for ordinary"),
        ("my_losses.py:centred", {}, "centred mixes images: the loss of one depends on the logits"),
        ("my_losses.py:negative", {}, "negative falls where cross-entropy rises, so an attack"),
        ("my_losses.py:in_numpy", {}, r"my_losses.py, line \d+: TracerArrayConversionError"),
        ("my_losses.py:of_one", {}, r"of_one: TypeError: of_one\(\) takes 1 positional argument"),
        (
            "my_losses.py:cross_entropy",
            {"label_smoothing": 0.1},
            r"my_losses.py, line 7: TypeError: take_along_axis indices must be of integer type",
        ),
        *(
            ("cw", {"train__objective": objective, "attack__start": "random"}, "attack.loss='cw' do"
            f"es not fit objective='{objective}', which defines the loss of its attack; leave")
            for objective in ("trades", "trades-awp", "dkl", "hat")
        ),
    )  # fmt: skip
    def test_refuses(self, loss, changes, message):
        config = small_config(attack__loss=loss, **changes)
        with self.assertRaisesRegex(ValueError, message) as caught:
            build.phase(config, "train", 80, devices=jax.devices()[:1])
        self.assertNotIn("\n", str(caught.exception))

    def test_an_attack_without_a_loss(self):
        def make(*, norm, epsilon, steps, random_start):
            return lambda network, keys, images, labels: images

        row = ROWS["apgd"]._replace(name="still", make=make)
        with mock.patch.dict(ROWS, still=row):
            build.phase(small_config(attack__name="still"), "train", 80)
            for changes, words in (
                (
                    {"attack__loss": "cw"},
                    "not accept a loss, but attack.loss='cw' sets one; .*leave",
                ),
                ({"attack__loss": "ce"}, "not accept a loss, but attack.loss='ce' sets one"),
                (
                    {"train__objective": "trades", "attack__start": "random"},
                    "'still' does not accept a loss, but objective='trades' sets one; choose",
                ),
            ):
                with self.assertRaisesRegex(ValueError, words):
                    build.phase(small_config(attack__name="still", **changes), "train", 80)

    def test_takes(self):
        for loss, changes in (
            ("my_losses.py:soft", {"label_smoothing": 0.1}),
            (f"{ROOT}/examples/my_losses.py:margin", {}),
            ("cw", {"label_smoothing": 0.1, "attack__labels": "hard"}),
            ("pm", {"train__objective": "mart"}),
            ("kl", {"train__objective": "trades", "attack__start": "random"}),
            ("my_losses.py:mean", {"train__objective": "clean"}),  # which does not attack
        ):
            build.phase(small_config(attack__loss=loss, **changes), "train", 80)

    def lowered(self, **changes):
        config = small_config(**changes)
        phase = build.phase(config, "train", 80, devices=jax.devices()[:1])
        with standard(), jax.set_mesh(phase.mesh):
            traced = phase.step.trace(*build.abstract_arguments(config, "train", phase))
        return str(traced.jaxpr)

    def test_the_default_is_the_cross_entropy(self):
        default = self.lowered()
        self.assertEqual(self.lowered(attack__loss="ce"), default)
        self.assertNotEqual(self.lowered(attack__loss="cw"), default)

    @sweeps.rows("worst", "msd")
    def test_in_several_norms(self, mix):
        several = {"attack__norm": ("linf", "l2"), "attack__epsilon": (0.03, 0.5)}
        several |= {"attack__mix": mix, "attack__name": "pgd"}
        losses = "ce", "my_losses.py:cross_entropy", "cw"
        same, other, margin = (self.lowered(**several, attack__loss=loss) for loss in losses)
        self.assertEqual(len(same), len(other))
        self.assertNotEqual(len(same), len(margin))

    @pytest.mark.slow
    def test_a_cross_entropy_of_the_user_is_ours(self):
        states = []
        for loss in ("ce", "my_losses.py:cross_entropy"):
            config = small_config(attack__loss=loss)
            with standard():
                phase = build.phase(config, "train", 24, devices=jax.devices()[:1])
                state = phase.init(jax.random.key(0))
                for seed in range(2):
                    state, _ = phase.step(state, batch_of(seed=seed), build.control(phase.mesh))
            states.append(jax.device_get(state.params))
        jax.tree.map(np.testing.assert_array_equal, *states)


class RunTest(FilesTest):
    def config(self, loss="my_losses.py:cross_entropy", **changes):
        return training.one_phase(attack__loss=loss, **changes)

    def claimed(self, config=None):
        config = config or self.config()
        _, data = training_run.check(config, Path("run"))
        Path("run").mkdir(exist_ok=True)
        training_run.claim(Path("run"), plain(config), data)

    def test_a_changed_file_is_refused_until_it_is_restored(self):
        self.claimed()
        sha256 = attack_losses.origin(self.config().attack).sha256
        noted = json.loads(Path("run/data.json").read_text())
        self.assertEqual(noted["train.attack.loss.sha256"], sha256)
        self.file.write_text(SOURCE + "\n# changed\n")
        message = (
            "the code of attack.loss has changed since the run in run began "
            rf"\(train.attack.loss.sha256: '{sha256}' there, '.*' now\); restore it, or give a new"
        )
        with self.assertRaisesRegex(ValueError, message):
            self.claimed()
        self.file.write_text(SOURCE)
        self.claimed()
        with self.assertRaisesRegex(ValueError, "attack.loss: 'my_losses.*' there, 'ce' now"):
            self.claimed(self.config("ce"))
        self.file.unlink()
        with self.assertRaisesRegex(ValueError, "attack.loss=my_losses.py:cross_entropy: cannot r"):
            self.claimed()

    def test_modules_of_its_folder_count_too(self):
        folder = self.file.parent
        (folder / "parts").mkdir()
        (folder / "parts" / "__init__.py").write_text("")
        (folder / "parts" / "inner.py").write_text("FACTOR = 1\n")
        (folder / "helper.py").write_text("import json, helper\nfrom parts import inner\n")
        (folder / "other.py").write_text("")
        loss = self.file.with_name("lossy.py")
        loss.write_text(f"from helper import inner\n{SOURCE}")
        loss = functions.find("attack.loss", "lossy.py:cross_entropy")
        first = attack_losses.sha256(loss)
        self.assertNotEqual(first, loss.sha256)
        for name, changes in (("other", False), ("parts/inner", True), ("helper", True)):
            path = folder / f"{name}.py"
            text = path.read_text()
            path.write_text(f"{text}\n# changed\n")
            self.assertEqual(attack_losses.sha256(loss) != first, changes, name)
            path.write_text(text)
        self.assertEqual(attack_losses.sha256(loss), first)

    def test_check_lists_it_with_other_mistakes(self):
        config = self.config("my_losses.py:crossentropy", seed=-1)
        loss, seed = sorted(refusals.parts_refused(config))
        self.assertIn("my_losses.py has no 'crossentropy'; did you mean cross_entropy?", loss)
        self.assertIn("seed=-1", seed)

    def test_a_phase_without_an_attack_reads_no_file(self):
        self.claimed(self.config("none.py:margin", train__objective="clean"))
        self.assertNotIn("attack.loss", Path("run/data.json").read_text())

    @pytest.mark.slow
    def test_a_run_continues_and_its_record_names_the_loss(self):
        config = self.config("my_losses.py:soft", label_smoothing=0.1)
        training.quiet_run(config, Path("run"))
        training.stop_after(5, lambda: training.quiet_run(config, Path("stopped")))
        training.quiet_run(config, Path("stopped"))
        ours, theirs = (training.final_state(Path(p), config)[0] for p in ("stopped", "run"))
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
        self.assertEqual(
            json.loads(Path("run/config.json").read_text())["attack"]["loss"], "my_losses.py:soft"
        )
        sha256 = attack_losses.origin(config.attack).sha256
        (record,) = result_lines.read(Path("run"))
        for facts in (record["training"], history.of_run(Path("run"), "train")[-1]):
            row = facts["phases"][-1]
            self.assertEqual((row["loss"], row["loss_sha256"]), ("my_losses.py:soft", sha256))


if __name__ == "__main__":
    absltest.main()
