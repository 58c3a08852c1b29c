"""What loaders say of the certificate next to weights, and whose weights a file says it holds."""

import hashlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized
from safetensors.numpy import save_file

from jaxrobust.weights.store import certificates, hashes, weights_folder
from jaxrobust.weights.store.hashes import file_sha256
from tests.support import sweeps

NUMBERS = {
    "reference": {"network": "timm 1.0.9", "independent": True},
    "logits": {
        "float32": {"relative": 1.21e-6},
        "float64": {"relative": 3e-14},
        "top1_agreement": 0.875,
    },
    "gradients": {"float32": {"cosine": 0.5}, "float64": {"cosine": 0.99999912}},
    "agrees": True,
    "faults": [],
}


class CertificateTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())
        self.file = self.folder / "net.pt"
        self.file.write_bytes(b"weights")

    def write(self, weights=None, whose="ours", **changes):
        weights = weights or self.file
        digest = file_sha256(weights)
        other = {"name": "y", "sha256": "0"}
        files = {"ours": other, "theirs": other, whose: {"name": "x", "sha256": digest}}
        content = {"model": "resnet18", "options": {"depths": [1]}, "files": files} | NUMBERS
        path = certificates.beside(weights)
        path.write_text(json.dumps(content | changes))
        return path

    def test_summary(self):
        numbers = (
            "logits differ by 1.2e-06 (float32) and 3.0e-14 (float64), top-1 agrees for 88%, "
            "cosine of input gradients 0.999999"
        )
        self.assertEqual(certificates.summary(NUMBERS), f"agrees with timm 1.0.9: {numbers}")
        ours = {"reference": {"network": "x.py", "independent": False}, "agrees": False}
        found = certificates.summary(NUMBERS | ours | {"faults": ["a off", "b off"]})
        self.assertEqual(found, f"DIFFERS FROM x.py (not independent): {numbers}; a off; b off")
        found = certificates.summary(NUMBERS | {"reference": None, "missing": "no torch"})
        self.assertEqual(found, "not compared with a reference: no torch")

    def test_line_and_network(self):
        self.assertEqual(certificates.beside(self.file).name, "net.certificate.json")
        self.assertIsNone(certificates.line(self.file))
        self.assertIsNone(certificates.stated(self.file))
        for whose in ("ours", "theirs"):  # of either of the files that were compared
            path = self.write(whose=whose)
            self.assertStartsWith(certificates.line(self.file), f"{path.name}: agrees with timm")
            self.assertEqual(certificates.stated(self.file), ("resnet18", {"depths": [1]}))
        self.file.write_bytes(b"others")
        for read in (certificates.line, certificates.stated, certificates.check):
            with self.assertRaisesRegex(ValueError, "net.pt is not the file that net.certificate"):
                read(self.file)

    def test_of_a_folder(self):
        about = {"architecture": "vit_s", "options": {"depth": 2}, "num_classes": 3}
        about |= {"image_size": 32, "in_channels": 3}
        folder = self.folder / "imported"
        weights_folder.write(folder, {"a": np.zeros(2, np.float32)}, {}, about)
        self.assertEqual(certificates.stated(folder), ("vit_s", {"depth": 2}))
        self.assertIsNone(certificates.line(folder))
        self.write(folder / weights_folder.WEIGHTS)
        self.assertStartsWith(certificates.line(folder), "weights.certificate.json: agrees with")
        self.assertEqual(certificates.stated(folder), ("vit_s", {"depth": 2}))

    def test_a_folders_own_options_come_first(self):
        folder = Path(self.create_tempdir())
        for about, expected in (
            ({"architecture": "vit_s", "options": {"depth": 2}}, ("vit_s", {"depth": 2})),
            ({"architecture": "vit_s", "options": {}}, ("vit_s", {})),
            ({"architecture": "vit_s", "options": None}, "the file's"),
            (None, "the file's"),
        ):
            with (
                mock.patch.object(certificates.weights_folder, "about", return_value=about),
                mock.patch.object(
                    certificates.weights_folder, "stated", return_value="the file's"
                ) as stated,
            ):
                self.assertEqual(certificates.stated(folder), expected)
            if expected == "the file's":
                stated.assert_called_once_with(folder / certificates.WEIGHTS)

    def test_what_the_file_says_itself_comes_first(self):
        file = self.folder / "net.safetensors"
        network = json.dumps({"architecture": "vit_s", "options": {}})
        save_file({"a": np.zeros(2, np.float32)}, file, metadata={"jaxrobust.network": network})
        self.write(file)
        self.assertEqual(certificates.stated(file), ("vit_s", {}))

    @sweeps.rows(
        ({"files": 3},),
        ({"files": {"ours": {}}},),
        ({"logits": {}},),
        ({"options": None},),
    )
    def test_damaged(self, changes):
        path = self.write(**changes)
        with self.assertRaisesRegex(ValueError, f"{path.name} is damaged .*; remove it"):
            certificates.line(self.file)
        path.write_text("{")
        with self.assertRaisesRegex(ValueError, "is damaged"):
            certificates.stated(self.file)

    @sweeps.rows(
        # What is stored says it; fields that make no other network do not matter.
        (None, ("resnet18", {"small_stem": True}), {"small_stem": True}),
        ({}, ("resnet18", {}), {}),
        ({"drop_path": 0.5}, ("resnet18", {"small_stem": True}), {"small_stem": True}),
        ({"small_stem": True, "drop_path": 0.5}, None, {"small_stem": True}),
        (None, None, {}),
        ({"small_stem": True}, ("resnet18", {"small_stem": True}), {"small_stem": True}),
        # Another name of the same network.
        (None, ("cifar_resnet50", {}), None),
    )
    def test_options(self, given, stored, expected):
        if expected is None:
            found = certificates.options("resnet50", {"small_stem": True}, stored, "here")
            self.assertEqual(found, {"small_stem": True})
            return
        self.assertEqual(certificates.options("resnet18", given, stored, "here"), expected)

    @sweeps.rows(
        ({}, ("resnet18", {"small_stem": True})),
        ({"small_stem": True}, ("resnet18", {})),
        (None, ("resnet50", {})),
        (None, ("cifar_resnet50", {})),
    )
    def test_options_that_contradict(self, given, stored):
        with self.assertRaisesRegex(ValueError, "^here describes its network as .*not .*resnet18"):
            certificates.options("resnet18", given, stored, "here")


