"""How much a config has to do, on data that is here and on data that is not."""

from absl.testing import parameterized

from jaxrobust.attacks import fixed_steps
from jaxrobust.config import phase
from jaxrobust.doctor.estimate import work
from jaxrobust.training import build
from tests.support import sweeps
from tests.support.estimates import imagenet


class WorkTest(parameterized.TestCase):
    def test_a_data_set_that_is_not_here_has_its_published_size(self):
        first, second = work.work(imagenet())
        self.assertIsNone(first.train.source)
        self.assertEqual(first.rows, 1_281_167)
        self.assertEqual(first.steps, 100 * (1_281_167 // 1024))
        self.assertEqual(second.steps, 50 * (1_281_167 // 1024))
        self.assertEqual((first.selections, second.selections), (100, 50))
        self.assertEqual(first.probes, 0)  # nothing is attacked
        self.assertEqual(second.probes, second.steps // 1000)
        self.assertEqual(second.evaluated("evaluation"), 4000)
        self.assertEqual(second.evaluated("test"), 5000)

    def test_the_last_epoch_is_evaluated_whatever_its_number(self):
        config = imagenet()
        config.evaluation.every_epochs = 3
        self.assertEqual([part.selections for part in work.work(config)], [34, 17])

    @sweeps.rows(
        ("cifar10", "train[:90%]", 45_000),
        ("cifar100", "test", 10_000),
        ("cifar10:3.0.2", "test@robustbench[:1000]", 1_000),
        ("imagenet2012", "validation", 50_000),
        ("imagenet2012", "validation@robustbench[:100]", 100),
    )
    def test_known_sizes(self, name, split, images):
        config = imagenet()
        config.data.update(name=name, test_split=split)
        config.model.num_classes = 1000 if name == "imagenet2012" else 10
        self.assertEqual(work.split(config, "test_split"), work.SizedSplit(images, None))

    def test_some_classes_have_their_share_of_the_published_images(self):
        """Two of CIFAR-10's ten classes, whatever the number of outputs is."""
        config = imagenet()
        classes = self.create_tempfile("two.txt", "airplane\ntruck\n").full_path
        config.data.update(name="tfds:cifar10", test_split="test[:50%]", classes=classes)
        config.model.num_classes = 2
        self.assertEqual(work.split(config, "test_split"), work.SizedSplit(1_000, None))

    def test_an_epoch_is_over_with_the_first_source(self):
        """Of 128 rows a second source has 32: 96 are of the first, or 48 images in two views."""
        config = imagenet()
        config.data.update(extra="npz:/nowhere.npz", extra_share=0.25, views=2)
        config.train.batch_size = 128
        first = work.work(config)[-1]
        self.assertEqual(first.rows, round(1_281_167 * 2 / 0.75))
        self.assertEqual(first.steps, 50 * (1_281_167 // 48))

    def test_an_epoch_that_the_config_counts(self):
        """Neither source has to be here; what does not fit is refused where both are."""
        config = imagenet()
        config.data.update(extra="generated:/nowhere", extra_share=0.7, epoch_images=98 * 512)
        config.train.batch_size = 512
        self.assertEqual(work.work(config)[-1].rows, 98 * 512)
        config.data.update(name="digits", train_split="train", selection_split="train[:64]")
        config.data.update(test_split="test", extra_share=0.5)
        config.model.update(num_classes=10, in_channels=1)
        self.assertEqual(work.work(config)[-1].rows, 98 * 512)
        config.data.extra, config.data.extra_split = "digits", "train"
        with self.assertRaisesRegex(ValueError, "extra_share=1.0 leaves no image of"):
            config.data.extra_share = 1.0
            work.work(config)

    def test_data_that_is_here_is_counted(self):
        config = imagenet()
        config.data.update(name="digits", train_split="train[:50%]")
        config.model.update(num_classes=10, in_channels=1)
        found = work.split(config, "train_split")
        self.assertEqual(found.images, len(found.source))

    @sweeps.rows(
        ({"data.name": "flowers_that_nobody_knows"}, "flowers"),
        ({"data.name": "folder:/nowhere"}, "/nowhere"),
        ({"train.batch_size": 0}, "train.batch_size=0 must be at least 1, at"),
        ({"train.batch_size": 1281168}, "train.batch_size=1281168 must be at least 1, at"),
    )
    def test_is_refused(self, changes, message):
        config = imagenet()
        config.update_from_flattened_dict(changes)
        with self.assertRaisesRegex(ValueError, message):
            work.work(config)

    def test_images_and_passes_of_an_evaluation(self):
        part = work.work(imagenet())[1]
        part.config.evaluation.update(attack="pgd-5", steps=9)
        part.config.test.update(steps=7)
        passes = fixed_steps.parse("pgd-5")
        passes = 2 + passes.forward + passes.backward
        per_image = build.forward_flops(part.config)
        for key, count in (("evaluation", passes), ("test", 2 + 2 * 7 + 1)):
            flops = work.evaluation_flops(part, key)
            self.assertAlmostEqual(flops, per_image * count * part.evaluated(key))
        small = part._replace(selection=work.SizedSplit(100, None))
        for images, evaluated in ((0, 100), (30, 30), (300, 100)):
            part.config.evaluation.images = images
            self.assertEqual(small.evaluated("evaluation"), evaluated)

    def test_phases_have_their_own_size_and_steps(self):
        config = imagenet()
        config.phases = ("low", "train")
        config.low = phase(epochs=5, objective="adversarial")
        config.low.changes = {"model": {"image_size": 112}, "attack": {"steps": 1}}
        low, train = work.work(config)
        self.assertEqual((low.config.model.image_size, low.config.attack.steps), (112, 1))
        self.assertEqual((train.config.model.image_size, train.config.attack.steps), (224, 2))
