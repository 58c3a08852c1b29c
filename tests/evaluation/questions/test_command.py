"""The command line of evaluation: a run or a file, its record, and every refusal."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import grain  # noqa: F401  # defines flags, which `flagsaver` must not see for the first time
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver, parameterized
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from jaxrobust import data, models
from jaxrobust.commands import evaluate
from jaxrobust.config import VERSION, NetworkSpec, network_of
from jaxrobust.data.splits import spread
from jaxrobust.evaluation.engine.result import AutoAttackResult
from jaxrobust.evaluation.questions import command, recording, target
from jaxrobust.evaluation.questions import flags as evaluation_flags
from jaxrobust.evaluation.records import verdicts
from jaxrobust.evaluation.records.verdicts import Verdicts
from jaxrobust.models.modules.positions import resized
from jaxrobust.runtime.commandline import threats
from jaxrobust.training.run import accuracies
from jaxrobust.types import Threat, Weights
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.store import weights_folder
from jaxrobust.weights.store.checkpoint import Checkpoints
from jaxrobust.weights.trained import runs
from tests.support import paths, result_lines, sweeps
from tests.support import runs as training
from tests.support.evaluations import call, run_for
from tests.support.outcomes import ended, refused

ROOT = paths.ROOT
STRIDES = {"downsample_strides": (1, 1)}  # the same weights, another network


def autoattack(logits_fn, images, labels, **asked):
    """A stand-in that fools every image with an odd id; what it was asked is kept."""
    autoattack.asked = asked | {"logits_fn": logits_fn, "images": images, "labels": labels}
    clean = np.asarray(logits_fn(images[:])).argmax(-1) == labels
    robust = clean & (np.arange(len(images)) % 2 == 0)
    fooled_by = np.where(clean, np.where(robust, "", "square"), "clean")
    ids = np.array(asked["image_ids"], np.uint32)
    ball = {key: asked[key] for key in ("norm", "epsilon")}
    return AutoAttackResult(
        fooled_by=fooled_by,
        images_adv=images,
        verdicts=Verdicts(ids, labels, clean, fooled_by, 0.1 * (clean & ~robust), labels),
        costs=[],
        about={"fingerprint": {}, **ball},
        clean=clean,
        robust=robust,
        flags={"standin": "not an attack"},
        accuracy_after={"apgd-ce": clean.mean(), "square": robust.mean()},
        attacks=[{"name": "apgd-ce", "steps": 100}, {"name": "square", "steps": 5000}],
    )


def stand_in():
    return mock.patch.object(recording, "autoattack", autoattack)


class OfRun(parameterized.TestCase):
    """A run that the tests of a class evaluate."""

    pretrained = False

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir = run_for(cls, pretrained=cls.pretrained)

    def evaluated(self, out="out", **given) -> dict:
        """The record that the command appends."""
        out = Path(self.create_tempdir()) / out
        printed, _ = ended(call(workdir=str(self.workdir), out=str(out), **given))
        record = result_lines.read(out)[-1]
        self.assertIn(f"record {record['evaluation']} in {out / 'results.jsonl'}", printed)
        return record


class TrainedTest(OfRun):
    pretrained = True

    def test_clean_is_what_the_training_recorded(self):
        (trained,) = result_lines.read(self.workdir)
        ours = self.evaluated(attack="clean", phase="pretrain")
        for key in ("weights", "weights_sha256", "config_sha256", "clean", "image_ids"):
            self.assertEqual(ours[key], trained[key], key)
        self.assertIsNone(ours["robust"])
        self.assertEmpty(ours["attacks"])

    def test_the_last_phase_with_weights_is_the_default(self):
        record = self.evaluated(attack="clean")
        self.assertEqual(record["weights"], "train, step 3, ema")
        self.assertGreater(record["clean"], 0.6)
        self.assertNotEqual(
            record["weights_sha256"], result_lines.read(self.workdir)[0]["weights_sha256"]
        )

    @pytest.mark.slow
    def test_default_folder_and_the_table_of_a_run(self):
        self.assertEqual(call(workdir=str(self.workdir), attack="clean")[0], 0)
        self.assertLen(result_lines.read(self.workdir / "evaluation"), 1)
        out = Path(self.create_tempdir())
        (out / "results.jsonl").write_bytes((self.workdir / "results.jsonl").read_bytes())
        for attack in ("clean", "pgd-2"):  # into the records of a training
            self.assertEqual(call(workdir=str(self.workdir), out=str(out), attack=attack)[0], 0)
        table = accuracies.table(out)
        self.assertRegex(table, r"-      80  none\n")
        self.assertRegex(table, r"%      80  pgd-2, linf 0.1\n")
        self.assertRegex(table, r"%      80  APGD-CE 3 steps, linf 0.1\n")


class RunTest(OfRun):
    @pytest.mark.slow
    def test_record_of_cw(self):
        """As the authors of RobustResNets evaluate, with what they say of the outputs."""
        given = {"attack": "cw-2", "step": "0.1/4", "start": "uniform", "epsilon": "0.1"}
        record = self.evaluated(**given, n=40)
        (attack,) = record["attacks"]
        ball = {"norm": "linf", "epsilon": 0.1, "steps": 2}
        self.assertEqual(attack, {"name": "cw", **ball, "start": "uniform", "step_size": 0.025})
        self.assertEqual(record["method"], "cw-2, step 0.025, start uniform")
        self.assertBetween(record["stable"], record["robust"], 1)
        self.assertGreater(record["local_lipschitz"], 0)
        selection = record["training"]["selection"]
        expected = {"split": "train[256:320]", "attack": "apgd-ce", "on_evaluated_images": False}
        expected["dataset"] = "digits"
        self.assertEqual(selection, expected)
        self.assertNotIn("stable", self.evaluated(attack="clean", n=8))

    def test_record_says_that_its_images_chose_the_weights(self):
        found = self.evaluated(attack="clean", n=8, split="train[:300]")
        self.assertTrue(found["training"]["selection"]["on_evaluated_images"])

    @sweeps.fast(0, 1)
    @parameterized.parameters("clean", "pgd-2", "apgd-ce")
    def test_verdicts_image_by_image(self, attack):
        out = Path(self.create_tempdir())
        ended(call(workdir=str(self.workdir), out=str(out), attack=attack, n=16, epsilon="0.05"))
        (record,) = result_lines.read(out)
        found = verdicts.read(out / record["verdicts"])
        self.assertEqual((len({*found.image_ids.tolist()}), record["image_choice"]), (16, "hash"))
        self.assertEqual(found.clean.mean(), record["clean"])
        fooled = found.clean & (found.fooled_by == attack)
        self.assertEqual(found.norms[~fooled].tolist(), [0.0] * int((~fooled).sum()))
        self.assertBetween(found.norms.max(), 0, 0.05 * (1 + 1e-5) + 1e-6)
        self.assertEqual((found.reached >= 0).tolist(), fooled.tolist())
        self.assertFalse((found.reached == found.labels).any())
        if attack != "clean":
            self.assertEqual(found.robust.mean(), record["robust"])
            self.assertAlmostEqual(record["clean"] - record["robust"], fooled.mean())
            low, high = record["interval"]["robust"]
            self.assertBetween(record["robust"], low, high)
        (cost,) = record["costs"]
        self.assertEqual((cost["attack"], cost["fooled"]), (attack, fooled.sum()))
        self.assertGreater(cost["seconds"], 0)
        made = {"phase": "train", "objective": "adversarial", "epochs": 0, "attack": "apgd"}
        (phase,) = (p for p in record["training"]["phases"] if p["phase"] == "train")
        self.assertEqual({k: phase[k] for k in made}, made)
        self.assertGreater(record["size"]["parameters"], 100)
        self.assertGreater(record["size"]["multiply_adds"], 1000)

    @pytest.mark.slow
    def test_verdicts_know_neither_batch_nor_subset(self):
        wide = {"attack": "pgd-2", "epsilon": "0.01"}
        robust = {b: self.evaluated(batch=b, **wide)["robust"] for b in (5, 16, 200)}
        self.assertLen(set(robust.values()), 1, robust)
        self.assertBetween(robust[5], 0.01, 0.99)  # else nothing is compared

    @pytest.mark.slow
    def test_images_are_spread_over_the_split_and_at_most_all(self):
        own = {"workdir": str(self.workdir), "out": self.create_tempdir().full_path}
        _, said = ended(call(**own, attack="clean", n=999))
        self.assertIn("has only 80 images; evaluating all of them", said)
        self.assertEqual(self.evaluated(attack="clean", n="all")["image_ids"], "0..79")
        (place,) = spread.places(data.open_source("digits", "test[:80]"), 1).tolist()
        self.assertEqual(self.evaluated(attack="clean", n=1)["image_ids"], str(place))

    @sweeps.rows(
        (8, "bicubic-1.0", "bicubic-1.0"),
        (12, "bicubic-1.0", "bicubic-1.0"),
        (8, "bicubic-8-crop-8", "bicubic-8-crop-8"),
        (12, "bicubic-8-crop-8", None, True),
        (8, None, None),
    )
    def test_a_run_is_evaluated_as_it_was_tested(self, size, its, expected, dropped=False):
        origin = target.Subject(NetworkSpec("convnext_n", image_size=8), tested=its)
        source = data.open_source("digits", "test")
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            self.assertEqual(target.preprocessing(origin, size, source), expected)
        told = "bicubic-8-crop-8 is for a different image size" in said.getvalue()
        self.assertEqual(told, dropped)

    @pytest.mark.slow
    def test_other_data_preprocessing_and_size(self):
        other = {"dataset": "fake:12x12x1", "attack": "clean", "n": 16}
        record = self.evaluated(**other)
        self.assertEqual(record["split"], "test")
        self.assertEqual(record["preprocessing"], "bicubic-9-crop-8")
        record = self.evaluated(**other, preprocessing="bilinear-0.5")
        self.assertEqual(record["preprocessing"], "bilinear-16-crop-8")
        record = self.evaluated(**other, preprocessing="none", image_size=12, split="train[:20]")
        self.assertEqual((record["preprocessing"], record["split"]), ("none", "train[:20]"))
        self.assertEqual(record["model"]["image_size"], 12)

    def test_autoattack_is_asked_for_what_the_flags_say(self):
        out = Path(self.create_tempdir())
        given = {"workdir": str(self.workdir), "out": str(out), "attack": "apgd-ce", "n": 8}
        with stand_in():
            printed, _ = ended(call(**given, search_dtype="bfloat16", seed=5, batch=4))
            asked = autoattack.asked
            call(**given, seed=6)
        self.assertNotEqual(asked["ledger"], autoattack.asked["ledger"])
        self.assertIsNone(autoattack.asked["search_fn"])
        record = result_lines.read(out)[0]
        self.assertEqual(asked["ledger"], out / f"ledger-{record['evaluation']}.jsonl")
        known = record["fingerprint"]
        self.assertEqual(asked["identity"].exact | known, known)
        expected = {"norm": "linf", "epsilon": 0.1, "version": "standard"}
        expected["attacks"] = ("apgd-ce",)
        expected |= {"seed": 5, "batch_size": 4}
        self.assertEqual({k: asked[k] for k in expected}, expected)
        images = asked["images"][:]
        self.assertEqual((images.dtype, images.shape), (np.float32, (8, 8, 8, 1)))
        self.assertEqual((images.min(), images.max()), (0, 1))
        low, high = (np.asarray(asked[k](images)) for k in ("search_fn", "logits_fn"))
        self.assertBetween(np.abs(low - high).max(), 1e-5, 1)
        self.assertEqual(
            record["attacks"][1], {"norm": "linf", "epsilon": 0.1, "name": "square", "steps": 5000}
        )
        self.assertEqual(record["flags"], {"standin": "not an attack"})
        self.assertEqual(list(record["accuracy_after"]), ["apgd-ce", "square"])
        self.assertEqual(record["robust"], record["accuracy_after"]["square"])
        self.assertEqual(record["search_dtype"], "bfloat16")
        self.assertEqual(call(**given, search_dtype="bfloat16", seed=5)[1], printed)
        self.assertRegex(
            printed, r"clean +[\d.]+%\nafter apgd-ce +[\d.]+%\nafter square +[\d.]+%\n"
        )
        self.assertIn("flag standin: not an attack", printed)

    @sweeps.rows(
        (
            {"attack": "cw"},
            "--attack=cw is unknown; choose one of clean, fgsm, pgd-K, .*: apgd-ce, apgd-d",
        ),
        ({"attack": "fab"}, "attack 'fab' is not in version 'standard'; choose from apgd-ce"),
        ({"attack": "apgd-ce,apgd-ce"}, "is empty or repeats an attack"),
        (
            {"attack": "pgd-2", "norm": "l0", "epsilon": "3"},
            "--attack=pgd-2 does not support l0; give --attack=autoattack, or set --norm to",
        ),
        ({"norm": "l0", "epsilon": "65"}, "an l0 ball of radius 65 contains all 8x8 images"),
        (
            {"attack": "cw-0"},
            "--attack=cw-0 is unknown; choose one of clean, fgsm, pgd-K, cw-K, margin-K",
        ),
        ({"attack": "pgd-2", "step": "four"}, "--step=four is not a number; write one"),
        (
            {"attack": "pgd-2", "l1_rule": "dense", "norm": "l1", "epsilon": "2"},
            "--l1_rule=dense is unknown; choose one of sparse, art",
        ),
        (
            {"version": "rand", "rule": "most"},
            "--rule='most' is unknown; choose one of majority, mean",
        ),
        ({"threat": ["linf"]}, "--threat=linf has no radius; write linf:RADIUS, such as"),
        (
            {"threat": ["l3:1"]},
            "--threat=l3:1: the norm 'l3' is unknown; choose one of linf, l2, l1",
        ),
        ({"threat": ["linf:four"]}, "--threat=linf:four: is not a number; write one"),
        ({"threat": ["linf:4"]}, "--threat=linf:4: .* larger than the pixel range .*write 4/255"),
        ({"threat": ["l1:4/255"]}, "an l1 radius of 0.01569 .* is probably meant for linf"),
        ({"epsilon": "4"}, "write 4/255"),
        ({"epsilon": "-1"}, "epsilon=-1.0 is not a valid radius"),
        ({"epsilon": "4/0"}, "--epsilon=4/0 is not a number"),
        ({"options": "{}"}, "--workdir does not support --options"),
        ({"epsilon": "four"}, "--epsilon=four is not a number; write one, or a fraction"),
        ({"norm": "l3", "epsilon": "1"}, "--norm=l3 is unknown; choose one of linf"),
        ({"n": -1}, "--n=-1 is not a number of images; give 1 or more, or all"),
        ({"phase": "test"}, "--phase=test is unknown; choose one of pretrain, train"),
        ({"preprocessing": "Res9"}, "unknown preprocessing 'Res9'"),
        ({"dataset": "digitz"}, "digitz"),
        ({"split": "validation"}, "has no split 'validation'"),
        ({"dataset": "fake:8x8x1:7"}, "num_classes=10, but data set 'fake:8x8x1:7'.* 7 classes"),
        ({"num_classes": 10}, "--workdir does not support --num_classes; use --model"),
        ({"weights": "w.pt"}, "--workdir does not support --weights"),
        ({"model": "convnext_n"}, "give --workdir RUN, or --model NAME"),
        ({"workdir": "nowhere"}, "nowhere is not a run.*; name the folder of a training"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 100_000, "attack": "clean"}, "image_size=100000 must be at most 8192"),
        ({"out": "/dev/null/x"}, "cannot write to --out /dev/null/x"),
    )
    def test_mistakes_are_one_sentence_and_exit_2(self, given, message):
        said = refused(call(**{"workdir": str(self.workdir)} | given))
        self.assertRegex(said, f"jaxrobust: .*{message}")
        self.assertEqual(said.count("\n"), 1, said)

    @sweeps.rows("Linf", "LINF", "linf")
    def test_a_norm_in_any_spelling(self, norm):
        given = evaluation_flags.GivenFlags(workdir="run", norm=norm)
        self.assertEqual(evaluation_flags.placed(given).norm, "linf")

    @sweeps.rows(("linf", "apgd-ce"), ("l0", "sparse-pgd"))
    def test_a_shipped_run_meets_one_attack(self, norm, attack):
        answer = mock.patch.object(command, "answer", return_value=("", False))
        with flagsaver.flagsaver(norm=norm), answer as answered:
            evaluate.main(["evaluate", "quickstart"])
        self.assertEqual(answered.call_args.args[0].attack, attack)

    @sweeps.rows("L2:1/2", "l2:1/2")
    def test_the_norm_of_a_threat_in_any_spelling(self, text):
        self.assertEqual(threats.parse(text), Threat("l2", 0.5))
        self.assertEqual(threats.ladder(f"{text.split(':')[0]}:0:1:2")[0], Threat("l2", 0.0))

    def test_a_run_that_is_none(self):
        folder = Path(self.create_tempdir())
        for text, message in (("{", "is damaged"), ("3", "is damaged"), ("{}", "is not a run's")):
            (folder / "config.json").write_text(text)
            self.assertRegex(refused(call(workdir=str(folder))), message)
        own = json.loads((self.workdir / "config.json").read_text())
        for version in (None, VERSION + 1):
            (folder / "config.json").write_text(json.dumps(own | {"version": version}))
            said = refused(call(workdir=str(folder)))
            self.assertIn(f"has version {version} of the config's keys, but this code has", said)
        (folder / "config.json").write_text(json.dumps(own))
        said = refused(call(workdir=str(folder)))
        self.assertIn("has no best checkpoint of train or pretrain; train until", said)
        self.assertEqual([p.name for p in folder.iterdir()], ["config.json"])


class AnotherSizeTest(parameterized.TestCase):
    """A run whose network knows the size of its images, evaluated at another one."""

    def run_of(self, name, **options) -> tuple[Path, dict[str, np.ndarray]]:
        """A run for 8 px, and its best weights."""
        config = training.tiny(model__name=name, model__options=ConfigDict(options))
        workdir = Path(self.create_tempdir()) / "run"
        with contextlib.closing(Checkpoints(workdir / "train" / "best")) as best:
            weights = Weights(*jax.jit(network_of(config).init)(jax.random.key(7)))
            best.save(3, weights, {})
            best.wait()
        own = {"version": VERSION} | json.loads(config.to_json())
        (workdir / "config.json").write_text(json.dumps(own))
        return workdir, jax.device_get(weights.params | weights.stats)

    @pytest.mark.slow
    def test_positions_are_resized(self):
        options = {"dim": 8, "depth": 1, "heads": 2, "stem_strides": (2,)}
        workdir, trained = self.run_of("vit_s", **options)
        positions = resized(trained["pos_embed"], (1, 37, 8))

        with self.subTest("as those of files"):
            _, weights = runs.run_weights(workdir, image_size=12)
            ours = jax.device_get(weights.params | weights.stats)
            self.assertEqual(ours.keys(), trained.keys())
            for name, array in (trained | {"pos_embed": positions}).items():
                np.testing.assert_array_equal(ours[name], array, err_msg=name)

        with self.subTest("by the command"):
            given = {"dataset": "fake:12x12x1", "image_size": 12, "preprocessing": "none"}
            out = self.create_tempdir().full_path
            ended(call(workdir=str(workdir), attack="clean", n=16, out=out, **given))

        with self.subTest("where another run starts from these weights"):
            own = {"model__name": "vit_s", "model__options": ConfigDict(options)}
            changes = {"model__image_size": 12, "init__weights": str(workdir)}
            start, _ = start_weights.of_config(training.tiny(**own, **changes))
            self.assertEqual(start.resized, {"pos_embed": ((1, 17, 8), (1, 37, 8))})
            np.testing.assert_array_equal(start.params["pos_embed"], positions)


class FileTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        net = models.create("convnext_n", num_classes=10, image_size=8, in_channels=1)
        cls.apply = staticmethod(jax.jit(net.apply))
        cls.params, cls.stats = jax.jit(net.init)(jax.random.key(0))

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        arrays = {k: np.array(v) for k, v in (self.params | self.stats).items()}
        save_file(arrays, self.folder / "weights.safetensors")
        self.given = {
            "model": "convnext_n",
            "weights": str(self.folder / "weights.safetensors"),
            "dataset": "digits",
            "out": str(self.folder / "out"),
        }

    @pytest.mark.slow
    def test_options_travel_with_the_weights(self):
        """With the row's own strides they are an accuracy too, of a network that never was."""
        net = models.create("convnext_n", num_classes=10, image_size=8, in_channels=1, **STRIDES)
        digits = data.open_source("digits", "test")
        (batch,) = data.evaluation_batches(digits, batch_size=16, image_size=8, limit=16)
        logits = [
            np.asarray(apply(self.params, self.stats, batch.images / np.float32(255))[0])
            for apply in (jax.jit(net.apply), self.apply)
        ]
        clean, wrong = (float(np.mean(rows.argmax(-1) == batch.labels)) for rows in logits)
        self.assertNotEqual(clean, wrong)
        arrays = {k: np.array(v) for k, v in (self.params | self.stats).items()}
        file = self.folder / "says.safetensors"
        save_file(arrays, file, metadata=weights_folder.metadata("convnext_n", STRIDES))
        given = self.given | {"weights": str(file), "n": 16, "attack": "clean"}
        ended(call(**given))
        (record,) = result_lines.read(self.folder / "out")
        self.assertEqual(record["clean"], clean)
        self.assertEqual(record["model"]["options"], {"downsample_strides": [1, 1]})
        with self.subTest("a flag that says the same is the same evaluation"):
            same = "{'downsample_strides': (1, 1), 'drop_path': .1}"
            _, said = ended(call(**given, options=same))
            self.assertIn("already done", said)
        with self.subTest("a flag that says otherwise"):
            said = refused(call(**given, options="{}"))
            self.assertRegex(
                said,
                r"says.safetensors describes its network as convnext_n with downsample_strides="
                r"\[1, 1\], not convnext_n without options; leave out the flag that con",
            )
        with self.subTest("a flag for a file of another writer, which does not say"):
            save_file(arrays, file, metadata={"format": "pt", "options": "[]"})
            given = target.of_file("convnext_n", file, STRIDES).network.options
            self.assertEqual(given, {"downsample_strides": [1, 1]})
            self.assertEmpty(target.of_file("convnext_n", file).network.options)

    @sweeps.rows(
        ("{", "--options={ is not a dict; write one such as"),
        ("[]", r"--options=\[\] is not a dict"),
        ("{'strides': 3}", r"unknown option \['strides'\] for convnext_n; it accepts"),
        ("{'dims': 'abc'}", "dims='abc' of convnext_n must be a tuple of integers"),
    )
    def test_mistakes_in_options(self, options, message):
        said = refused(call(**self.given, options=options))
        self.assertRegex(said, message)
        self.assertEqual(said.count("\n"), 1, said)

    def test_another_architecture_of_the_same_shapes(self):
        """XCiT with patches of 4 px has the names and shapes of XCiT with 16 px."""
        file = self.folder / "xcit.safetensors"
        save_file({"a": np.zeros(1, "f")}, file, metadata=weights_folder.metadata("xcit_n12", {}))
        said = refused(call(**self.given | {"model": "xcit_n12_p4", "weights": str(file)}))
        self.assertIn("describes its network as xcit_n12 without options", said)
        self.assertIn("not xcit_n12_p4 without options; leave out", said)

    @sweeps.rows(
        ({"dataset": None}, "a network that is not a run needs --dataset NAME"),
        ({"weights": None}, "--model needs --weights PATH"),
        ({"weights": "none.pt"}, r"none\.pt: no such file"),
        ({"model": "resnext"}, "unknown model 'resnext'"),
        ({"model": "convnext_t", "image_size": 32}, r"weights do not fit; check the model name"),
        ({"num_classes": 7}, "num_classes=7, but data set 'digits'.* has 10 classes"),
        ({"dataset": "fake:8x8x3", "attack": "clean"}, "takes 1 channels, but .* has 3"),
        ({"dataset": "fake:8x8x1:7"}, r"head\.fc\.bias: shape \(10,\)"),
        ({}, "give --epsilon, in units of the .0, 1. pixel range, such as 4/255"),
        ({"phase": "train"}, "--phase needs a --workdir"),
        ({"out": "s3://b/out"}, "--out s3://b/out is neither a folder nor gs://BUCKET/FOLDER"),
        ({"workdir": "gs://b"}, "--workdir gs://b is neither a folder nor gs://BUCKET/FOLDER"),
        ({"bundle": "s3://b/run"}, "--bundle s3://b/run is neither a folder"),
    )
    def test_mistakes_exit_2(self, given, message):
        self.assertRegex(refused(call(**self.given | given)), message)
        self.assertFalse((self.folder / "out").exists())


