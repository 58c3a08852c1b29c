"""Flags as people write them: fractions, dicts, options, repetitions, and configs that fail."""

import contextlib
import logging
import sys
from unittest import mock

from absl.testing import parameterized

from jaxrobust.commands.conversion import certificate, export_weights, import_weights
from jaxrobust.data.prepare import imagenet
from jaxrobust.runtime.commandline import arguments
from tests.support import command_calls, paths, sweeps
from tests.support.command_line import parsed, refused

ROOT = paths.ROOT
QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}"
OWN = {"dims": (32, 64, 128), "stem_strides": (1,)}


class ValuesTest(parameterized.TestCase):
    @sweeps.rows(
        (["--config.attack.epsilon=8/255"], 8 / 255),
        (["--config.attack.epsilon", "8/255"], 8 / 255),
        (["--config.attack.epsilon= 8/255"], 8 / 255),
        (["--config.attack.epsilon=8/255."], 8 / 255),
        (["--config.attack.epsilon=8./255"], 8 / 255),
        (["--config.attack.epsilon=-1/2"], -0.5),
    )
    def test_fractions(self, words, expected):
        self.assertEqual(parsed(QUICKSTART, *words).config.attack.epsilon, expected)

    def test_a_fraction_in_a_file_of_flags(self):
        file = self.create_tempfile(content="--config.attack.epsilon=1/4\n")
        known = parsed(QUICKSTART, f"--flagfile={file.full_path}")
        self.assertEqual(known.config.attack.epsilon, 0.25)

    def test_both_spellings_of_a_flag_work_and_one_is_shown(self):
        for word in ("--image-size=3", "--image_size=3"):
            parser = arguments.Arguments("Tests.")
            parser.flag("image_size", type=int, help="Pixels.")
            self.assertEqual(parser.parse_args([word]).image_size, 3)
        shown = parser.format_help()
        self.assertIn("  --image_size  Pixels.", shown)
        self.assertNotIn("--image-size", shown)

    @sweeps.rows("8/255,0.5,12", "(8/255, 0.5, 12)")
    def test_several_norms_and_a_radius_each(self, radii):
        words = ["--config.attack.norm=Linf,l2,'L1'", f"--config.attack.epsilon={radii}"]
        words += [f"--config.attack.step_size={radii}", "--config.attack.mix=worst"]
        attack = parsed(QUICKSTART, *words).config.attack
        self.assertEqual(attack.step_size, attack.epsilon)
        self.assertEqual(attack.norm, ("linf", "l2", "l1"))
        self.assertEqual((attack.epsilon, attack.mix), ((8 / 255, 0.5, 12.0), "worst"))
        changed = ["--config.train.changes.attack={'norm': ['L2', 'l1'], 'epsilon': [0.5, 12]}"]
        changes = parsed(QUICKSTART, *changed).config.train.changes.attack
        self.assertEqual(tuple(changes.norm), ("l2", "l1"))

    def test_the_norm_of_an_attack_in_any_spelling(self):
        words = ["--config.attack.norm=L2", "--config.train.changes.attack.norm=Linf"]
        config = parsed(QUICKSTART, *words).config
        self.assertEqual(config.attack.norm, "l2")
        self.assertEqual(config.train.changes.attack.norm, "linf")
        self.assertEqual(parsed(QUICKSTART, "--config.attack.norm=l3").config.attack.norm, "l3")

    def test_a_text_key_is_unset(self):
        words = ["--config.init.weights=convnext_tiny.fb_in1k", "--config.init.weights=None"]
        values = [parsed(QUICKSTART, word).config.init.weights for word in words]
        self.assertEqual(values, ["convnext_tiny.fb_in1k", None])

    @sweeps.rows("1/0", "8/255/2", "8/", "eight")
    def test_what_is_no_number_is_named(self, value):
        said = refused(lambda: parsed(QUICKSTART, f"--config.attack.epsilon={value}"))
        self.assertRegex(said, f"--config.attack.epsilon={value} is not a number")
        with self.assertRaisesRegex(ValueError, f"--epsilon={value} is not a number"):
            arguments.number("epsilon", value)

    def test_changes_of_a_phase(self):
        words = ["--config.train.changes.attack.epsilon=8/255", "--config.train.changes.model.x=y"]
        words += ["--config.train.changes={'attack': {'steps': 3}}"]
        config = parsed(QUICKSTART, *words).config
        expected = {"attack": {"epsilon": 8 / 255, "steps": 3}, "model": {"x": "y"}}
        self.assertEqual(config.train.changes.to_dict(), expected)

    @sweeps.rows(
        (["--config.model.options={'drop_path': 0.1}"], OWN | {"drop_path": 0.1}),
        (["--config.model.options", '{"scan": true}'], OWN | {"scan": True}),
        (["--config.model.options={'dims': (8, 16, 32)}"], OWN | {"dims": (8, 16, 32)}),
        (["--config.model.options={}"], OWN),
        (["--config.model.options.drop_path=0.1"], OWN | {"drop_path": 0.1}),
        (["--config.model.options.drop_path", "1/4"], OWN | {"drop_path": 0.25}),
        (["--config.model.options.activation=gelu"], OWN | {"activation": "gelu"}),
        (["--config.model={'options': {'scan': True}}"], OWN | {"scan": True}),
    )
    def test_options_are_merged_with_those_of_the_config(self, words, expected):
        config = parsed(QUICKSTART, *words).config
        self.assertEqual(config.model.options.to_dict(), expected)
        self.assertTrue(config.is_locked)

    def test_a_dict_leaves_the_rest_of_its_section(self):
        attack = parsed(
            QUICKSTART, "--config.attack={'norm': 'l2', 'step_size': None}"
        ).config.attack
        self.assertEqual((attack.norm, attack.epsilon, attack.steps), ("l2", 0.1, 5))

    @sweeps.rows(
        ("--config.model.options={'drop_path': ", "is not a dict; write one such as"),
        ("--config.model.options={3: 4}", "is not a dict; write one such as"),
        ("--config.model.options=3", "`3` is not a dict"),
        (
            "--config.attack={'epsilonn': 1}",
            "unknown config key 'epsilonn'; did you mean 'epsilon'",
        ),
        ("--config.attack={'steps': 'x'}", "Could not override field 'steps'"),
    )
    def test_damaged_dicts(self, word, message):
        said = refused(lambda: parsed(QUICKSTART, word))
        self.assertIn(message, said)
        self.assertEqual(said.count("\n"), 1)


