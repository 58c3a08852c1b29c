"""Imports of weights from files and from servers on this machine."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import parameterized
from safetensors.numpy import load_file, save_file

from jaxrobust.commands.conversion import import_weights
from jaxrobust.config import VERSION
from jaxrobust.publish import import_torch
from jaxrobust.runtime.files import download
from jaxrobust.types import Weights
from jaxrobust.weights import imports
from jaxrobust.weights.naming import networks
from jaxrobust.weights.store import hashes, weights_folder
from jaxrobust.weights.store.checkpoint import Checkpoints
from tests.support import command_calls, paths, sweeps
from tests.support import runs as training
from tests.support.servers import ServedCase
from tests.support.stored import as_timm, weights


class ImportTest(ServedCase):
    def setUp(self):
        super().setUp()
        self.file = self.folder / "timm.safetensors"
        save_file(as_timm(weights()), self.file)
        self.out = self.folder / "out"

    def call(self, *extra, source=None, model="convnext_n", classes="10") -> tuple[dict, str]:
        arguments = [str(source or self.file), f"--out={self.out}", "--json"]
        arguments += [f"--model={model}"] if model else []
        arguments += [
            "--image-size=16",
            "--nocertificate",
            *([f"--num_classes={classes}"] if classes else []),
        ]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            import_weights.main([*arguments, *extra])
        return json.loads(printed.getvalue().splitlines()[-1]), printed.getvalue()

    def refused(self, message, *extra, code=2, **given):
        ended = command_calls.ended(lambda: self.call(*extra, **given))
        self.assertEqual(ended.code, code, ended.error)
        self.assertRegex(ended.error, message)
        self.assertEmpty([*self.folder.glob("*.part*")])

    def test_same_bits_and_all_that_is_known(self):
        done, printed = self.call()
        arrays = load_file(self.out / "weights.safetensors")
        self.assertEqual(arrays.keys(), weights().keys())
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, weights()[key], err_msg=key)
        config = weights_folder.about(self.out)
        self.assertEqual(config, {key: done[key] for key in config})
        self.assertEqual(config["architecture"], "convnext_n")
        self.assertEqual(config["source_sha256"], hashes.file_sha256(self.file))
        for unknown in ("preprocessing", "norm", "epsilon", "accuracies"):
            self.assertIsNone(config[unknown], unknown)
        self.assertIn("70 arrays from the stored weights", printed)
        self.assertIn(
            "none is stored: raw [0, 1] images; change this with --normalize imagenet", printed
        )

    def test_options_travel_with_the_weights(self):
        self.assertEqual(self.call()[0]["options"], {})
        strides, self.out = {"downsample_strides": [1, 1]}, self.folder / "other"
        done, _ = self.call(f"--options={strides | {'drop_path': 0.1}}")
        self.assertEqual(done["options"], strides)
        self.assertEqual(weights_folder.about(self.out)["options"], strides)
        file = self.out / "weights.safetensors"
        self.assertEqual(weights_folder.stated(file), ("convnext_n", strides))
        self.out = self.folder / "third"
        self.assertEqual(self.call(source=file)[0]["options"], strides)
        self.refused(
            "describes its network as convnext_n with .*, not", "--options={}", source=file
        )
        self.refused("unknown option .'strides'.", "--options={'strides': 3}")
        self.refused("--options={ is not a dict", "--options={")
        self.refused(r"--seed=4294967296 must be from 0 to 2\^32 - 1", f"--seed={2**32}")

    @parameterized.parameters(
        ("convnext_tiny", "convnext_t", {}),  # timm's name
        ("Singh2023Revisiting_ConvNeXt-T-ConvStem", "convnext_t_cvst", {"stem_widths": (4, 8)}),
    )
    def test_other_names_of_networks(self, theirs, ours, stem):
        """Each of them means the same network as our own name, and so imports the same."""
        small = {"depths": (1,), "dims": (8,)} | stem
        save_file(as_timm(weights(ours, **small)), self.file)
        done = {}
        for name in (theirs, ours):
            self.out = self.folder / name
            done[name], _ = self.call(f"--options={small}", model=name)
        self.assertEqual(done[theirs]["architecture"], ours)
        for key in ("options", "weights_sha256", "num_classes", "image_size", "drawn"):
            self.assertEqual(done[theirs][key], done[ours][key], key)
        self.assertEqual(weights_folder.about(self.folder / theirs)["architecture"], ours)

    def test_again_is_the_same_but_nothing_is_overwritten(self):
        self.assertEqual(self.call()[0]["sha256"], self.call()[0]["sha256"])
        before = (self.out / "config.json").read_text()
        self.refused("contains other weights", "--normalize=imagenet")
        self.assertEqual((self.out / "config.json").read_text(), before)
        (self.folder / "full").mkdir()
        (self.folder / "full" / "notes.txt").write_text("mine")
        self.out = self.folder / "full"
        self.refused("holds other files; name a new folder")

    def test_a_new_convstem_as_pytorch_draws_it(self):
        self.refused(r"only the stem differs.*--init_stem", model="convnext_n_cvst")
        done, printed = self.call("--init-stem", model="convnext_n_cvst")
        arrays = load_file(self.out / "weights.safetensors")
        stem = {key for key in weights("convnext_n_cvst") if key.startswith("stem.")}
        self.assertEqual(set(done["drawn"]["names"]), stem)
        for key in stem - {"stem.1.scale", "stem.1.bias", "stem.4.scale", "stem.4.bias"}:
            bound = 1 / np.sqrt(27 if ".0." in key else 9 * 32)  # 1 / sqrt(fan_in), biases too
            self.assertLessEqual(np.abs(arrays[key]).max(), bound, key)
            self.assertGreater(np.abs(arrays[key]).max(), 0.8 * bound, key)
        for key in arrays.keys() - stem:
            np.testing.assert_array_equal(arrays[key], weights()[key], err_msg=key)
        self.assertIn("4 left out (is newly initialized)", printed)

    def test_a_file_without_a_stem(self):
        body = {k: a for k, a in as_timm(weights()).items() if not k.startswith("stem.")}
        save_file(body, self.file)
        self.assertEqual(self.call("--init_stem", model="convnext_n_cvst")[0]["left_out"], {})

    def test_a_new_head_only_where_the_width_differs(self):
        self.assertIsNone(self.call()[0]["drawn"])
        self.out = self.folder / "out7"
        done, _ = self.call("--seed=5", classes="7")
        self.assertEqual(done["drawn"]["seed"], 5)
        arrays = load_file(self.out / "weights.safetensors")
        self.assertEqual(arrays["head.fc.kernel"].shape, (256, 7))
        self.assertBetween(arrays["head.fc.kernel"].std(), 0.018, 0.022)  # timm's 0.02
        np.testing.assert_array_equal(arrays["head.fc.bias"], 0)
        self.out = self.folder / "out1000"
        self.refused("head has 10 classes, not 1000; --num_classes 10 keeps it", classes=None)

    def test_halves_are_cast_only_where_asked_for(self):
        save_file({k: a.astype(np.float16) for k, a in as_timm(weights()).items()}, self.file)
        self.refused("70 weights are float16 .*to round them.*--cast")
        self.call("--cast")
        array = load_file(self.out / "weights.safetensors")["head.fc.kernel"]
        expected = weights()["head.fc.kernel"].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(array, expected)

    def test_averaged_or_raw(self):
        torch = self.torch()
        raw = {k: torch.tensor(a) for k, a in as_timm(weights()).items()}
        both = {"model": raw, "model_ema": {k: t + 1 for k, t in raw.items()}}
        torch.save(both, self.folder / "both.pth")
        for which, added in (("ema", 1), ("raw", 0)):
            self.out = self.folder / which
            done, printed = self.call(f"--which={which}", source=self.folder / "both.pth")
            self.assertEqual(done["which"], which)
            words = {"ema": "averaged weights, stored under 'model_ema'", "raw": "raw weights, "}
            self.assertIn(f"  {words[which]}", printed)
            array = load_file(self.out / "weights.safetensors")["head.fc.bias"]
            np.testing.assert_array_equal(array, weights()["head.fc.bias"] + added)
        one = self.folder / "one.pth"
        torch.save({"model": raw}, one)
        self.out = self.folder / "one"
        self.assertIsNone(self.call(source=one)[0]["which"])
        self.out = self.folder / "asked"
        for which in ("raw", "ema"):
            message = "one set of weights, under 'model', and does not say .* leave --which out"
            self.refused(message, f"--which={which}", source=one)
        self.refused("holds one set of weights; leave --which out", "--which=ema")

    def torch(self):
        try:
            import torch
        except ImportError:
            self.skipTest(paths.PARITY)
        return torch

    def test_from_a_server(self):
        self.server.files["/n.safetensors"] = self.file.read_bytes()
        self.server.cut_after = [50_000]
        done, _ = self.call(source=self.server.address + "/n.safetensors")
        self.assertEqual(done["source"], self.server.address + "/n.safetensors")
        np.testing.assert_array_equal(
            load_file(self.out / "weights.safetensors")["head.fc.kernel"],
            weights()["head.fc.kernel"],
        )

    def test_from_a_run(self):
        workdir = self.folder / "run"
        workdir.mkdir()
        own = {"version": VERSION} | json.loads(training.tiny().to_json())
        (workdir / "config.json").write_text(json.dumps(own))
        sizes = {"stem_strides": (1,), "depths": (1,), "dims": (8,), "in_channels": 1}
        arrays = weights("convnext_n", image_size=8, **sizes)
        stats = {k: a for k, a in arrays.items() if k.startswith("normalize.")}
        params = {k: a for k, a in arrays.items() if k not in stats}
        with contextlib.closing(Checkpoints(workdir / "train" / "best")) as best:
            best.save(7, jax.tree.map(jax.numpy.asarray, Weights(params, stats)), {})
        arguments = [str(workdir), f"--out={self.out}", "--json"]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            import_weights.main(arguments)
        done = json.loads(printed.getvalue().splitlines()[-1])
        self.assertEqual(done["weights_sha256"], hashes.weights_sha256(params, stats))
        self.assertEqual((done["norm"], done["epsilon"]), ("linf", 0.1))
        self.assertEqual(done["source"], "run (train, step 7, ema)")
        self.assertEqual(weights_folder.about(self.out)["options"]["dims"], [8])
        said = io.StringIO()
        for flag, message in (
            ("--cast", "--cast only applies to foreign wei"),
            ("--sha256=0", "more than one"),
        ):
            with contextlib.redirect_stderr(said), self.assertRaises(SystemExit):
                import_weights.main([*arguments[:1], f"--out={self.folder / 'new'}", flag])
            self.assertIn(message, said.getvalue())

    def test_mistakes_leave_nothing(self):
        self.refused("nowhere.pth: no such file", source="nowhere.pth")
        self.refused("unknown model 'convnext'; did you mean", model="convnext")
        self.refused("has sha256 .*expected 00", "--sha256=00")
        self.refused("does not name its network; give --model NAME", model=None)
        self.refused("this is an architecture, not weights", source="convnext_n")
        with mock.patch.object(download, "_TRIES", 1):
            self.server.close()
            self.refused("refused", source=f"{self.server.address}/n.pth", code=3)
        page = self.folder / "page.pth"
        page.write_text("<!DOCTYPE html><html>")
        self.refused("is a web page, not weights", source=page)
        self.assertFalse(self.out.exists())


class KnownTest(parameterized.TestCase):
    """What files that others made are known to be."""

    @sweeps.rows(
        ("Salman2020Do_R50", "any.pt", "Salman2020Do_R50"),
        ("convnext_t_cvst", "Singh2023Revisiting_ConvNeXt-T-ConvStem.pt", None),
        (
            "xcit_s12",
            "debenedetti2022light-xcit-s-imagenet-linf.pth.tar",
            "Debenedetti2022Light_XCiT-S12",
        ),
        ("xcit_m12", "debenedetti2022light-xcit-s-imagenet-linf.pth.tar", None),
        ("convnext_t_cvst", "mine.pt", None),
    )
    def test_published(self, model, file, expected):
        if file.startswith("Singh"):
            expected = file.removesuffix(".pt")
        self.assertEqual(imports.published(model, Path(file)), expected)

    @sweeps.rows(
        *(({name: value}, f"--{name}={value} must be at least 1")
          for name in ("num_classes", "image_size") for value in (0, -1)),
        ({"seed": -1}, "--seed=-1 must be from 0 to 2"),
        ({"seed": 2**32}, "--seed=4294967296 must be from 0 to 2"),
        *(({name: 1}, "") for name in ("num_classes", "image_size")),
        *(({"seed": seed}, "") for seed in (0, 2**32 - 1)),
    )  # fmt: skip
    def test_numbers(self, given, said):
        request = networks.Request(**given)
        if not said:
            return import_torch._check_numbers(request)
        with self.assertRaisesRegex(ValueError, f"^{said}"):
            import_torch._check_numbers(request)
