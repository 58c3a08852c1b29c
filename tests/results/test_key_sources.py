"""`jaxrobust why`: every value of a recipe that is not a default has a source."""

import importlib
import json
from pathlib import Path
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.config import base
from jaxrobust.results import key_sources
from jaxrobust.results.key_sources import ConfigKey
from tests.support.commands import run_command
from tools.generate import refresh_configs

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted({name.partition(":")[0] for name in refresh_configs.names()})
# Recipes of papers, whose docstrings have the keys of a line. Studies say what they change.
DOCUMENTED = (
    *("cifar_aat", "cifar_aligned", "cifar_bat", "convnext_b_cvst", "convnext_t_cvst"),
    *("convstem_pretraining", "generated_data", "larger_radius", "light_ablation", "light_recipe"),
    *("revisiting_at", "several_norms", "transfer", "vit_b_cvst", "vit_s_cvst"),
)
REFRESH = "run `python tools/generate/refresh_configs.py` and review the difference"


def keys_of(name):
    recipe = importlib.import_module(f"configs.{name.partition(':')[0]}")
    return key_sources.of_config(refresh_configs.load(name), recipe.SOURCES)


def own_config():
    config = base()
    config.train.update(lr=0.5, epochs=3)
    config.attack.epsilon = 0.5
    config.model.options = {"dims": (1, 2)}
    return config


class SourcesTest(parameterized.TestCase):
    def test_each_value_that_is_no_default_has_a_source(self):
        for name in refresh_configs.names():
            with self.subTest(name=name):
                keys = [key for key in keys_of(name) if not key.default]
                self.assertNotEmpty(keys)
                self.assertEmpty([key.name for key in keys if key.source is None])

    @parameterized.parameters(*RECIPES)
    def test_each_source_is_of_a_key_and_names_a_place(self, recipe):
        """A name that no row has any more would explain nothing."""
        rows = [name for name in refresh_configs.names() if name.partition(":")[0] == recipe]
        known = {key.name for row in rows for key in keys_of(row)} | {"model.options"}
        known |= {key.rpartition(".")[0] for key in known}
        for pattern, source in importlib.import_module(f"configs.{recipe}").SOURCES.items():
            self.assertTrue(source.startswith(key_sources.PLACES), source)
            fitting = [key for key in known if key_sources.fits(key, pattern)]
            self.assertTrue(fitting or pattern.startswith("pretrain."), pattern)

    def test_each_default_with_a_source_is_one(self):
        keys = {key.name for key in keys_of("quickstart")}
        self.assertEmpty(key_sources.DEFAULTS.keys() - keys)
        for source in key_sources.DEFAULTS.values():
            self.assertTrue(source.startswith(key_sources.PLACES), source)

    def test_a_name_without_stars_counts_before_those_with_and_later_ones_before_earlier(self):
        sources = {"*": "ours", "train.lr": "Table 1", "train.*": "Table 2", "model": "Table 3"}
        keys = {key.name: key for key in key_sources.of_config(own_config(), sources)}
        self.assertEqual(keys["train.lr"].source, "Table 1")
        self.assertEqual(keys["train.epochs"].source, "Table 2")
        self.assertEqual(keys["model.options.dims"].source, "Table 3")
        self.assertEqual(keys["attack.epsilon"].source, "ours")
        self.assertEqual(keys["train.b2"], ("train.b2", 0.95, "authors' code: 0.95", True))

    def test_fgsm_has_one_step(self):
        config = own_config()
        for name, steps in (("apgd", 2), ("pgd", 2), ("fgsm", 1), ("nowhere", 2)):
            config.attack.name = name
            keys = {key.name: key for key in key_sources.of_config(config, {})}
            self.assertEqual(keys["attack.steps"].value, steps, name)


def docstring(recipe):
    return importlib.import_module(f"configs.{recipe}").__doc__