class EmptyTest(parameterized.TestCase):
    @sweeps.rows("--norm=", "-norm=")
    def test_a_value_that_is_empty(self, word):
        """Of an unset variable, which would be taken for no flag at all."""
        said = refused(lambda: parsed(QUICKSTART, word))
        self.assertIn(f"{word} is empty; give a value, or leave it out", said)


class OnceTest(parameterized.TestCase):
    @sweeps.rows(
        (["--norm", "linf", "--norm", "l2"], "norm"),
        (["--norm=linf", "-norm=linf"], "norm"),
        (["--multihost", "--nomultihost"], "multihost"),
        ([QUICKSTART], "config"),
        (["--config.attack.norm=l2", "--config.attack.norm=l1"], "config.attack.norm"),
        (["--config.attack={'norm': 'l2'}", "--config.attack.norm=l2"], None),
        (
            ["--config.attack={'norm': 'l2'}", "--config.attack={'norm': 'l1'}"],
            "config.attack.norm",
        ),
        (["--config.data.strict", "--noconfig.data.strict"], "config.data.strict"),
        (
            ["--config.model.options={'scan': 1}", "--config.model.options.scan=2"],
            "config.model.options.scan",
        ),
    )
    def test_a_flag_that_is_given_twice(self, words, name):
        said = refused(lambda: parsed(QUICKSTART, *words))
        name = name or "config.attack.norm"
        self.assertIn(f"--{name} is given more than once; give it once", said)

    @sweeps.rows(import_weights, export_weights, certificate, imagenet)
    def test_tools_too(self, tool):
        said = refused(lambda: tool.main(["a.pt", "--image-size=1", "--image_size", "2"]))
        self.assertIn("--image_size is given more than once; give it once", said)