ARRAYS = {"a": np.arange(4, dtype=np.float32), "b": np.zeros(1, np.float32)}


class HashesTest(parameterized.TestCase):
    def test_weights_are_hashed_in_the_order_of_their_names(self):
        a, b = ({key: array} for key, array in ARRAYS.items())
        found = hashes.weights_sha256(a, b)
        self.assertEqual(hashes.weights_sha256(b, a), found)
        self.assertEqual(hashes.weights_sha256(b | a, {}), found)
        text = b"a float32 (4,)" + ARRAYS["a"].tobytes() + b"b float32 (1,)" + bytes(4)
        self.assertEqual(found, hashlib.sha256(text).hexdigest())

    @sweeps.rows(
        {"a": np.arange(4, dtype=np.int32)},
        {"a": np.arange(4, dtype=np.float32).reshape(2, 2)},
        {"a": np.arange(1, 5, dtype=np.float32)},
        {"c": np.zeros(1, np.float32)},
    )
    def test_whatever_differs_is_another_hash(self, **changes):
        known = hashes.weights_sha256(ARRAYS, {})
        self.assertNotEqual(hashes.weights_sha256(ARRAYS | changes, {}), known)

    def test_configs_and_classes(self):
        one, other = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
        self.assertEqual(hashes.config_sha256(one), hashes.config_sha256(other))
        text = b'{"a": 1, "b": {"c": 2, "d": 3}}'
        self.assertEqual(hashes.config_sha256(one), hashlib.sha256(text).hexdigest())
        digest = hashlib.sha256(b"cat\ndog\n").hexdigest()
        self.assertEqual(hashes.classes_sha256(["cat", "dog"]), digest)
        self.assertNotEqual(hashes.classes_sha256(["dog", "cat"]), digest)
        self.assertIsNone(hashes.classes_sha256([]))
