"""Where data is missing, the message names the shortest way to get it."""

import os
import tempfile
from unittest import mock

from absl.testing import parameterized

from jaxrobust import data
from jaxrobust.data.sources import tfds
from jaxrobust.data.splits import storage
from tests.support import sweeps


class MessageTest(parameterized.TestCase):
    @sweeps.rows(
        ("cifar10", "", "`jaxrobust prepare cifar10`"),
        ("cifar100:3.0.2", "", "`jaxrobust prepare cifar100`"),
        ("cifar10", "/data/x", "`jaxrobust prepare cifar10 --out /data/x`"),
        ("imagenet2012", "/data/x", "`jaxrobust prepare imagenet SOURCE --out /data/x`"),
        ("cifar10", "gs://b/x", "`jaxrobust prepare cifar10 --out DIR`, then `gcloud storage cp -r "
         "DIR/cifar10 gs://b/x/`"),
        ("svhn_cropped", "/data/x", "`tfds build svhn_cropped --file_format=array_record "
         "--data_dir=/data/x` (in an environment with TensorFlow, which reading does not need)"),
    )  # fmt: skip
    def test_the_shortest_way_that_works(self, name, root, expected):
        with mock.patch.object(storage.importlib.util, "find_spec", return_value=True):
            place = storage.place(root or tfds.data_directory())
        self.assertEqual(tfds.build_command(name, place), expected)

    def test_missing_data(self):
        with tempfile.TemporaryDirectory() as home:
            for place in (home, f"{home}/nowhere"):
                with mock.patch.dict(os.environ, TFDS_DATA_DIR=place):
                    with self.assertRaisesRegex(data.DataError, "`jaxrobust prepare cifar10`"):
                        data.open_source("cifar10", "train")
                    with self.assertRaisesRegex(
                        data.DataError, f"`jaxrobust prepare imagenet SOURCE --out {place}`"
                    ):
                        data.open_source("imagenet2012", "train")