class BothValuesTest(absltest.TestCase):
    """Where papers and their code differ, the source says both values."""

    def test_both(self):
        for recipe, key, *values in (
            ("revisiting_at:convnext_t", "train.ema_decay", "0.9999", "A.1 and A.2: 0.999"),
            ("revisiting_at:convnext_t", "train.batch_size", "A.3: 1392", "ours: 1408"),
            ("convnext_b_cvst", "train.batch_size", "A.3: 756", "ours: 768"),
            (
                "revisiting_at:vit_m",
                "train.batch_size",
                "appendix A.3: the value for medium networks",
            ),
            (
                *("revisiting_at:convnext_t,augmentation=basic", "data.augmentation"),
                *("Table 1: basic, a random crop", "of 8 to 100% of the image, resized, without a"),
            ),
            (
                *("transfer:xcit_s12,cifar10", "data.augmentation"),
                *("no mention of erasing (authors' code: 0.2 at the time, 0 in later runs)",),
            ),
        ):
            with self.subTest(row=(recipe, key)):
                (source,) = [one.source for one in keys_of(recipe) if one.name == key]
                for value in values:
                    self.assertIn(value, source)


class DocstringsTest(parameterized.TestCase):
    def test_which_have_keys(self):
        found = {name for name in RECIPES if refresh_configs.ASKED.search(docstring(name))}
        self.assertEqual(found, set(DOCUMENTED))

    def test_keys_are_those_of_the_config(self):
        for recipe in DOCUMENTED:
            with self.subTest(recipe=recipe):
                said = docstring(recipe)
                asked = refresh_configs.ASKED.findall(said)
                self.assertNotEmpty(asked)
                for given in asked:
                    self.assertEqual(given.partition(":")[0], f"configs/{recipe}.py")
                    self.assertIn(f"`jaxrobust why {given}`:\n\n    ", said, REFRESH)
                self.assertEqual(said, refresh_configs.explained(said), REFRESH)

    def test_keys_are_written_where_they_are_asked_for(self):
        asked = "Keys that are not defaults, by `jaxrobust why quickstart`:\n"
        for below in ("", "\n    seed  3: Table 1\n          and more\n"):
            made = refresh_configs.explained(f"What.\n\n{asked}{below}\nThe rest.\n\n    a table\n")
            start, _, rest = made.partition(asked)
            self.assertEqual(start, "What.\n\n")
            self.assertRegex(rest, r'^\n    model\.name +"convnext_n": ours: a first result')
            self.assertEndsWith(rest, "half\n\nThe rest.\n\n    a table\n")
            self.assertNotIn("seed", rest)
            self.assertLessEqual(max(map(len, made.splitlines())), refresh_configs.COLUMNS)
            self.assertEqual(refresh_configs.explained(made), made)

    def test_a_line_that_there_is_not(self):
        asked = "Keys that are not defaults, by `jaxrobust why light_recipe:xcit_s13`:\n"
        with self.assertRaisesRegex(ValueError, "model=xcit_s13 is not a valid value"):
            refresh_configs.explained(asked)
        self.assertEqual(refresh_configs.explained("No keys.\n"), "No keys.\n")


