"""Exports to PyTorch: every layout, RobustBench's own loader, its entry, and all refusals."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import grain  # noqa: F401  # defines flags, which absltest must not see for the first time later
import jax
import numpy as np
import pytest
from absl.testing import parameterized
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxrobust import models, types
from jaxrobust.config import VERSION, network_of
from jaxrobust.evaluation.records.record import AccuracyRecord
from jaxrobust.models.published import IMAGENET_MEAN, IMAGENET_STD, PUBLISHED
from jaxrobust.training.update import memory, optim, step
from jaxrobust.weights.naming import convert
from jaxrobust.weights.store import files, hashes, weights_folder
from jaxrobust.weights.store.checkpoint import Checkpoints
from tests.support import command_calls, parity, paths, sweeps
from tests.support import runs as training
from tests.support.families import by_family
from tests.support.modules import hidden
from tests.support.random_weights import drawn

try:
    import torch
except ImportError:
    torch = None
else:
    from jaxrobust.commands.conversion import export_weights, import_weights
    from jaxrobust.publish import layouts, network_account, references, robustbench_entry
    from jaxrobust.publish.references import Network

ROOT = paths.ROOT
SINGH_T = "Singh2023Revisiting_ConvNeXt-T-ConvStem"


def logits(name, params, stats, images, *, num_classes=1000, image_size=224, **options):
    """Ours, f32[B,C], of images f32[B,H,W,C]."""
    net = models.create(name, num_classes=num_classes, image_size=image_size, **options)
    return np.asarray(jax.jit(lambda *args: net.apply(*args)[0])(params, stats, images))


def torch_logits(net, images):
    with torch.no_grad():
        return net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def imported(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Case(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if torch is None:
            self.skipTest(paths.PARITY)
        self.enter_context(jax.numpy_dtype_promotion("standard"))
        self.folder = Path(self.create_tempdir())
        self.out = self.folder / "out"

    def call(self, *arguments, code=0) -> tuple[dict, str]:
        """The object of --json, and what stands on stderr."""
        fixed = ["--nocertificate", "--json"]
        if not any(str(word).startswith("--out") for word in arguments):
            fixed.append(f"--out={self.out}")
        ended = command_calls.ended(lambda: export_weights.main([*fixed, *map(str, arguments)]))
        self.assertEqual(ended.code, code, ended.error)
        self.assertEmpty([*self.folder.glob("out.part*")])
        return json.loads(ended.out.splitlines()[-1]) if not code else {}, ended.error

    def refused(self, message, *arguments, code=2):
        _, said = self.call(*arguments, code=code)
        self.assertRegex(said, "^jaxrobust: " + message)


class FileCase(Case):
    """A small network in a file with our names."""

    def setUp(self):
        super().setUp()
        self.params, self.stats = drawn("convnext_n", num_classes=10, image_size=28)
        self.file = self.save(self.stats)
        self.images = np.random.default_rng(1).random((2, 28, 28, 3), np.float32)

    def save(self, stats, name="ours.safetensors") -> Path:
        save_file(self.params | stats, self.folder / name)
        return self.folder / name

    def export(self, *arguments, file=None, code=0):
        source = ["--weights", file or self.file, "--model=convnext_n", "--image-size=28"]
        return self.call(*source, *arguments, code=code)

    def ours(self, stats=None):
        sizes = {"num_classes": 10, "image_size": 28}
        return logits("convnext_n", self.params, stats or self.stats, self.images, **sizes)


class LayoutTest(FileCase):
    def test_timm(self):
        done, _ = self.export("--layout=timm")
        self.assertEqual(list(done["files"]), ["convnext_n.safetensors"])
        written = self.out / "convnext_n.safetensors"
        self.assertEqual(done["files"], {written.name: hashes.file_sha256(written)})
        expected = {"model": "convnext_n", "weights": "ours.safetensors", "layout": "timm"}
        expected |= {"weights_sha256": hashes.weights_sha256(self.params, self.stats)}
        expected |= {"out": str(self.out), "certificate": None, "confirmed": None, "by_hand": []}
        self.assertEqual(expected, {key: done[key] for key in expected})
        self.assertEqual(done.keys(), expected.keys() | {"files", "usage"})
        arrays = load_file(self.out / "convnext_n.safetensors")
        expected = convert.to_torch("convnext_n", self.params, self.stats)
        self.assertEqual(arrays.keys(), expected.keys())
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, expected[key], err_msg=key)

    def test_options_come_from_the_weights(self):
        """A file says that it holds another network's, and timm's layout would hide that."""
        strides = {"downsample_strides": [1, 1]}
        save_file(
            self.params | self.stats,
            self.file,
            metadata=weights_folder.metadata("convnext_n", strides),
        )
        _, said = self.export("--layout=timm", code=2)
        self.assertIn("has downsample_strides=(1, 1) instead of ()", said)
        _, said = self.export("--layout=timm", "--options={}", code=2)
        self.assertIn("leave out the flag that contradicts", said)
        self.save(self.stats)
        _, said = self.export("--layout=timm", f"--options={strides}", code=2)
        self.assertIn("has downsample_strides=(1, 1) instead of ()", said)

    def test_module(self):
        self.export("--layout=module")
        stored = torch.load(self.out / "convnext_n.pt", weights_only=True)
        self.assertEqual(stored.keys(), self.params.keys() | self.stats.keys())
        self.assertTrue(all(t.is_contiguous() for t in stored.values()))
        module = imported(self.out / "convnext_n.py")
        net = module.load()
        self.assertFalse(net.training)
        # float32, other orders of the sums
        self.assertLess(parity.relative(torch_logits(net, self.images), self.ours()), 1e-5)
        self.assertIn("from convnext_n import load", module.__doc__)
        self.assertIn("their order is unknown: ask the authors of the weights", module.__doc__)
        self.assertIn("- unknown: there is no record of these weights", module.__doc__)
        (self.out / "convnext_n.pt").write_bytes(b"another")
        with self.assertRaisesRegex(ValueError, "is not the file that was exported next to"):
            module.load()

    @pytest.mark.slow
    def test_module_with_normalisation(self):
        fixed = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        stats = {f"normalize.{k}": np.array(v, np.float32) for k, v in fixed.items()}
        file = self.save(self.stats | stats, "normalised.safetensors")
        self.export("--layout=module", file=file)
        net = imported(self.out / "convnext_n.py").load()
        ours = self.ours(self.stats | stats)
        self.assertLess(parity.relative(torch_logits(net, self.images), ours), 1e-5)
        said = " ".join((self.out / "convnext_n.py").read_text().split())
        self.assertIn("the first layer does that, mean (0.485, 0.456, 0.406) and std (0.2", said)
        self.out = self.folder / "other"
        _, said = self.export("--layout=timm", file=file, code=2)
        self.assertRegex(said, "this layout has no normalization layer.*self-contained module")

    @pytest.mark.slow
    def test_imported_folder(self):
        self.export("--layout=timm")
        folder = self.folder / "imported"
        with contextlib.redirect_stdout(io.StringIO()):
            source = str(self.out / "convnext_n.safetensors")
            sizes = ["--num-classes=10", "--image-size=28", "--nocertificate"]
            import_weights.main([source, "--model=convnext_n", f"--out={folder}", *sizes])
        self.out = self.folder / "again"
        done, _ = self.call(f"--weights={folder}", "--layout=timm")
        sha256 = hashes.weights_sha256(self.params, self.stats)
        self.assertEqual(done["weights_sha256"], sha256)
        self.refused("argument --which|.*holds one set", f"--weights={folder}", "--layout=timm",
                     "--which=raw")  # fmt: skip

    @pytest.mark.slow
    def test_averaged_or_raw(self):
        network = Network("convnext_n", self.params, self.stats, 10, 28, {})
        raw = {k: torch.from_numpy(a) for k, a in references.named(network, wrapped=False).items()}
        both = {"model": raw, "model_ema": {k: t + 1 for k, t in raw.items()}}
        torch.save(both, self.folder / "both.pth")
        hashes = set()
        for which in ("ema", "raw"):
            self.out = self.folder / which
            arguments = ["--layout=timm", f"--which={which}"]
            self.export(*arguments, file=self.folder / "both.pth")
            bias = load_file(self.out / "convnext_n.safetensors")["head.fc.bias"]
            np.testing.assert_array_equal(bias, raw["head.fc.bias"] + (which == "ema"))
            hashes.add(bias.tobytes())
        self.assertLen(hashes, 2)

    @pytest.mark.slow
    def test_another_image_size_is_said(self):
        vit, _ = drawn("vit_s", num_classes=3, image_size=32)
        stats = {"normalize.mean": np.zeros(3, np.float32), "normalize.std": np.ones(3, np.float32)}
        save_file(vit | stats, self.folder / "vit.safetensors")
        self.refused(
            ".*does not fit image size 224; give --image_size",
            *("--weights", self.folder / "vit.safetensors", "--model=vit_s", "--layout=timm"),
        )


class OverTest(FileCase):
    """What is there already, and what goes wrong on the way."""

    @pytest.mark.slow
    def test_permissions_are_the_umasks(self):
        for umask, expected in ((0o022, "0o644"), (0o027, "0o640")):
            self.addCleanup(os.umask, os.umask(umask))
            for layout in ("timm", "module", "hub"):
                self.out = self.folder / f"{layout}{umask}"
                self.export(f"--layout={layout}")
                modes = {p.name: oct(p.stat().st_mode & 0o777) for p in self.out.iterdir()}
                self.assertEqual(set(modes.values()), {expected}, modes)

    @pytest.mark.slow
    def test_again_is_the_same_and_others_are_kept(self):
        for layout in ("timm", "module", "hub"):
            self.out = self.folder / layout
            first, _ = self.export(f"--layout={layout}")
            self.assertEqual(self.export(f"--layout={layout}")[0], first)
        self.params["head.fc.bias"] = np.ones(10, np.float32)
        other = self.save(self.stats, "other.safetensors")
        for layout in ("timm", "module", "hub"):
            self.out = self.folder / layout
            before = {p.name: p.read_bytes() for p in self.out.iterdir()}
            _, said = self.export(f"--layout={layout}", file=other, code=2)
            self.assertRegex(said, "exists with different content; name a new --out")
            self.assertEqual({p.name: p.read_bytes() for p in self.out.iterdir()}, before)

    def test_a_full_disk_leaves_nothing(self):
        full = "No space left on device (os error 28)"
        fails = {
            "module": (torch, "save", RuntimeError(f"{full}\nin a file of C++")),
            "timm": (files, "save_file", SafetensorError(f"I/O error: {full}")),
            "jaxrobust": (files, "save_file", SafetensorError(f"I/O error: {full}")),
        }
        for layout, (module, function, error) in fails.items():
            with mock.patch.object(module, function, side_effect=error):
                _, said = self.export(f"--layout={layout}", code=3)
            self.assertIn("No space left", said)
            self.assertNotIn("C++", said)
            self.assertFalse(self.out.exists())

    def test_a_file_that_computes_something_else_is_not_written(self):
        from jaxrobust.publish import certificate

        found = {"agrees": False, "reference": None, "missing": "", "faults": ["wrong"]}
        arguments = [f"--weights={self.file}", "--model=convnext_n", "--image-size=28"]
        arguments += ["--layout=timm", f"--out={self.out}"]
        with mock.patch.object(certificate, "certify", lambda *a, **k: found):
            ended = command_calls.ended(lambda: export_weights.main(arguments))
        self.assertEqual(ended.code, 3)
        self.assertIn("differ, so nothing is written", ended.error)
        self.assertFalse(self.out.exists())

    def test_without_pytorch(self):
        with hidden("torch"):
            self.export("--layout=timm")
            _, said = self.export("--layout=module", code=2)
        self.assertIn("needs PyTorch: pip install 'jaxrobust[torch]'", said)


class RefusalTest(FileCase):
    @sweeps.rows(
        (
            ["--layout=tim"],
            "unknown layout 'tim'; did you mean timm. write jaxrobust, timm, hub, module, "
            "state-dict, robustbench, or a RobustBench id such as Salman2020Do_R18",
        ),
        (["--layout=Standard_R50"], "RobustBench does not read a file for Standard_R50"),
        ([f"--layout={SINGH_T}"], r".* dims=\(64, 128, 256\) instead of \(96, 192, .*module"),
        (["--layout=Salman2020Do_R18"], "Salman2020Do_R18 is a resnet18, not a convnext_n"),
        (["--layout=timm", "--workdir=x"], "give either --workdir RUN or --weights PATH"),
        (["--layout=timm", "--phase=train"], "--phase needs a --workdir"),
        (["--layout=timm", "--which=raw"], ".*holds one set of weights; leave --which out"),
        (["--layout=timm", "--id=Me2026My"], "--id needs --record"),
        (["--layout=timm", "--record=r.jsonl"], "--record needs --id"),
        (
            ["--layout=timm", "--record=r.jsonl", "--id=mine"],
            "--id mine is not a RobustBench id",
        ),
        (["--layout=timm", "--record=r.jsonl", "--id=Me2026My"], "--record r.jsonl: no such"),
        (["--layout=hub", "--record=r.jsonl"], "--record r.jsonl: no such"),
        (["--layout=timm", "--license=mit"], "--license is for the model card; leave it out, or"),
        (["--layout=module", "--confirm=8"], "--confirm needs --record"),
        (
            ["--layout=hub", "--record=r.jsonl", "--id=Me2026My", "--confirm=8"],
            "--confirm attacks a network in PyTorch; choose --layout module",
        ),
        (
            ["--layout=module", "--record=r.jsonl", "--id=Me2026My", "--confirm=0"],
            "--confirm=0 must be at least 1",
        ),
        (
            ["--layout=module", "--record=r.jsonl", "--confirm=8"],
            "--record needs --id, a RobustBench id such as",
        ),
        (["--layout=timm", "--bogus"], "--bogus is not a flag; --help-all lists all flags"),
        (["--layout=timm", "--out={}/ours.safetensors"], "--out .* is a file; name a folder"),
        (
            ["--layout=timm", "--out={}/ours.safetensors/out"],
            r"cannot write to --out .*/out \(Not a directory\); name a writable folder",
        ),
    )
    def test_mistakes(self, arguments, message):
        _, said = self.export(*[a.format(self.folder) for a in arguments], code=2)
        self.assertRegex(said, "^jaxrobust: " + message)
        self.assertLen(said.strip().splitlines(), 1)
        self.assertFalse(self.out.exists())

    @sweeps.fast(1)
    @parameterized.parameters(
        # The same names as the published network, and another function or other shapes.
        ("resnet50_gelu", "Salman2020Do_R50", {}, "activation='gelu' instead of 'relu'"),
        ("resnet50_gelu", "timm", {"activation": "relu"}, "activation='relu' instead of 'gelu'"),
        ("xcit_s12_p4", "Debenedetti2022Light_XCiT-S12", {}, r"stem_strides=\(1, 1, 2, 2\)"),
        ("resnet18", "Salman2020Do_R18", {}, r"1000 classes.*fc\.(bias|kernel)"),
        ("swin_b", "timm", {"eps": 1e-6, "dim": 32}, "eps=1e-06 instead of 1e-05"),
    )
    def test_what_a_layout_cannot_say(self, name, layout, options, message):
        wrapped = layout in PUBLISHED and PUBLISHED[layout].normalised
        params, stats = drawn(name, num_classes=3, normalised=wrapped, **options)
        network = Network(name, params, stats, 3, 224, options)
        with self.assertRaisesRegex(ValueError, f"{message}.*--layout module"):
            layouts.arrays(network, layout)


class RunTest(Case):
    """A run's best and latest checkpoints, with options in its row."""

    def setUp(self):
        super().setUp()
        config = training.tiny()
        self.workdir = self.folder / "run"
        self.workdir.mkdir()
        own = {"version": VERSION} | json.loads(config.to_json())
        (self.workdir / "config.json").write_text(json.dumps(own))
        sizes = {"num_classes": 10, "image_size": 8, "in_channels": 1}
        self.options = config.model.options.to_dict()
        self.params, self.stats = drawn("convnext_n", **sizes, **self.options)
        tx = optim.adamw(lambda step: 0.1, weight_decay=0.1, decay_mask="not-bias")
        state = step.init_state(network_of(config), memory.remembering(tx), jax.random.key(0))
        zeros = {key: np.zeros_like(array) for key, array in state.ema.items()}
        state = state._replace(params=self.params, stats=self.stats, ema=zeros)
        best = types.Weights(self.params, self.stats)
        for kind, arrays in (("best", best), ("latest", state)):
            with contextlib.closing(Checkpoints(self.workdir / "train" / kind)) as checkpoints:
                checkpoints.save(7, jax.tree.map(jax.numpy.asarray, arrays), {})
                checkpoints.wait()
        self.sizes = sizes

    def test_module_says_what_it_expects_and_reached(self):
        names = [f"digit {number}" for number in range(10)]
        (self.workdir / "classes.txt").write_text("".join(f"{name}\n" for name in names))
        sha256 = hashes.weights_sha256(self.params, self.stats)
        row = {
            "time": "2026-11-21T10:00:00+00:00",
            "commit": "0123456789abcdef",
            "weights_sha256": sha256,
            "dataset": "digits",
            "split": "test[:80]",
            "image_ids": "0..79",
            "preprocessing": "none",
            "attacks": [{"name": "apgd-ce", "norm": "linf", "epsilon": 0.1, "steps": 3}],
            "clean": 0.5,
            "robust": 0.25,
            "flags": {},
            "device": "1 x cpu",
        }
        other = row | {"weights_sha256": "0" * 64, "clean": 0.99}
        own = self.workdir / "results.jsonl"
        own.write_text("".join(json.dumps(r) + "\n" for r in (row, other)))
        evaluated = row | {"method": "autoattack standard", "robust": 0.125, "evaluation": "e1"}
        file = self.folder / "more.jsonl"
        file.write_text(json.dumps(evaluated) + "\n")
        self.call(f"--workdir={self.workdir}", "--layout=module", f"--record={file}")
        module = imported(self.out / "convnext_n.py")
        said = " ".join(module.__doc__.split())
        for text in (
            "- Range: float32 in [0, 1] (1 channel, gray), not normalized: no layer does that",
            "- Images: images of 8 x 8 px as they are",
            "- Classes: 10, in this order: digit 0, digit 1, ",
            "- Weights: train, step 7, ema; adversarial training on digits, split train[:256], "
            "apgd, 2 steps, linf 0.1",
            "- Threat model: linf 0.1, in units of [0, 1] pixels",
            "- 50.00% clean, 25.00% robust (APGD-CE 3 steps, linf 0.1) on 80 of digits, split "
            "test[:80]; record of 2026-11-21T10:00:00+00:00, commit 0123456789ab, 1 x cpu",
            "12.50% robust (autoattack standard, linf 0.1) on 80 of digits, split test[:80]; "
            "record e1 of",
        ):
            self.assertIn(text, said)
        self.assertNotIn("99.00%", said)
        self.assertEqual(module.CLASSES, tuple(names))

    @pytest.mark.landing
    def test_raw_of_the_latest(self):
        arguments = [f"--workdir={self.workdir}", "--layout=module"]
        done, _ = self.call(*arguments, "--which=raw")
        self.assertEqual(done["weights"], "train, step 7, raw, latest checkpoint")
        self.assertEqual(done["weights_sha256"], hashes.weights_sha256(self.params, self.stats))
        config = json.loads((self.workdir / "config.json").read_text())
        config["evaluation"]["weights"] = "raw"
        (self.workdir / "config.json").write_text(json.dumps(config))
        self.out = self.folder / "averaged"
        done, _ = self.call(*arguments, "--which=ema")
        self.assertEqual(done["weights"], "train, step 7, ema, latest checkpoint")
        self.assertFalse(torch.load(self.out / "convnext_n.pt")["head.fc.bias"].any())

    def test_refusals(self):
        run = f"--workdir={self.workdir}"
        self.refused(r".*depths=\(1,\) instead of \(2, 2, 2\).*module", run, "--layout=timm")
        self.refused(".*no best checkpoint of pretrain", run, "--phase=pretrain", "--layout=module")
        self.refused(
            ".*has no checkpoint for pretrain; train first",
            *(run, "--phase=pretrain", "--layout=module", "--which=raw"),
        )
        self.refused("nowhere is not a run", "--workdir=nowhere", "--layout=timm")
        self.refused("--model is only for --weights", run, "--layout=timm", "--model=convnext_n")


