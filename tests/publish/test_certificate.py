"""Certificates: right conversions pass, wrong ones show, and loaders say it."""

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import parameterized
from safetensors.numpy import save_file

from jaxrobust import config, models
from jaxrobust.evaluation.questions import target
from jaxrobust.weights.store import certificates, weights_folder
from tests.support import command_calls, paths, stored, sweeps
from tests.support.modules import hidden
from tests.support.random_weights import drawn

try:
    import torch
except ImportError:
    torch = None
else:
    from jaxrobust.commands.conversion import certificate as command
    from jaxrobust.commands.conversion import export_weights, import_weights
    from jaxrobust.publish import certificate, references, side_by_side
    from jaxrobust.publish.references import Network

CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20)}
VIT = {"dim": 16, "depth": 1, "heads": 2}


def network(name="convnext_t", options=CONVNEXT, **changes) -> "Network":
    params, stats = drawn(name, num_classes=5, image_size=32, **options)
    return Network(name, params | changes, stats, 5, 32, options)


def reference(source, folder: Path) -> "references.Reference":
    """The PyTorch network with the weights of a network of ours, by way of a file."""
    save_file(references.named(source, wrapped=False), folder / "timm.safetensors")
    return references.reference(source, folder / "timm.safetensors")


class Case(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        if torch is None:
            self.skipTest(paths.PARITY)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny networks: threads only wait for each other
        self.addCleanup(torch.set_num_threads, threads)
        self.enter_context(jax.numpy_dtype_promotion("standard"))
        self.folder = Path(self.create_tempdir())

    def certified(self, ours, theirs):
        return certificate.certify(ours, theirs, compared={})


class CertifyTest(Case):
    @pytest.mark.slow
    def test_a_right_conversion(self):
        ours = network()
        found = self.certified(ours, reference(ours, self.folder))
        self.assertTrue(found["agrees"], found["faults"])
        self.assertEqual(found["names"]["equal"], len(models.torch_keys("convnext_t", **CONVNEXT)))
        self.assertLess(found["logits"]["float32"]["relative"], 1e-5)
        self.assertLess(found["logits"]["float64"]["relative"], 1e-9)
        self.assertLess(found["gradients"]["float64"]["relative"], 1e-7)
        self.assertEqual(found["gradients"]["float64"]["sign_agreement"], 1)
        self.assertGreater(found["gradients"]["float64"]["cosine"], 1 - 1e-12)
        for whose in ("ours", "theirs"):
            on = found["transfer"][whose]
            # float32: ten steps of a sign attack on two networks that differ by rounding.
            self.assertAlmostEqual(on["on_ours"]["loss"], on["on_theirs"]["loss"], delta=1e-4)
        self.assertTrue(found["reference"]["independent"])
        self.assertIn("agrees with timm", certificates.summary(found))
        self.assertNotIn("NaN", json.dumps(found))

    @pytest.mark.slow
    def test_a_transposed_square_kernel(self):
        right = network()
        key = "stages.0.blocks.0.conv_dw.kernel"
        wrong = network(**{key: right.params[key].transpose(1, 0, 2, 3)})
        found = self.certified(wrong, reference(right, self.folder))
        self.assertEqual(found["names"]["differing"], ["stages.0.blocks.0.conv_dw.weight"])
        self.assert_shows(found)

    def test_two_heads_swapped(self):
        right = network("vit_s", VIT)
        key = "blocks.0.attn.qkv.kernel"
        q_k_v = right.params[key].reshape(16, 3, 2, 8)
        wrong = network("vit_s", VIT, **{key: q_k_v[:, :, ::-1].reshape(16, 48)})
        found = self.certified(wrong, reference(right, self.folder))
        self.assertEqual(found["names"]["matched"], found["names"]["reference"])
        self.assert_shows(found)

    @parameterized.parameters("LayerNorm", "GELU")
    def test_the_same_weights_in_another_network(self, layer):
        ours = network()
        theirs = reference(ours, self.folder)
        for module in [*theirs.net.modules()]:
            if layer == "LayerNorm" and isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
            for name, child in module.named_children():
                if layer == type(child).__name__ == "GELU":  # timm has a class of that name
                    setattr(module, name, torch.nn.GELU(approximate="tanh"))
        found = self.certified(ours, theirs)
        self.assertEqual(found["names"]["equal"], found["names"]["reference"])
        self.assert_shows(found)

    def assert_shows(self, found):
        self.assertFalse(found["agrees"])
        faults = " ".join(found["faults"])
        self.assertRegex(faults, "logits differ by .* in float64, more than 1.0e-09")
        self.assertRegex(faults, "gradients differ by .* in float64, more than 1.0e-07")
        self.assertIn("DIFFERS FROM", certificates.summary(found))
        with self.assertRaisesRegex(certificate.Differs, "nothing is written.*--nocertificate"):
            certificate.checked(found, "it")

    def test_not_a_number_is_a_fault(self):
        ours = network(**{"head.fc.bias": np.full(5, np.nan, np.float32)})
        found = self.certified(ours, reference(network(), self.folder))
        self.assertFalse(found["agrees"])

    def test_without_pytorch_it_says_so(self):
        with hidden("torch"):
            self.assertIsNone(references.reference(network(), Path("any.pt")))
        found = self.certified(network(), None)
        self.assertIsNone(found["reference"])
        self.assertIn("pip install 'jaxrobust[parity]'", certificates.summary(found))


class ImagesTest(Case):
    def test_photographs(self):
        from PIL import Image

        with self.assertRaisesRegex(ValueError, "--images .* holds no .jpeg"):
            side_by_side.photographs(self.folder, 32)
        for i in range(8):
            pixels = np.full((50, 60, 3), i, np.uint8)
            Image.fromarray(pixels).save(self.folder / f"{i}.png")
        images = side_by_side.photographs(self.folder, 32)
        self.assertEqual(images.shape, (8, 32, 32, 3))
        np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(8, dtype=np.float32) / 255)