class CommandTest(absltest.TestCase):
    def answer(self, *words):
        return run_command(["why", *words], ROOT)

    def test_a_recipe(self):
        code, out, _ = self.answer("configs/larger_radius.py:convnext_t_cvst")
        self.assertEqual(code, 0)
        self.assertIn(
            'init.weights           "Singh2023Revisiting_ConvNeXt-T-ConvStem": Table 4', out
        )
        self.assertIn("train.lr               0.0001: appendix A.5\n", out)
        self.assertNotIn("train.final_lr", out)

    def test_a_docstring_has_what_it_prints(self):
        _, out, _ = self.answer("configs/light_recipe.py:xcit_s12")
        self.assertIn(" ".join(out.split()), " ".join(docstring("light_recipe").split()))

    def test_a_key_a_section_and_all(self):
        recipe = "configs/cifar_bat.py:wrn_28_10"
        _, out, _ = self.answer(recipe, "train.clip_norm")
        self.assertEqual(out, "train.clip_norm  5.0: authors' code: 5\n")
        _, out, _ = self.answer(recipe, "mesh")
        self.assertEqual(out, "mesh.fsdp  1: a default\n")
        _, out, _ = self.answer(recipe, "--all")
        self.assertIn("\nattack.norm", out)

    def test_what_the_command_line_changes(self):
        words = ["configs/vit_s_cvst.py", "train", "--config.train.lr=0.5", "--json"]
        _, out, _ = self.answer(*words)
        keys = json.loads(out)
        self.assertEqual(keys["train.lr"]["source"], "the command line")
        self.assertEqual(keys["train.lr"]["value"], 0.5)
        self.assertTrue(keys["train.b2"]["default"])
        words = ["configs/vit_s_cvst.py", "attack.loss", "--config.attack.loss=my_losses.py:margin"]
        _, out, _ = self.answer(*words)
        self.assertEqual(out, 'attack.loss  "my_losses.py:margin": the command line\n')

    def test_a_key_that_is_none(self):
        code, _, error = self.answer("configs/vit_s_cvst.py", "train.lrr")
        self.assertEqual(code, 2)
        self.assertIn("train.lrr is not a key of this config; did you mean train.lr?", error)

    def test_a_recipe_that_says_nothing(self):
        folder = Path(self.create_tempdir().full_path)
        text = "from jaxrobust.config import base\ndef get_config():\n    config = base()\n"
        (folder / "own.py").write_text(text + "    config.seed = 3\n    return config\n")
        _, out, _ = self.answer(str(folder / "own.py"))
        self.assertEqual(out, "seed  3: no source is given\n")
        (folder / "plain.py").write_text(text + "    return config\n")
        code, out, _ = self.answer(str(folder / "plain.py"))
        self.assertEqual(code, 0)
        self.assertEqual(out, "every key has its default; name one to see its value and source\n")


class KeysTest(parameterized.TestCase):
    """What `jaxrobust why` shows of the keys of a config."""

    KEYS = (
        ConfigKey("train.lr", 0.5, "Table 1", False),
        ConfigKey("train.l1", 0.0, None, True),
        ConfigKey("train.epochs", 9, "section 4.2", True),
        ConfigKey("trainer", "x", None, False),
    )

    def names(self, name=None, everything=False):
        return [key.name for key in key_sources.chosen(self.KEYS, name, everything)]

    def test_which(self):
        every = [key.name for key in self.KEYS]
        self.assertEqual(self.names(), ["train.lr", "trainer"])
        self.assertEqual(self.names(everything=True), every)
        self.assertEqual(self.names("train"), every[:3])  # a section, with its defaults
        self.assertEqual(self.names("train.l1"), ["train.l1"])
        with self.assertRaisesRegex(
            ValueError, "train.l is not a key of this config; did you mean"
        ):
            self.names("train.l")

    def test_text(self):
        self.assertEqual(
            key_sources.text(self.KEYS, 80).splitlines(),
            [
                "train.lr      0.5: Table 1",
                "train.l1      0.0: a default",
                "train.epochs  9: section 4.2 (the default, as in the main paper)",
                'trainer       "x": no source is given',
            ],
        )
        lines = key_sources.text(self.KEYS[3:], 30).splitlines()
        self.assertEqual(lines[1][:6], " " * 6)
        self.assertLessEqual(max(map(len, lines)), 30)

    def test_sources_of_a_file(self):
        file = self.create_tempfile("own.py", "SOURCES = {'a': 'Table 1'}\n").full_path
        self.assertEqual(key_sources.of_recipe(f"{file}:words"), {"a": "Table 1"})
        none = self.create_tempfile("none.py", "x = 1\n").full_path
        self.assertEqual(key_sources.of_recipe(none), {})

    def test_what_the_command_line_changes(self):
        for changed, own in (
            (("train",), ["train.lr", "train.steps"]),
            (("train.lr",), ["train.lr"]),
            (("train.l",), []),
            ((), []),
        ):
            with self.subTest(row=(changed, own)):
                config = {"train": {"lr": 0.5, "steps": 3}, "lr": 1}
                with (
                    mock.patch.object(key_sources, "plain", lambda config: config),
                    mock.patch.object(key_sources, "base", lambda: {"train": {"lr": 0.5}}),
                ):
                    keys = key_sources.of_config(config, {"*": "ours"}, changed)
                found = [key.name for key in keys if key.source == key_sources.COMMAND_LINE]
                self.assertEqual(found, own)
                self.assertEqual([key.default for key in keys], [True, False, False])