class EntryTest(FileCase):
    """RobustBench's entry and issue, from the record alone."""

    def setUp(self):
        super().setUp()
        ball = {"norm": "linf", "epsilon": 4 / 255}
        model = {"name": "convnext_n", "num_classes": 10, "image_size": 28, "options": {}}
        record = AccuracyRecord(
            config_sha256=hashes.config_sha256({}),
            weights="train, step 7, ema",
            weights_sha256=hashes.weights_sha256(self.params, self.stats),
            dataset="imagenet2012",
            split="validation@robustbench",
            image_ids="0..4999",
            preprocessing="BicubicRes256Crop224",
            dtype="float32",
            attacks=[ball | {"name": name} for name in ("apgd-ce", "apgd-t", "fab-t", "square")],
            clean=0.741,
            robust=0.52420,
            seed=3,
            ids_sha256=robustbench_entry.ROBUSTBENCH_SHA256,
            evaluation="abc123",
            model=model,
            method="autoattack standard",
        )
        self.record = record.stamped().to_json()

    def entry(self, *records, extra=(), code=0):
        path = self.folder / "results.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        arguments = ["--layout=module", f"--record={path}", "--id=Me2026Small_ConvNeXt-N", *extra]
        return self.export(*arguments, code=code)

    def test_filled_from_the_record(self):
        done, _ = self.entry(self.record)
        path = self.out / "model_info" / "imagenet" / "Linf" / "Me2026Small_ConvNeXt-N.json"
        entry = json.loads(path.read_text())
        hand = robustbench_entry.BY_HAND
        self.assertEqual(
            entry,
            {
                "link": hand,
                "name": hand,
                "authors": hand,
                "additional_data": hand,
                "number_forward_passes": 1,
                "dataset": "imagenet",
                "venue": hand,
                "architecture": "ConvNeXt-N",
                "eps": "4/255",
                "clean_acc": "74.10",
                "reported": "52.42",
                "autoattack_acc": "52.42",
                "unreliable": False,
            },
        )
        unknown = ["link", "name", "authors", "additional_data", "venue"]
        self.assertEqual(done["by_hand"], unknown)
        issue = (self.out / "new_model_issue.md").read_text()
        for text in (
            "[New Model] Me2026Small_ConvNeXt-N",
            "**Architecture**: ConvNeXt-N",
            "**Clean accuracy**: 74.10%",
            "**Robust accuracy**: 52.42%",
            "preprocessing BicubicRes256Crop224, float32, seed 3",
            done["files"]["convnext_n.pt"],
            done["weights_sha256"],
            self.record["commit"],
        ):
            self.assertIn(text, issue)

    def test_flags_are_not_hidden(self):
        done, _ = self.entry(self.record | {"flags": {"randomised": "logits differ"}})
        self.assertIn("unreliable", done["by_hand"])
        self.assertIn(
            "flag randomised: logits differ", (self.out / "new_model_issue.md").read_text()
        )

    def test_no_autoattack_accuracy(self):
        _, said = self.entry(self.record | {"method": "pgd-20"}, code=2)
        self.assertRegex(said, "its attack is pgd-20, not autoattack standard")
        self.assertRegex(said, "run: jaxrobust evaluate .*--attack autoattack")
        self.assertFalse(self.out.exists())

    def test_of_a_record_that_lacks_something(self):
        part = {key: self.record[key] for key in ("weights_sha256", "robust")}
        _, said = self.entry(part, code=2)
        self.assertIn("its record of these weights has no attacks; evaluate again", said)

    def test_of_other_weights(self):
        _, said = self.entry(self.record | {"weights_sha256": "f" * 64}, code=2)
        self.assertRegex(said, r"no record of these weights \(sha256 .*only of ffffffffffff")

    @sweeps.rows(
        ("convnext_b_cvst", {}, "ConvNeXt-B + ConvStem"),
        ("xcit_s12_p8", {}, "XCiT-S12/8"),
        ("iso_convnext_s", {}, "Isotropic ConvNeXt-S"),
        ("wide_resnet50_2", {}, "WideResNet-50-2"),
        ("vit_s", {"depth": 6}, "ViT-S, depth=6"),
    )
    def test_architectures(self, name, options, expected):
        self.assertEqual(robustbench_entry.architecture(name, options), expected)
        for every in models.available():
            self.assertNotEmpty(robustbench_entry.architecture(every, {}))