class NamesTest(Case):
    """Other names of networks; the reference network is left out, which is compared elsewhere."""

    @parameterized.parameters(
        ("convnext_tiny", "convnext_t", (), "timm"),  # timm's name
        ("Singh2023Revisiting_ConvNeXt-T-ConvStem", "convnext_t_cvst", (4, 8), None),
        ("convnext_t", "convnext_t", (), "timm"),
    )
    def test_other_names_of_networks(self, given, ours, stem, layout):
        options = {"depths": (1,), "dims": (8,)} | ({"stem_widths": stem} if stem else {})
        weights, theirs = self.folder / "ours.safetensors", self.folder / "theirs.pt"
        save_file(stored.weights(ours, **options), weights)
        theirs.write_bytes(b"")
        found = self.enter_context(
            mock.patch.object(references, "reference", mock.Mock(return_value=None))
        )
        with contextlib.redirect_stdout(io.StringIO()):
            of_both = [f"--weights={weights}", f"--against={theirs}", f"--options={options}"]
            command.main([f"--model={given}", "--image-size=16", *of_both])
        network, against, read_as = found.call_args.args
        self.assertEqual((network.name, against, read_as), (ours, theirs, layout or given))
        self.assertEqual(json.loads(certificates.beside(weights).read_text())["model"], ours)