class RecipeTest(parameterized.TestCase):
    @sweeps.rows("quickstart", "quickstart.py", "configs/quickstart", "configs/quickstart.py")
    def test_a_recipe_is_found_from_any_folder(self, given):
        with contextlib.chdir(self.create_tempdir().full_path):
            for words in ([f"--config={given}"], ["--config", given], ["-config", given]):
                config = parsed(*words, "--config.seed=3").config
                self.assertEqual((config.data.name, config.seed), ("digits", 3))

    def test_an_own_file_comes_first(self):
        folder = self.create_tempdir()
        text = "import beside\nfrom jaxrobust.config import base\n\n\ndef get_config():\n"
        folder.create_file("configs/quickstart.py", content=f"{text}    return beside.own(base())")
        own = "def own(config):\n    config.seed = 9\n    return config"
        folder.create_file("configs/beside.py", content=own)
        path = list(sys.path)
        try:
            with contextlib.chdir(folder.full_path):
                self.assertEqual(parsed("--config=configs/quickstart.py").config.seed, 9)
        finally:
            sys.path[:] = path
            sys.modules.pop("beside", None)

    def test_none(self):
        for given, meant in (
            ("quikstart", "did you mean quickstart?"),
            ("configs/nothing.py", "give a file, or one of aligned_study, "),
            ("../configs/quickstart.py", "no such file"),
        ):
            with contextlib.chdir(self.create_tempdir().full_path):
                said = refused(lambda given=given: parsed("--config", given))
            self.assertIn(f"jaxrobust: {given}: no such file; ", said)
            self.assertIn(meant, said)
            self.assertEqual(said.count("\n"), 1)

    @sweeps.rows(
        ("", "no config given; give a file, or one of aligned_study"),
        (
            "quickstart",
            "quickstart is both a bundled recipe and a file here; write configs/quickstart.py for "
            "the recipe, or quickstart.py",
        ),
        ("birds", "birds: no such file; did you mean birds.py?"),
        ("bidrs.py", "bidrs.py: no such file; did you mean birds.py?"),
        ("runs", "runs is a folder; name a config such as birds.py"),
        ("owls", "owls is a folder; name owls.py, or repeat the command that began the run"),
    )
    def test_what_is_here_too(self, given, words):
        folder = self.create_tempdir()
        for name in ("quickstart.py", "birds.py", "runs/1/config.json", "owls.py", "owls/a"):
            folder.create_file(name)
        with contextlib.chdir(folder.full_path):
            self.assertIn(words, refused(lambda: parsed("--config", given)))