IDS = [
    *(key for key in PUBLISHED if key.startswith(("Singh2023", "Debenedetti2022", "Liu2023"))),
    "Salman2020Do_R18",
    *(key for key in PUBLISHED if key.startswith("Huang202")),
]
_ANY_SIZE = ("convnext", "xcit", "resnet")


@pytest.mark.matrix
class SlowRobustBenchTest(Case):
    """RobustBench's own `load_model` on a file that was exported from JAX."""

    @sweeps.rows(*IDS)
    def test_load_model(self, key):
        from jaxrobust.publish import torch_networks

        try:
            torch_networks.import_robustbench()
        except ImportError as error:
            self.skipTest(str(error))
        self.folder = Path(self.create_tempdir())
        self.out = self.folder / "out"
        name = PUBLISHED[key].model
        board = PUBLISHED[key].board
        sizes = {"num_classes": board.num_classes, "image_size": board.image_size}
        how = {"normalised": PUBLISHED[key].normalised, "moments": (board.mean, board.std)}
        params, stats = drawn(name, **sizes, **how)
        save_file(params | stats, self.folder / "ours.safetensors")
        self.call(
            "--weights", self.folder / "ours.safetensors", f"--model={name}", f"--layout={key}"
        )
        file = references.place(self.out, key)
        net = references.load_model(self.out, key)
        stored, state = torch.load(file, weights_only=True), net.state_dict()
        self.assertEqual(list(stored), list(state))
        for k, tensor in state.items():
            np.testing.assert_array_equal(stored[k].numpy(), tensor.numpy(), err_msg=k)
            self.assertEqual(stored[k].dtype, tensor.dtype, k)

        size = 64 if name.startswith(_ANY_SIZE) else board.image_size
        images = np.random.default_rng(1).random((1, size, size, 3), np.float32)
        classes = board.num_classes
        ours = logits(name, params, stats, images, num_classes=classes, image_size=size)
        # float32, other orders of the sums
        self.assertLess(parity.relative(torch_logits(net, images), ours), 1e-5)

        del net, state, stored
        back = self.folder / "back"
        with contextlib.redirect_stdout(io.StringIO()):
            import_weights.main([str(file), f"--model={key}", f"--out={back}", "--nocertificate"])
        arrays = files.read(back / "weights.safetensors")
        self.assertEqual(arrays.keys(), (params | stats).keys())
        for k, array in arrays.items():
            np.testing.assert_array_equal(array, (params | stats)[k], err_msg=k)
        shutil.rmtree(self.folder)