class FileTest(Case):
    """What is written, and what loaders say of it; the numbers are stand-ins."""

    def setUp(self):
        super().setUp()
        row = {"relative": 1e-7, "absolute": 1e-7, "cosine": 1.0, "sign_agreement": 1.0}
        both = {"float32": row, "float64": row}
        names = {"reference": 1, "matched": 1, "equal": 1, "differing": []}
        on = {"fooled": 1, "loss": 1.0}
        ours = {"on_ours": on, "on_theirs": on, "steps": 10}
        standin = {"names": names, "logits": both | {"top1_agreement": 1.0}, "gradients": both}
        standin |= {"transfer": {"images": 4, "ours": ours, "theirs": ours}}
        for key in ("float32", "float64"):
            standin["logits"][key] = row | {"relative": 1e-12}
        standin["gradients"] = {"float64": row | {"relative": 1e-12}, "float32": row}
        measured = {k: v for k, v in standin.items() if k != "names"}
        self.enter_context(
            mock.patch.object(side_by_side, "measured", lambda *unused: dict(measured))
        )
        self.weights = self.folder / "ours.safetensors"
        self.params, self.stats = drawn("xcit_n12", num_classes=5, image_size=32)
        save_file(self.params | self.stats, self.weights)
        ours = Network("xcit_n12", self.params, self.stats, 5, 32, {})
        self.theirs = self.folder / "timm.safetensors"
        save_file(references.named(ours, wrapped=False), self.theirs)

    def call(self, *extra, code=0) -> tuple[str, str]:
        arguments = ["--weights", str(self.weights), *extra]
        if not any(word.startswith("--against") for word in extra):
            arguments += ["--against", str(self.theirs)]
        ended = command_calls.ended(lambda: command.main(arguments))
        self.assertEqual(ended.code, code, ended.error)
        return ended.out, ended.error

    def test_command(self):
        printed, _ = self.call("--model=xcit_n12", "--image-size=32", "--json")
        written = json.loads((self.folder / "ours.certificate.json").read_text())
        self.assertEqual(written, json.loads(printed.splitlines()[-1]))
        self.assertTrue(written["agrees"])
        self.assertEqual(written["files"]["ours"]["name"], "ours.safetensors")
        self.assertEqual(written["files"]["theirs"]["name"], "timm.safetensors")
        self.assertIn("read from the file by name", written["reference"]["weights"])
        self.assertIn("fools 1 of 4 here, 1 there", printed)
        self.assertRegex(certificates.line(self.weights), "^ours.certificate.json: agrees with")

    def test_exit_code_of_a_difference(self):
        changed = {k: np.asarray(a + 1, a.dtype) for k, a in dict(_numpy(self.theirs)).items()}
        save_file(changed, self.theirs)
        printed, _ = self.call("--model=xcit_n12", "--image-size=32", code=1)
        self.assertIn("arrays differ (", printed)

    @sweeps.rows(
        (
            ("--model=xcit_n12", "--image-size=32", "--bogus"),
            "--bogus is not a flag; --help-all lists all flags",
        ),
        ((), "does not name its network; give --model NAME"),
        (("--model=convnext",), "unknown model 'convnext'; did you mean"),
        (("--model=convnext_t",), "weights do not fit"),
        (("--model=xcit_n12", "--against=nowhere.pt"), "nowhere.pt: no such file"),
    )
    def test_mistakes(self, arguments, message):
        _, said = self.call(*arguments, code=2)
        self.assertRegex(said, message)
        self.assertStartsWith(said, "jaxrobust: ")

    def test_loaders_say_it(self):
        self.assertIsNone(certificates.line(self.weights))
        self.call("--model=xcit_n12", "--image-size=32")
        network = config.NetworkSpec("xcit_n12", num_classes=5, image_size=32)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            target.file_weights(network, self.weights)
        self.assertIn("ours.certificate.json: agrees with", said.getvalue())
        self.assertEqual(certificates.stated(self.weights), ("xcit_n12", {}))
        path, strides = certificates.beside(self.weights), {"tokens_norm": True}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"options": strides}))
        exported = target.of_file("xcit_n12", self.weights)  # of an exported module's .pt
        self.assertEqual(exported.network.options, strides)
        changed = self.params | {"head.bias": np.ones(5, np.float32)}
        save_file(changed | self.stats, self.weights)
        for read in (certificates.line, certificates.stated, certificates.check):
            with self.assertRaisesRegex(ValueError, "ours.safetensors is not the file that ours.c"):
                read(self.weights)
        certificates.beside(self.weights).write_text('{"files": 3}')
        with self.assertRaisesRegex(ValueError, "ours.certificate.json is damaged .*; remove it"):
            certificates.line(self.weights)

    def test_import_writes_it(self):
        out = self.folder / "imported"
        arguments = [str(self.theirs), "--model=xcit_n12", f"--out={out}", "--image-size=32"]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            import_weights.main([*arguments, "--num-classes=5"])
        self.assertIn("certificate: agrees with", printed.getvalue())
        self.assertRegex(certificates.line(out), "weights.certificate.json: agrees with")
        self.assertIsNotNone(weights_folder.about(out))
        with contextlib.redirect_stdout(io.StringIO()):  # again, into the same folder
            import_weights.main([*arguments, "--num-classes=5"])

    def test_import_of_something_else_leaves_nothing(self):
        out = self.folder / "imported"
        arguments = [str(self.theirs), "--model=xcit_n12", f"--out={out}", "--image-size=32"]
        with mock.patch.object(certificate, "_faults", lambda *unused, **options: ["wrong"]):
            ended = command_calls.ended(
                lambda: import_weights.main([*arguments, "--num-classes=5"])
            )
        self.assertEqual(ended.code, 3)
        self.assertIn("nothing is written", ended.error)
        self.assertFalse(out.exists())