class ConfigFileTest(parameterized.TestCase):
    @sweeps.rows(
        ("import nowhere", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("x = (", r"c d.py, line 1: '\(' was never closed; correct the file"),
        ("x = 3", "c d.py defines no get_config"),
        ("def get_config():\n  return None", "c d.py returns a NoneType; return a ConfigDict"),
        ("def get_config():\n  return {'seed': 0}", "c d.py returns a dict; return a ConfigDict"),
        ("def get_config():\n  return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        ("def half():\n  1 / 0\ndef get_config():\n  half()", "line 2: ZeroDivisionError"),
        (
            "from jaxrobust.config import base\ndef get_config():\n  base().train.epocs = 3",
            "line 3: unknown config key 'epocs'; did you mean 'epochs'",
        ),
        (
            "from jaxrobust.config import base\ndef get_config():\n  base().train.epochs = 'x'",
            "line 3: TypeError: Could not override field 'epochs'",
        ),
    )
    def test_a_config_that_fails_is_one_sentence(self, text, message):
        file = self.create_tempfile("ä/c d.py", content=text)
        said = refused(lambda: parsed(f"--config={file.full_path}"))
        self.assertRegex(said, message)
        self.assertEqual(said.count("\n"), 1)


class EndingTest(parameterized.TestCase):
    """What a command ends with, and the sentence that it says then."""

    def ended(self, error: BaseException, solved: str = "", place=None) -> command_calls.Ended:
        def call():
            with arguments.ending("run the same command to continue", solved):
                raise error

        with mock.patch.object(arguments.functions, "of_users", return_value=place):
            return command_calls.ended(call)

    @sweeps.rows(
        (KeyboardInterrupt(), 130, "interrupted; run the same command to continue"),
        (ValueError("a wrong word"), 2, "a wrong word"),
        (OSError("a full disk"), 3, "a full disk. Try again"),
        (
            MemoryError("Unable to allocate 9 GiB for an array with shape (3,)"),
            3,
            "this machine has too little memory (Unable to allocate 9 GiB); use smaller "
            "images, or fewer. Try again",
        ),
    )
    def test_code_and_sentence(self, error, code, said):
        self.assertEqual(self.ended(error, ". Try again"), (code, "", f"jaxrobust: {said}\n"))

    def test_memory_of_which_nobody_knows_how_much(self):
        self.assertIn("(the amount is unknown)", self.ended(MemoryError()).error)

    @sweeps.rows(BrokenPipeError, KeyError, ZeroDivisionError)
    def test_what_no_sentence_helps_with_is_raised(self, error):
        with self.assertRaises(error):
            self.ended(error())

    @sweeps.rows(TypeError("x"), ValueError("x"))
    def test_a_fault_of_the_users_code_is_a_mistake(self, error):
        found = self.ended(error, place="net.py, line 3: x")
        self.assertEqual((found.code, found.error), (2, "jaxrobust: net.py, line 3: x\n"))

    @sweeps.rows((False, ""), (True, '{"a": 1}\n'))
    def test_what_a_command_returns_is_printed_if_it_is_asked_for(self, json, out):
        def call():
            given = mock.Mock(json=json)
            self.assertEqual(arguments.answer(lambda args: {"a": 1}, given, ""), {"a": 1})

        self.assertEqual(command_calls.ended(call), (0, out, ""))


class WordsTest(parameterized.TestCase):
    @sweeps.rows(("all", 0), ("1", 1), (7, 7))
    def test_how_many(self, text, count):
        self.assertEqual(arguments.how_many("n", text), count)

    @sweeps.rows("0", "-1", "1.5", "some", "", 0)
    def test_no_number_of_images(self, text):
        said = f"^--n={text} is not a number of images; give 1 or more, or all$"
        with self.assertRaisesRegex(ValueError, said):
            arguments.how_many("n", text)

    @sweeps.rows(
        (None, None), ("{}", {}), ('{"a": true}', {"a": True}), ("{'a': (1, 2)}", {"a": (1, 2)}),
        (" {'a': None} ", {"a": None}),
    )  # fmt: skip
    def test_a_dict(self, text, value):
        self.assertEqual(arguments.mapping("options", text), value)

    def test_a_tree_by_its_dotted_keys(self):
        tree = {"a": 1, "b": {"c": {"d": 2}, "e": [3]}, "f": {}}
        self.assertEqual(arguments.flat(tree), {"a": 1, "b.c.d": 2, "b.e": [3]})
        self.assertEqual(arguments.flat({"a": 1}, "config."), {"config.a": 1})

    @sweeps.rows(
        ("configs/revisiting_at.py:vit_s_cvst,epochs=300", "revisiting_at-vit_s_cvst-epochs=300"),
        ("quickstart", "quickstart"),
        ("a/b.py:", "b"),
        ("b.py:x-y=0.5", "b-x-y=0.5"),
    )
    def test_the_folder_of_a_run(self, given, name):
        self.assertEqual(arguments.run_name(given), name)

    def test_only_what_looks_like_a_flag_is_taken_for_a_misspelled_one(self):
        parser = arguments.Arguments("A command.")
        parser.flag("size")
        for word, said in (
            ("--sise", "--sise is not a flag; did you mean --size? --help-all lists all flags"),
            ("unsize", "unsize is not a flag; --help-all lists all flags"),
            ("-x", "-x is not a flag; --help-all lists all flags"),
        ):
            self.assertEqual(refused(lambda word=word: parser.parse_args([word])).strip(),
                             f"jaxrobust: {said}")  # fmt: skip

    def test_libraries_are_quiet_unless_the_verbosity_is_named(self):
        levels, named = {}, mock.Mock(present=0)

        def logger(name="root"):
            return mock.Mock(setLevel=lambda level: levels.update({name: level}))

        with (
            mock.patch.object(arguments.flags, "FLAGS", {"verbosity": named}),
            mock.patch.object(arguments.logging, "getLogger", logger),
            mock.patch.object(arguments.absl_logging, "get_absl_logger", lambda: logger("absl")),
        ):
            arguments.quiet_libraries()
            quiet = {"root": logging.WARNING, "absl": logging.CRITICAL}
            self.assertEqual(levels, quiet | {"asyncio": logging.CRITICAL})
            levels.clear()
            named.present = 1
            arguments.quiet_libraries()
        self.assertEqual(levels, {})


class LoadedTest(parameterized.TestCase):
    """Configs that are read without flags."""

    def load(self, given: str):
        before = list(sys.path)
        try:
            return arguments.load_config(given)
        finally:
            self.added = [place for place in sys.path if place not in before]
            sys.path[:] = before

    def test_arguments_are_what_stands_behind_the_colon(self):
        text = "from ml_collections import ConfigDict\n"
        text += "def get_config(what='none'):\n    return ConfigDict({'what': what}).lock()\n"
        folder = self.create_tempdir()
        file = folder.create_file("deep/own.py", content=text).full_path
        self.assertEqual(self.load(file).what, "none")
        self.assertEqual(self.load(f"{file}:").what, "none")
        config = self.load(f"{file}:a,b=c:d")
        self.assertEqual(config.what, "a,b=c:d")
        config.new = 3  # it is not locked
        self.assertEqual(self.added, [f"{folder.full_path}/deep", folder.full_path])