class CommandLineTest(parameterized.TestCase):
    def run_it(self, *arguments, without="nothing", **environment):
        code = (
            f"import sys, runpy; sys.modules[{without!r}] = None; sys.argv = {list(arguments)!r}; "
        )
        code += "runpy.run_module('jaxrobust.evaluate', run_name='__main__', alter_sys=True)"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"JAXROBUST_ALLOCATOR": "system"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def test_help_needs_no_jax(self):
        process = self.run_it("evaluate", "--help-all", without="jax")
        printed, said = process.communicate(timeout=60)
        self.assertIn("--search_dtype", printed, said)
        self.assertIn("Exit codes", printed)

    @sweeps.rows(
        (
            ["--atack=clean"],
            "--atack is not a flag; did you mean --attack. --help-all lists all flags",
        ),
        (["--n=many"], "--n=many is not a number of images; give 1 or more, or all"),
        (["a", "b"], "unexpected argument 'b'; name one network"),
    )
    def test_mistakes_in_flags(self, arguments, message):
        process = self.run_it("evaluate", *arguments, without="jax")
        _, said = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 2, said)
        self.assertRegex(said, message)
        self.assertNotIn("Traceback", said)

    def test_flags_live_beside_those_of_main(self):
        importlib.import_module("jaxrobust.main")
        self.assertIsNone(flags.FLAGS.workdir)