def _numpy(path: Path):
    from safetensors.numpy import load_file

    return load_file(path)


INTERN = {"depths": (1,), "dims": (8,), "groups": (2,), "stem_widths": (4, 8), "head_dim": 10}


class ExportTest(Case):
    """Deformable convolutions go out to `grid_sample`, and the export's own file is certified."""

    def exported(self, name, size, options):
        sizes = {"num_classes": 10, "image_size": size}
        weights = self.folder / "ours.safetensors"
        params, stats = drawn(name, **sizes, **options)
        save_file(params | stats, weights)
        given = [f"--weights={weights}", f"--model={name}", f"--image-size={size}"]
        given.append(f"--options={ {'scan': True} | options }")
        out = self.folder / "out"
        with contextlib.redirect_stdout(io.StringIO()):
            export_weights.main([*given, "--layout=module", f"--out={out}", "--nocertificate"])
            command.main([*given, f"--against={out / name}.py"])
        found = json.loads(certificates.beside(weights).read_text())
        self.assertTrue(found["agrees"], found["faults"])
        self.assertEqual(found["reference"]["network"], f"the exported {name}.py")
        self.assertLess(found["logits"]["float32"]["relative"], 1e-5)
        self.assertLess(found["logits"]["float64"]["relative"], 1e-9)
        self.assertLess(found["gradients"]["float64"]["relative"], 1e-7)
        return found

    @pytest.mark.slow
    def test_a_small_internimage(self):
        self.exported("internimage_t", 12, INTERN)

    @parameterized.parameters("internimage_t", "internimage_t_ps")
    @pytest.mark.matrix
    def test_internimage(self, name):
        found = self.exported(name, 64, {})
        self.assertEqual(found["names"]["equal"], len(models.torch_keys(name)))


@pytest.mark.matrix
class SlowReferenceTest(Case):
    """timm's and RobustBench's own networks, at their sizes."""

    def test_timm(self):
        params, stats = drawn("xcit_n12", num_classes=10)
        ours = Network("xcit_n12", params, stats, 10, 64, {})
        found = self.certified(ours, reference(ours, self.folder))
        self.assertTrue(found["agrees"], found["faults"])
        self.assertStartsWith(found["reference"]["network"], "timm 1.")
        self.assertTrue(found["reference"]["independent"])

    def test_robustbench(self):
        from jaxrobust.publish import layouts, torch_networks

        try:
            torch_networks.import_robustbench()
        except ImportError as error:
            self.skipTest(str(error))
        key = "Singh2023Revisiting_ViT-S-ConvStem"
        params, stats = drawn("vit_s_cvst", normalised=True)
        ours = Network("vit_s_cvst", params, stats, 1000, 224, {})
        file = layouts.stage(self.folder, ours, "drawn", key)
        found = self.certified(ours, references.reference(ours, file, key))
        self.assertTrue(found["agrees"], found["faults"])
        self.assertStartsWith(found["reference"]["network"], "robustbench 1.")
