"""Images resized as arrays, against JAX's resize without antialiasing."""

from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.doctor import patient
from jaxrobust.doctor.findings import GREEN, RED
from jaxrobust.doctor.network_checks import NETWORK_CHECKS
from jaxrobust.doctor.patient import Patient
from tests.support import paths, sweeps


class ResizingTest(parameterized.TestCase):
    @sweeps.rows((40, 60, 20, 30, 16), (33, 21, 45, 28, 28), (16, 16, 16, 16, 16))
    def test_bilinear(self, height, width, rows, columns, crop):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        ours = patient.bilinear(image, rows, columns, crop)
        whole = jax.image.resize(
            image.astype(np.float32), (rows, columns, 3), "linear", antialias=False
        )
        top, left = round((rows - crop) / 2), round((columns - crop) / 2)
        theirs = whole[top : top + crop, left : left + crop]
        np.testing.assert_allclose(ours, theirs, atol=1e-3)  # of 255, float32

    def test_of_a_source(self):
        source = data.open_source("fake:40x40x3", "train")
        find = lambda how: patient.resized(  # noqa: E731
            source, np.arange(3), preprocessing=how, image_size=16
        )
        self.assertIsNone(find("none"))
        self.assertIsNone(find("Crop288"))
        found = find("bicubic-20-crop-16")
        self.assertEqual((found.shape, found.dtype), ((3, 16, 16, 3), np.float32))
        self.assertBetween(found.min(), 0, 1)
        prepared = data.Prepared(
            source, image_size=16, preprocessing="bicubic-20-crop-16", images=3
        )[np.arange(3)]
        self.assertBetween(np.abs(found - prepared).mean(), 1e-3, 0.3)  # aliased

    @sweeps.rows((19, 2), (21, 2), (23, 4), (20, 2), (16, 0))
    def test_the_centre_begins_at_half_the_rest_to_the_even(self, side, first):
        """Of rests of 3, 5 and 7 pixels the half is 2, 2 and 4: as torchvision crops."""
        image = np.arange(side * side, dtype=np.uint16).reshape(side, side, 1)
        cropped = patient.bilinear(image, side, side, 16)
        places = np.minimum(np.arange(first, first + 16), side - 1)
        np.testing.assert_array_equal(cropped, image[places][:, places])

    @sweeps.rows(
        ("75x41", "bicubic-20-crop-16", (36, 20)),  # the long side is cut to whole pixels: 36.6
        ("41x75", "bilinear-20-crop-16", (20, 36)),
        ("75x41", "Res16", (16, 16)),  # both sides, whatever their ratio
    )
    def test_the_sides_that_photographs_are_resized_to(self, shape, how, sides):
        source = data.open_source(f"fake:{shape}x3", "train")
        with mock.patch.multiple(patient, bilinear=mock.DEFAULT, _RESIZED=2) as replaced:
            replaced["bilinear"].return_value = np.zeros((16, 16, 3), np.float32)
            arrays = patient.resized(source, np.arange(9), preprocessing=how, image_size=16)
        calls = replaced["bilinear"].call_args_list
        self.assertEqual([call.args[1:] for call in calls], [(*sides, 16)] * 2)
        self.assertLen(arrays, 2)


class PhotographsTest(parameterized.TestCase):
    """A network that looks at fine detail, which resizing without antialiasing makes more of."""

    def setUp(self):
        super().setUp()
        photographs = paths.SHARED / "data" / "imagenet_samples"
        if not photographs.is_dir():
            self.skipTest(paths.NO_SHARED)
        folder = Path(self.create_tempdir())
        (folder / "train").symlink_to(photographs)
        source = data.open_source(f"folder:{folder}", "train")
        places = np.arange(0, len(source), 4)  # 50 of 200, which take two seconds
        how = {"preprocessing": "bicubic-72-crop-64", "image_size": 64}
        self.pil = data.Prepared(source, images=len(source), **how)[places]
        self.arrays = patient.resized(source, places, **how)

    @pytest.mark.slow
    def test_weights_of_either(self):
        (check,) = [check for check in NETWORK_CHECKS if check.name == "resizing"]
        for trained_on, level in ((self.arrays, RED), (self.pil, GREEN)):
            ends = np.quantile(sharpness(trained_on), np.linspace(0, 1, 11)[1:-1])
            labels = np.digitize(sharpness(trained_on), ends)
            network = partial(sharpest, centres=np.concatenate([[0], ends]))
            seen = check.look(Patient(network, self.pil, labels, arrays=self.arrays))
            self.assertEqual(seen.level, level, seen)
        self.assertGreater(np.abs(self.arrays - self.pil).mean() * 255, 3)


def sharpness(images):
    """The mean difference of neighboring pixels, in 255ths."""
    return 255 * np.abs(np.diff(images, axis=1)).mean(axis=(1, 2, 3))


def sharpest(images, *, centres):
    """The class is the number of centers that an image's sharpness exceeds."""
    sharp = 255 * jnp.abs(jnp.diff(images, axis=1)).mean(axis=(1, 2, 3))[:, None]
    return jnp.cumsum(sharp - jnp.asarray(centres, jnp.float32)[None], axis=1)
