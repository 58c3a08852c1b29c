"""What is known of data sets that are not here, against those that are."""

from absl.testing import parameterized

from jaxrobust.data import open_source
from jaxrobust.data.splits import known_sizes
from tests.support import paths, sweeps


class SizesTest(parameterized.TestCase):
    @sweeps.rows(
        ("imagenet2012", "train", 1_281_167),
        ("imagenet2012", "val", 50_000),  # which means validation
        ("imagenet2012", "train[:90%]", 1_153_050),
        ("tfds:cifar10:3.0.2", "train[48000:48500]", 500),
        ("cifar100", "test", 10_000),
        ("oxford_flowers102", "train", 1_020),
        ("oxford_flowers102", "test", 6_149),
        ("caltech101", "train[:95%]", 2_906),
        ("cifar10", "validation", None),  # there is none
        ("cifar10", "train[:60000]", None),  # a mistake, which opening it tells
        ("imagenet2012", "validation@robustbench", None),
        ("digits", "train", None),
        ("cifar10", "train+test", None),
    )
    def test_known_images(self, dataset, split, images):
        self.assertEqual(known_sizes.known_images(dataset, split), images)

    def test_of_the_data_itself(self):
        folder = paths.SHARED / "data" / "tensorflow_datasets"
        if not folder.is_dir():
            self.skipTest(paths.NO_SHARED)
        for split, images in known_sizes.IMAGES["cifar10"].items():
            source = open_source("cifar10", split, data_dir=str(folder))
            self.assertEqual(
                (len(source), source.num_classes), (images, known_sizes.CLASSES["cifar10"])
            )
