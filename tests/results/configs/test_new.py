"""A config for somebody's images: what it holds, that it trains, and what is refused."""

import itertools
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import parameterized
from PIL import Image

from jaxrobust.commands.configure import new
from jaxrobust.data.sources import registry
from jaxrobust.results.configs import chosen_values, data_facts, refusals
from jaxrobust.results.stages import checks
from jaxrobust.runtime.commandline.arguments import load_config
from tests.support import command_calls
from tests.support.commands import run_command


def photographs(folder: Path, classes=("owl", "robin", "wren"), each=10, sides=(70, 90)) -> Path:
    """Write noise of growing height, in class folders."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 256, (sides[0] + i, sides[1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


class FolderCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        before = os.getcwd()
        os.chdir(self.folder)
        self.addCleanup(os.chdir, before)

    def refused(self, *words) -> str:
        code, out, said = command_calls.words(new.main, *words)
        self.assertEqual((code, out), (2, ""), said)
        lines = [line for line in said.splitlines() if not line.endswith(" ...")]
        lines = [line for line in lines if not line.startswith("WARNING: ")]
        self.assertLen(lines, 1, said)
        return lines[0]


class WrittenTest(FolderCase):
    def test_a_folder_of_photographs(self):
        photographs(Path("birds"))
        code, out, _ = command_calls.words(new.main, "mine/birds.py", "--data", "birds", "--json")
        self.assertEqual(code, 0)
        self.assertEqual(json.loads(out.splitlines()[-1])["values"]["model.num_classes"], "3")
        config = load_config("mine/birds.py")
        model = config.model
        self.assertEqual((model.name, model.image_size), ("convnext_n_cvst", 64))
        # Images of several sizes have to be resized.
        self.assertEqual(config.data.augmentation, "resized-crop-flip")
        keys = ("train_split", "selection_split", "test_split")
        splits = [registry.open_source(config.data.name, config.data[key]) for key in keys]
        self.assertEqual([len(split) for split in splits], [21, 3, 6])
        for split in splits:  # of each class alike
            self.assertLen(set(np.bincount(split.labels).tolist()), 1)
        files = [set(Path(f"mine/birds.{k}.txt").read_text().split()) for k in ("train", "test")]
        self.assertEmpty(files[0] & files[1])
        found = refusals.review(config, devices=1)
        self.assertEqual((found.refused, found.warned), ([], []))
        self.assertLen(found.memory, 2)
        self.assertRegex(
            out, r"without compilation\): training \d[^;\n]+\nnext: jaxrobust check mine/b"
        )

        said = self.refused("mine/birds.py", "--data", "birds")
        self.assertIn("mine/birds.py already exists", said)

    def test_the_name_of_a_data_set(self):
        for place, name in (
            ("CIFAR-10", "cifar10"),
            ("ImageNet-1k", "imagenet2012"),
            ("torch/cifar10", "cifar10"),
            ("digits", "digits"),
            ("birds/wild", "folder:birds/wild"),
        ):
            with self.subTest(row=(place, name)):
                self.assertEqual(data_facts.named(place), name)
                Path(place).mkdir(parents=True)  # which is there, so it is meant
                self.assertEqual(data_facts.named(place), f"folder:{place}")

    def test_paths_with_spaces_are_quoted(self):
        """A user copies the commands from the output and from the config."""
        photographs(Path("my birds"))
        with mock.patch.object(checks, "lines", return_value=[]):
            out = command_calls.words(new.main, "my birds/a b.py", "--data", "my birds").out
        commands = "jaxrobust check 'my birds/a b.py'", "jaxrobust train 'my birds/a b.py'"
        for command in commands:
            self.assertIn(command, out)
            self.assertIn(command, Path("my birds/a b.py").read_text())

    def test_a_data_set_by_its_name_elsewhere(self):
        """What is missing is named as ours, with what brings it."""
        self.enter_context(mock.patch.dict(os.environ, TFDS_DATA_DIR=str(self.folder)))
        self.assertRegex(self.refused("a.py", "--data=CIFAR-10"), "cifar10.*jaxrobust prepare")

    def test_splits_that_are_there(self):
        photographs(Path("birds/train"))
        photographs(Path("birds/val"), each=2)
        facts = data_facts.look("birds", config=Path("b.py"))
        self.assertEqual(facts.splits["test"], "validation")
        self.assertEqual(facts.splits["selection"], "train@b.selection.txt")
        photographs(Path("birds/test"), each=2)
        facts = data_facts.look("birds", config=Path("b.py"))
        self.assertEqual((*facts.splits.values(),), ("train", "validation", "test"))
        self.assertEqual((facts.images, facts.lists), (30, {}))

    def test_images_of_one_size_are_cropped(self):
        """A folder was said to have several sizes, so that its images were resized."""
        rng = np.random.default_rng(0)
        for place, sides in (("small", (32, 32)), ("wide", (32, 40))):
            for name, i in itertools.product("ab", range(6)):
                path = Path(place) / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (*sides, 3), np.uint8)
                Image.fromarray(pixels).save(path)
        for place, same in (("small", True), ("wide", False)):
            facts = data_facts.look(f"folder:{place}", config=Path("b.py"))
            self.assertEqual((facts.same_size, facts.sides), (same, (32, 32, 32)))

    def test_a_split_with_other_classes_is_refused(self):
        photographs(Path("birds/train"))
        photographs(Path("birds/val"), classes=("owl", "emu"))
        with self.assertRaisesRegex(registry.DataError, r"train has no class folder for emu \(1\)"):
            data_facts.look("birds", config=Path("b.py"))

    def test_mixed_arrays_are_cut_into_parts(self):
        labels = np.tile(np.arange(4), 50)
        np.savez("mine.npz", images=np.zeros((200, 28, 28), np.uint8), labels=labels)
        facts = data_facts.look("mine.npz", config=Path("b.py"))
        self.assertEqual(
            (*facts.splits.values(),), ("all[0%:70%]", "all[70%:80%]", "all[80%:100%]")
        )
        self.assertEqual((facts.images, facts.channels, facts.sides), (140, 1, (28, 28, 28)))
        values = dict((line.key, line.value) for line in lines(facts))
        self.assertEqual(values["data.augmentation"], "crop")  # no mirrored signs
        self.assertEqual((values["model.in_channels"], values["model.image_size"]), (1, 28))

    def test_arrays_are_divided_in_each_class(self):
        """A shuffled file whose last fifth lacks a class was called sorted, and refused."""
        labels = np.repeat(np.arange(4), 10)
        np.savez("sorted.npz", x=np.zeros((40, 28, 28, 3), np.uint8), y=labels)
        facts = data_facts.look("sorted.npz", config=Path("b.py"))
        places = []
        for name, size in (("train", 7), ("selection", 1), ("test", 2)):
            Path(f"b.{name}.txt").write_text("\n".join(facts.lists[f"b.{name}.txt"]))
            part = registry.open_source("npz:sorted.npz", facts.splits[name])
            np.testing.assert_array_equal(np.bincount(part.labels), [size] * 4)
            self.assertIsNotNone(part.files_sha256)
            places += facts.lists[f"b.{name}.txt"]
        self.assertCountEqual(map(int, places), range(40))

    def test_large_photographs_start_from_public_weights(self):
        photographs(Path("birds"), each=8, sides=(300, 260))
        facts = data_facts.look("birds", config=Path("b.py"))
        values = dict((line.key, line.value) for line in lines(facts))
        self.assertEqual(values["model.image_size"], 224)
        self.assertEqual(values["init.weights"], "convnext_tiny.fb_in1k")
        self.assertEqual(values["attack.epsilon"], "4 / 255")

    def test_threats(self):
        for norm, epsilon, steps in (("linf", "8 / 255", 5), ("l2", "0.5", 2), ("l1", "12", 2)):
            with self.subTest(row=(norm, epsilon, steps)):
                facts = data_facts.look("digits", config=Path("b.py"))
                values = dict((line.key, line.value) for line in lines(facts, norm=norm))
                seen = values["attack.norm"], values["attack.epsilon"], values["attack.steps"]
                self.assertEqual(seen, (norm, epsilon, steps))


def lines(facts, **named):
    return chosen_values.lines(facts, chosen_values.NetworkChoice(**named))


class RefusedTest(FolderCase):
    @parameterized.parameters(
        ("empty", "has no folders; arrange its files"),
        ("one", "only has the class owl (1); a classifier needs at least two"),
        ("deep", "deep/a contains folders instead of images; name the folder that holds"),
        ("few", "class owl of data set 'folder:few', split 'all' has 3 images, too few for"),
        ("notes.txt", "notes.txt is not an .npz file; give a folder of class folders"),
        ("nowhere/at/all", "does not exist or cannot be read"),
        ("broken", "is damaged"),
        ("digitz", "digitz"),
    )
    def test_data(self, place, message):
        Path("empty").mkdir()
        photographs(Path("one"), classes=("owl",))
        photographs(Path("deep/a"), each=1)
        photographs(Path("deep/b"), each=1)
        photographs(Path("few"), each=3)
        Path("notes.txt").write_text("no image")
        photographs(Path("broken"))
        for file in Path("broken").rglob("*.png"):
            file.write_text("no image")
        self.assertIn(message, self.refused("c.py", "--data", place))
        self.assertFalse(Path("c.py").exists())

    def test_flags(self):
        for words, message in (
            (
                ("c.txt", "--data", "digits"),
                "c.txt is not a Python file; choose a name that ends in",
            ),
            (("c.py",), "name the images with --data"),
            (("c.py", "--data", "digits", "--epsilon", "0"), "--epsilon=0 must be above 0"),
            (("c.py", "--data", "digits", "--torch_args", '{"a": 1}'), "name the network too"),
            (
                ("c.py", "--data", "digits", "--torch", "a.py:f", "--from", "w.pt"),
                "leave --from and --model out",
            ),
            (("c.py", "--data", "digits", "--from", "w.pt"), "w.pt"),
        ):
            with self.subTest(row=(words, message)):
                self.assertIn(message, self.refused(*words))

    def test_a_network_that_does_not_export(self):
        Path("nets.py").write_text(
            "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
            "        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))\n\n\n"
            "def build():\n    return Net()\n"
        )
        said = self.refused("c.py", "--data", "digits", "--torch", "nets.py:build")
        self.assertIn("nets.py", said)


class CheckTest(FolderCase):
    def test_every_refusal_at_once(self):
        words = (
            *("quickstart", "--json", "--config.train.lr=-1"),
            *("--config.attack.norm=l3", "--config.data.name=folder:/nowhere"),
            *("--config.model.name=convnext_q", "--config.seed=-3"),
        )
        Path("notes.py").write_text("these are not words of Python\n")
        code, out, _ = run_command(["check", *words], self.folder)
        no_config = run_command(["check", "notes.py"], self.folder)
        self.assertEqual(code, 1)
        found = json.loads(out.splitlines()[-1])
        text = " ".join(found["refused"])
        for part in ("lr=-1", "l3", "/nowhere", "convnext_q", "seed=-3"):
            self.assertIn(part, text)
        self.assertEqual(found["memory"], [])
        self.assertEqual(out.count("refused  "), len(found["refused"]))

        self.assertEqual((no_config[0], no_config[1]), (2, ""))
        self.assertIn("notes.py", no_config[2])
        self.assertIn("notes.py, line 1: invalid syntax", no_config[2])

    def test_several_mistakes_of_one_part(self):
        """Training listed the next one only after the first was corrected."""
        config = load_config("quickstart")
        config.train.update(epochs=1, cooldown_epochs=3, microbatches=0)
        config.attack.warmup_epochs = 2
        keys = ("attack.warmup_epochs=2", "train.warmup_epochs=2", "train.cooldown_epochs=3")
        refused = refusals.review(config, devices=1).refused
        begins = [sentence.partition(" must be")[0] for sentence in refused]
        self.assertEqual(begins, [*keys, "train.microbatches=0"])
        config = load_config("quickstart")
        config.train.lr = -1.0
        self.assertEqual(refusals.parts_refused(config), ["train.lr=-1.0 must be above 0"])

    def test_the_end_is_how_long_the_training_takes(self):
        code, out, error = run_command(["check", "quickstart"], self.folder)
        self.assertEqual(code, 0, error)
        self.assertRegex(out.splitlines()[-1], r"^time  .*: training \d+\.\d (s|min)$")

    def test_memory_that_is_not_there(self):
        config = load_config("quickstart")
        with mock.patch.object(refusals, "_capacity", return_value=10**6):
            found = refusals.review(config, devices=8)
        self.assertEqual(found.refused, [])
        self.assertIn("lower train.batch_size, or set train.microbatches=2", found.memory[-1])