# Neither timm nor robustbench has these as they are; the logits of their modules are compared.
OURS = [
    *("iso_convnext_s", "iso_convnext_s_cvst", "vit_m_cvst", "convnext_n", "convnext_n_cvst"),
    *("cait_s12", "resnet50_gelu", *(n for n in models.available() if n.endswith("_p4"))),
]
# Answers a path, a size and nothing else with logits; knows PyTorch only.
ALONE = """
import importlib.util, json, sys
for name in ("timm", "jaxrobust", "jax", "tools", "robustbench", "torchvision"):
    sys.modules[name] = None
import torch
for line in sys.stdin:
    path, size = json.loads(line)
    spec = importlib.util.spec_from_file_location("alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flat = 0.5 + 0.5 * torch.sin(0.017 * torch.arange(3 * size * size, dtype=torch.float64))
    with torch.no_grad():
        logits = module.load()(flat.float().reshape(1, 3, size, size))
    print(json.dumps(logits[0].tolist()), flush=True)
"""


@pytest.mark.matrix
class SlowModuleTest(Case):
    """Every architecture as a file, in a process that can import nothing but PyTorch."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if torch is not None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            cls.alone = subprocess.Popen([sys.executable, "-I", "-c", ALONE], **pipes)
            cls.addClassCleanup(cls.alone.wait)
            cls.addClassCleanup(cls.alone.stdout.close)
            cls.addClassCleanup(cls.alone.stdin.close)

    @sweeps.rows(*by_family(models.available()))
    def test_alone(self, _, names):
        for name in names:
            with self.subTest(name):
                self.folder = Path(self.create_tempdir())
                self.check(name)
                shutil.rmtree(self.folder)

    def check(self, name):
        large = name.startswith("swin") or name.endswith("_224")
        size = 224 if large else 32 if name.endswith("_p4") else 64
        params, stats = drawn(name, num_classes=10, image_size=size, normalised=name in OURS)
        network = Network(name, params, stats, 10, size, {})
        file = layouts.stage(self.folder, network, network_account.Account("drawn"), "module")
        self.alone.stdin.write(json.dumps([str(file), size]) + "\n")
        self.alone.stdin.flush()
        theirs = np.array([json.loads(self.alone.stdout.readline())], np.float32)
        self.assertEqual(theirs.shape, (1, 10))
        self.assertTrue(np.isfinite(theirs).all())
        if name not in OURS:
            return
        flat = 0.5 + 0.5 * np.sin(0.017 * np.arange(3 * size * size))
        images = flat.astype(np.float32).reshape(1, 3, size, size).transpose(0, 2, 3, 1)
        ours = logits(name, params, stats, images, num_classes=10, image_size=size)
        self.assertLess(parity.relative(theirs, ours), 1e-5)
