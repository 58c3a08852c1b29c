"""The run that another one starts from, told by its config: where it is, and whether it is one."""

import json
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.config import VERSION, plain
from jaxrobust.runtime.commandline import arguments
from jaxrobust.weights.store import weights_folder
from jaxrobust.weights.trained import start_run
from jaxrobust.weights.trained.start_run import StartRun
from tests.support import runs, sweeps


def config(weights=None, **changes):
    """The small config of all runs, which starts from weights; `section__key` changes it."""
    made = runs.tiny(**changes).unlock()
    made.init.weights = weights
    return made


class ChainTest(absltest.TestCase):
    def chain(self, first, workdir="runs/robust", **configs):
        loaded = []

        def load(named):
            loaded.append(named)
            if named not in configs:
                raise ValueError("there is no such config")
            return configs[named]

        with mock.patch.object(arguments, "load_config", load):
            found = start_run.chain(first, Path(workdir))
        self.assertEqual(loaded, [run.named for run in found])
        return found

    def test_the_nearest_comes_first(self):
        own = {"a": config("run:b:x,y=1"), "b:x,y=1": config("runs/other")}
        found = self.chain(config("run:a"), **own)
        self.assertEqual([run.named for run in found], ["a", "b:x,y=1"])
        self.assertEqual([run.folder for run in found], [Path("runs/a"), Path("runs/b-x-y=1")])
        self.assertEqual([run.config.init.weights for run in found], ["run:b:x,y=1", "runs/other"])
        self.assertEqual(found[1].words, "init.weights=run:b:x,y=1")
        for weights in (None, "runs/a", "a.safetensors"):
            self.assertEmpty(self.chain(config(weights)))

    def test_a_run_does_not_start_from_itself(self):
        with self.assertRaisesRegex(
            ValueError, "init.weights=run:robust is the run in runs/robust"
        ):
            self.chain(config("run:robust"))
        own = {"a": config("run:b"), "b": config("run:a")}
        with self.assertRaisesRegex(ValueError, "init.weights=run:a is the run in runs/a itself"):
            self.chain(config("run:a"), **own)
        with self.assertRaisesRegex(ValueError, "init.weights=run:c: there is no such config"):
            self.chain(config("run:c"))

    def test_what_is_of_the_machine_is_taken_over(self):
        """Along the whole chain; what is of the training is not."""
        first = config("run:a")
        first.data.update(dir="/images", workers=7, strict=True, max_damaged=3, name="mine")
        first.data.update(train_split="train[:9]", selection_split="s", test_split="t")
        first.mesh.fsdp, first.log.every_steps, first.log.to = 2, 11, "wandb"
        first.trouble.update(skips=5, rollbacks=6, lr=0.25)
        first.attack.epsilon, first.seed, first.data.augmentation = 0.3, 9, "none"
        found = self.chain(first, a=config("run:b"), b=config())
        for run in found:
            made = run.config
            for section in ("mesh", "trouble"):
                self.assertEqual(plain(made)[section], plain(first)[section])
            of = (
                "dir",
                "workers",
                "strict",
                "max_damaged",
                "name",
                "train_split",
                "selection_split",
            )
            for key in (*of, "test_split", "classes"):
                self.assertEqual(made.data[key], first.data[key], key)
            self.assertEqual((made.log.every_steps, made.log.to), (11, "wandb"))
            own = (made.attack.epsilon, made.seed, made.data.augmentation)
            self.assertEqual(own, (0.1, 0, "crop"))
            self.assertTrue(made.is_locked)

    def test_images_of_other_classes_or_channels_are_not(self):
        for key, value in (("num_classes", 3), ("in_channels", 3)):
            own = config()
            own.model[key] = value
            first = config("run:a")
            first.data.update(name="mine", train_split="all", workers=7)
            (found,) = self.chain(first, a=own)
            self.assertEqual(found.config.data.name, "digits")
            self.assertEqual(found.config.data.train_split, "train[:256]")
            self.assertEqual(found.config.data.workers, 7)


class StateTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir()) / "a"
        self.config = config()

    def write(self, made=None, best=(), tested=()):
        self.folder.mkdir(exist_ok=True)
        own = {"version": VERSION} | json.loads((made or self.config).to_json())
        (self.folder / "config.json").write_text(json.dumps(own))
        for place in best:
            (self.folder / place).mkdir(parents=True)
        lines = "".join(json.dumps({"weights": words}) + "\n" for words in tested)
        (self.folder / "results.jsonl").write_text(lines)

    def state(self):
        return start_run.state(StartRun("a", self.folder, self.config))

    def test_absent_begun_and_finished(self):
        self.assertEqual(self.state(), "absent")
        self.folder.mkdir()
        self.assertEqual(self.state(), "absent")
        both = ["pretrain/best/8", "train/best/12"]
        for best, tested, expected in (
            ([], [], "begun"),
            (both, [], "begun"),
            (both, ["pretrain, step 8, ema"], "begun"),
            (both, ["training, step 12, ema"], "begun"),
            (["pretrain/best/8"], ["train, step 12, ema"], "begun"),
            (both, ["pretrain, step 8, ema", "train, step 12, ema"], "finished"),
        ):
            self.write(best=best, tested=tested)
            self.assertEqual(self.state(), expected, (best, tested))
            for place in best:
                (self.folder / place).rmdir()

    @sweeps.rows(
        ("model__image_size", 16, "model.image_size is 16 there, 8 in the config"),
        ("train__epochs", 9, "train.epochs is 9 there, 3 in the config"),
        ("train__objective", "clean", "train.objective is 'clean' there, 'adversarial' in"),
        ("pretrain__epochs", 0, "pretrain.epochs is None there, 2 in the config"),
    )
    def test_another_run_is_in_the_folder(self, key, value, message):
        self.write(config(**{key: value}))
        said = f"run:a: the run in .*/a has a different config: .*{message}"
        with self.assertRaisesRegex(ValueError, said):
            self.state()

    def test_options_and_starts(self):
        other = config("runs/x")
        other.model.options.update(drop_path=0.5, bn_group=4)
        self.write(other)
        found = start_run.differences(self.folder, self.config)
        self.assertLen(found, 2, found)  # not the images of a batch norm
        self.assertIn("init.weights is 'runs/x' there, None in the config", found)
        self.assertIn("model.options.drop_path is 0.5 there, None in the config", found)

    def test_what_changes_no_network(self):
        for key, value in (("train__lr", 0.5), ("data__workers", 3), ("attack__steps", 7)):
            self.write(config(**{key: value}))
            self.assertEmpty(start_run.differences(self.folder, self.config), key)

    def test_an_imported_folder_is_what_it_was_imported_from(self):
        self.config = config("convnext_tiny.fb_in1k")
        imported = self.folder.parent / "imported"
        imported.mkdir()
        self.write(config(str(imported)))
        for about, same in (
            ({"source": "hf://timm/convnext_tiny.fb_in1k"}, True),
            ({"source": "other", "published_id": "convnext_tiny.fb_in1k"}, True),
            ({"source": "hf://timm/convnext_tiny.fb_in1k", "drawn": {"seed": 1}}, False),
            ({"source": "other"}, False),
            (None, False),
        ):
            with mock.patch.object(weights_folder, "about", lambda folder, about=about: about):
                found = start_run.differences(self.folder, self.config)
            self.assertEqual(found == [], same, (about, found))
        self.write(config("nowhere"))
        self.assertLen(start_run.differences(self.folder, self.config), 1)


class NameTest(parameterized.TestCase):
    @sweeps.rows(
        (None, None), ("", None), ("runs/run:a", None), ("run:", ""), ("run:a:b,c=1", "a:b,c=1")
    )
    def test_named(self, weights, expected):
        self.assertEqual(start_run.named(weights), expected)

    def test_folder(self):
        self.assertEqual(start_run.folder("a:b,c=1", Path("x/y")), Path("x/a-b-c=1"))
