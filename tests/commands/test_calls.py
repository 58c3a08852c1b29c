"""What commands make of their words: what they call, with what, what they print, how they end."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from absl.testing import absltest, parameterized

from jaxrobust.commands import compare, models, prepare, select, verify, why
from jaxrobust.commands.conversion import certificate, export_weights, import_weights
from jaxrobust.papers import scaling as rules
from jaxrobust.papers.commands import analyse, landscape, plan, reproduce, scaling, sparsity
from jaxrobust.runtime.devices import compilation
from tests.support import command_calls


class CallCase(parameterized.TestCase):
    def put(self, name: str, **how) -> mock.Mock:
        """Put a mock in the place of what a command calls."""
        return self.enter_context(mock.patch(f"jaxrobust.{name}", **how))

    def refused(self, main, *words) -> str:
        code, out, said = command_calls.words(main, *words)
        self.assertEqual((code, out, said.count("\n")), (2, "", 1), said)
        return said


class CompareTest(CallCase):
    def setUp(self):
        super().setUp()
        of = "results.comparison"
        self.load = self.put(f"{of}.evaluations.load", return_value="loaded")
        self.find = self.put(f"{of}.comparison_findings.find", return_value="found")
        plain = self.put(f"{of}.comparison_findings.plain", side_effect=lambda found: {"of": found})
        document = self.put(f"{of}.comparison_markdown.document", return_value="a page\n")
        self.seen, self.write = (plain, document), self.put(f"{of}.picture.write")

    def test_a_page_alone(self):
        ended = command_calls.words(compare.main, "a", "b#12")
        self.assertEqual(ended, (0, "a page\n", ""))
        self.load.assert_called_once_with(["a", "b#12"], None)
        self.find.assert_called_once_with("loaded")
        for mocked in self.seen:
            mocked.assert_called_once_with("found")
        self.write.assert_not_called()

    def test_files_and_json(self):
        words = ("a", "b", "c", "--threat=clean", "--out=there", "--json")
        code, out, _ = command_calls.words(compare.main, *words)
        self.assertEqual((code, out), (0, 'a page\n\n{"of": "found"}\n'))
        self.load.assert_called_once_with(["a", "b", "c"], "clean")
        self.write.assert_called_once_with(Path("there"), "comparison", "found", {"of": "found"})

    def test_pictures_that_cannot_be_drawn_are_refused_before_anything_is_read(self):
        self.put("results.plotting.plotting", side_effect=ValueError("no matplotlib"))
        self.assertIn("no matplotlib", self.refused(compare.main, "a", "b", "--out=there"))
        self.load.assert_not_called()
        self.assertEqual(command_calls.words(compare.main, "a", "b").code, 0)


class ModelsTest(CallCase):
    def setUp(self):
        super().setUp()
        self.put("models.available", return_value=["one", "two"])
        self.put("models.known", side_effect=self.known)
        for name in ("architecture", "record", "parameters"):
            self.put(f"models.table.{name}", side_effect=f"{name} of {{}}".format)
        self.put("models.table.line", side_effect="{} in {}".format)
        self.put("models.table.checkpoints", side_effect=lambda rows: f"checkpoints of {rows}")
        self.put("models.table.HEAD", new="head")
        self.put("models.table.NOTES", new="notes")
        size = mock.Mock(return_value=SimpleNamespace(columns=77))
        self.enter_context(mock.patch("shutil.get_terminal_size", size))

    def known(self, name: str) -> str:
        if name == "none":
            raise ValueError("there is no network 'none'")
        return name.lower()

    def printed(self, *words) -> list[str]:
        code, out, said = command_calls.words(models.main, *words)
        self.assertEqual((code, said), (0, ""))
        return out.splitlines()

    def test_all_have_notes(self):
        rows = [f"architecture of {name} in 77" for name in ("one", "two")]
        self.assertEqual(self.printed(), ["head", *rows, "notes"])

    def test_some_have_their_checkpoints(self):
        rows = ["architecture of two", "architecture of five"]
        lines = [f"{row} in 77" for row in rows]
        expected = ["head", *lines, f"checkpoints of {rows}"]
        self.assertEqual(self.printed("TWO", "five"), expected)
        self.assertEqual(self.printed("two")[-1], f"checkpoints of {rows[:1]}")

    def test_json(self):
        (line,) = self.printed("--json", "two")
        record = "record of architecture of two"
        self.assertEqual(json.loads(line), {"architectures": [record]})

    def test_parameters_go_before_all_else(self):
        expected = ["one", "parameters of one", "", "two", "parameters of two", ""]
        self.assertEqual(self.printed("--parameters", "--json"), expected)

    @parameterized.parameters((None, "cpu"), ("tpu", "tpu"))
    def test_nothing_computes_unless_a_platform_is_named(self, named, platform):
        seen = []
        self.put("models.table.architecture", side_effect=lambda name: seen.append(on()) or name)
        with mock.patch.dict(os.environ, {"JAX_PLATFORMS": named} if named else {}):
            if not named:
                os.environ.pop("JAX_PLATFORMS", None)
            self.printed("one")
        self.assertEqual(seen, [platform])

    def test_an_unknown_network(self):
        self.assertIn("there is no network 'none'", self.refused(models.main, "one", "none"))


def on() -> str | None:
    """Return the platform on which JAX would compute."""
    return os.environ.get("JAX_PLATFORMS")


class PlanTest(CallCase):
    def setUp(self):
        super().setUp()
        self.answer = self.put("papers.planning.answer.of", return_value="the plan")

    @parameterized.parameters((None, "cpu"), ("tpu", "tpu"))
    def test_nothing_computes_unless_a_platform_is_named(self, named, platform):
        self.answer.side_effect = lambda flags, made_by: on()
        with mock.patch.dict(os.environ, {"JAX_PLATFORMS": named} if named else {}):
            if not named:
                os.environ.pop("JAX_PLATFORMS", None)
            ended = command_calls.words(plan.main, "revisiting_at", "--on=h100:8")
        self.assertEqual(ended.out, f"{platform}\n")

    def test_what_is_planned(self):
        words = ("revisiting_at", "more", "runs/2", "--on=v5e:8x8", "--budget=1/2", "--table=2")
        words = (*words, "--row=ViT S", "--utilisation=0.4", "--write=there", "--estimates=e.jsonl")
        self.assertEqual(command_calls.words(plan.main, *words), (0, "the plan\n", ""))
        given, made_by = self.answer.call_args.args
        self.assertEqual(
            (given.paper, given.records), ("revisiting_at", (Path("more"), Path("runs/2")))
        )
        self.assertEqual((given.on, given.table, given.row), ("v5e:8x8", "2", "ViT S"))
        self.assertEqual((given.budget, given.utilisation), (0.5, 0.4))
        self.assertEqual((given.write, given.estimates), (Path("there"), Path("e.jsonl")))
        self.assertStartsWith(made_by, "jaxrobust plan revisiting_at more runs/2 --on=v5e:8x8")
        self.assertIn("'--row=ViT S'", made_by)  # as a shell reads it

    def test_what_is_not_given(self):
        command_calls.words(plan.main, "revisiting_at", "--on=h100:8")
        given = self.answer.call_args.args[0]
        self.assertEqual((given.budget, given.utilisation, given.write), (None, 0.2, None))
        self.assertEqual(given.estimates, Path("runs/estimates.jsonl"))

    @parameterized.parameters("--budget=0.001", "--utilisation=1", "--utilisation=0.001")
    def test_the_ends_of_a_range(self, word):
        ended = command_calls.words(plan.main, "revisiting_at", "--on=h100:8", word)
        self.assertEqual(ended.code, 0)

    @parameterized.parameters(
        ("revisiting", (), "revisiting is no paper; did you mean revisiting_at"),
        ("revisiting_at", ("--row=1",), "--row 1 is one of a table; name it with --table"),
        ("revisiting_at", ("--budget=0",), "--budget=0 must be above 0 hours"),
        ("revisiting_at", ("--budget=-1",), "--budget=-1 must be above 0 hours"),
        ("revisiting_at", ("--budget=inf",), "--budget=inf must be above 0 hours"),
        ("revisiting_at", ("--budget=nan",), "--budget=nan must be above 0 hours"),
        ("revisiting_at", ("--utilisation=0",), "must be above 0 and at most 1"),
        ("revisiting_at", ("--utilisation=1.01",), "must be above 0 and at most 1"),
    )
    def test_mistakes(self, paper, words, sentence):
        self.assertIn(sentence, self.refused(plan.main, paper, "--on=h100:8", *words))
        self.answer.assert_not_called()

    @parameterized.parameters((ValueError("no such table"), 2), (OSError("no such folder"), 3))
    def test_what_cannot_be_planned(self, error, code):
        self.answer.side_effect = error
        ended = command_calls.words(plan.main, "revisiting_at", "--on=h100:8")
        self.assertEqual((ended.code, ended.out), (code, ""))
        self.assertIn(str(error), ended.error)


class PrepareTest(CallCase):
    def test_the_rest_goes_to_the_command_of_the_data_set(self):
        for name in prepare.COMMANDS:
            with mock.patch.dict(prepare.COMMANDS, {name: mock.Mock()}):
                command_calls.words(prepare.main, name, "--out=there", "word")
                prepare.COMMANDS[name].assert_called_once_with(["--out=there", "word"])
                with mock.patch("sys.argv", ["prepare", "mnist", "--out=there"]):
                    prepare.main([name])
                prepare.COMMANDS[name].assert_called_with([])

    @parameterized.parameters(
        ("CIFAR-10", "cifar10"),
        ("torch/cifar100", "cifar100"),
        ("ImageNet-1k", "imagenet"),
        ("imagenet2012", "imagenet"),
    )
    def test_others_names_of_data_sets(self, word, name):
        with mock.patch.dict(prepare.COMMANDS, {name: mock.Mock()}):
            command_calls.words(prepare.main, word, "--out=there")
            prepare.COMMANDS[name].assert_called_once_with(["--out=there"])

    @parameterized.parameters("cifar10", "cifar100")
    def test_both_cifars_are_told_apart(self, name):
        self.assertEqual(prepare.COMMANDS[name].args, (name,))

    def test_help_and_mistakes(self):
        for word in ("-h", "--help"):
            ended = command_calls.words(prepare.main, word)
            self.assertEqual((ended.code, ended.out), (0, f"{prepare.__doc__}\n"))
        said = self.refused(prepare.main, "mnist")
        self.assertIn("prepare knows no data set 'mnist'; write one of imagenet, cifar10,", said)
        self.assertIn("prepare needs a data set; write one of", self.refused(prepare.main))
        none = self.refused(lambda: prepare.main([]), "cifar10")  # those of who calls it count
        self.assertIn("prepare needs a data set; write one of", none)


class ReproduceTest(CallCase):
    def setUp(self):
        super().setUp()
        self.answer = self.put("papers.tables.documents.answer", return_value="tables\n")

    def test_what_is_shown(self):
        ended = command_calls.words(reproduce.main)
        self.assertEqual(ended, (0, "tables\n", ""))
        none = {"paper": None, "table": None, "row": None, "out": None}
        self.answer.assert_called_once_with((), **none, commands=False, alike=False)
        words = ("a", "b", "--paper=p", "--table=2", "--row=3", "--out=there")
        command_calls.words(reproduce.main, *words, "--commands", "--alike")
        own = {"paper": "p", "table": "2", "row": "3", "out": Path("there")}
        places = (Path("a"), Path("b"))
        self.answer.assert_called_with(places, **own, commands=True, alike=True)

    @parameterized.parameters((ValueError("no such paper"), 2), (OSError("a full disk"), 3))
    def test_what_cannot_be_shown(self, error, code):
        self.answer.side_effect = error
        ended = command_calls.words(reproduce.main)
        self.assertEqual((ended.code, ended.out), (code, ""))
        self.assertIn(str(error), ended.error)


class ScalingTest(CallCase):
    def test_the_networks_of_a_study(self):
        rows = [
            rules.Studied("wrn_28_10", {"depths": (2, 3, 4)}, None),
            rules.Studied("wrn_28_10", {"depths": (4, 3, 2)}, 0.98765),
        ]
        study = self.put("papers.scaling.study", return_value=rows)
        words = ("2e9", "--study=ratio", "--block=robust", "--image_size=64", "--json")
        _, out, _ = command_calls.words(scaling.main, *words)
        study.assert_called_once_with("ratio", multiply_adds=2e9, block="robust", image_size=64)
        first, second, last = out.splitlines()
        config = "configs/cifar_bat.py:wrn_28_10,depths="
        self.assertEqual(first, f"wrn_28_10 {{'depths': (2, 3, 4)}}  # {config}2-3-4")
        self.assertEqual(
            second,
            "wrn_28_10 {'depths': (4, 3, 2)}  # 0.988 of the multiply-adds asked for; "
            f"{config}4-3-2",
        )
        found = json.loads(last)
        self.assertEqual(found["study"], "ratio")
        self.assertEqual([row["share"] for row in found["networks"]], [None, 0.98765])

    def test_mistakes(self):
        self.assertIn(
            "--image_size=0 must be at least 1", self.refused(scaling.main, "--image_size=0")
        )
        self.assertIn("bottle", self.refused(scaling.main, "--block=bottle"))
        self.assertIn("breadth", self.refused(scaling.main, "--study=breadth"))


class SelectTest(CallCase):
    def setUp(self):
        super().setUp()
        self.select = self.put("results.selection.choice.select", return_value={"step": 3})

    def settings(self, *words):
        ended = command_calls.words(select.main, "runs/1", *words)
        self.assertEqual((ended.code, ended.error), (0, ""))
        return self.select.call_args.args[0], ended.out

    def test_what_is_not_given(self):
        given, out = self.settings()
        self.assertEqual(out, "")
        self.assertEqual((given.run, given.phase, given.image_size), (Path("runs/1"), None, ()))
        self.assertEqual((given.attack, given.steps), ("apgd-ce", 10))
        self.assertEqual((given.split, given.n, given.batch), (None, 0, None))

    def test_what_is_given(self):
        words = ("--phase=train", "--image_size", "160", "224", "--split=test[:5]", "--n=7")
        given, out = self.settings(*words, "--batch=9", "--steps=3", "--json")
        self.assertEqual(json.loads(out), {"step": 3})
        self.assertEqual((given.phase, given.image_size), ("train", (160, 224)))
        self.assertEqual((given.split, given.n, given.batch), ("test[:5]", 7, 9))
        self.assertEqual(given.steps, 3)

    def test_autoattack_has_its_own_steps(self):
        given, _ = self.settings("--attack=autoattack")
        self.assertEqual((given.attack, given.steps), ("autoattack", None))
        said = self.refused(select.main, "runs/1", "--attack=autoattack", "--steps=10")
        self.assertIn("--steps are those of APGD-CE; leave it out of --attack autoattack", said)

    @parameterized.parameters("--steps=0", "--batch=0", "--image_size=0", "--n=0", "--attack=pgd")
    def test_mistakes(self, word):
        self.assertIn(word.partition("=")[0], self.refused(select.main, "runs/1", word))

    @parameterized.parameters((KeyboardInterrupt(), 130), (OSError("a full disk"), 3))
    def test_how_it_ends(self, error, code):
        self.select.side_effect = error
        self.assertEqual(command_calls.words(select.main, "runs/1").code, code)


class VerifyTest(CallCase):
    @parameterized.parameters((True, 0), (False, 1))
    def test_the_exit_code_says_whether_all_is_confirmed(self, whole, code):
        check = self.put("evaluation.questions.verification.verify", return_value={"whole": whole})
        words = ("there", "--weights=w", "--dataset=d", "--split=s", "--classes=c")
        words = (*words, "--data_dir=f", "--batch=3", "--frost=g", "--json")
        found = []
        ended = command_calls.words(lambda: found.append(verify.main()), *words)
        self.assertEqual((found, ended.out), ([code], json.dumps({"whole": whole}) + "\n"))
        (given,) = check.call_args.args
        own = {"bundle": Path("there"), "weights": "w", "function": None, "dataset": "d"}
        own |= {"split": "s", "classes": "c", "data_dir": "f", "batch": 3, "frost": "g"}
        own |= {"sample": 60, "seed": None}
        self.assertEqual(given._asdict(), own)

    def test_images_are_written_without_weights(self):
        write = self.put(
            "evaluation.questions.verification.write_images", return_value={"images": 3}
        )
        found = []
        words = ("there", "--write_images=x.npy")
        command_calls.words(lambda: found.append(verify.main()), *words)
        self.assertEqual(found, [0])
        given, file = write.call_args.args
        self.assertEqual((given.bundle, given.weights, file), (Path("there"), None, Path("x.npy")))


class WhyTest(CallCase):
    def setUp(self):
        super().setUp()
        self.configured = self.put("estimate.changes.configured", return_value="config")
        of = "results.key_sources"
        self.recipe = self.put(f"{of}.of_recipe", return_value="sources")
        self.of_config = self.put(f"{of}.of_config", return_value="keys")
        key = SimpleNamespace(name="train.lr", _asdict=lambda: {"value": 1})
        self.chosen = self.put(f"{of}.chosen", return_value=[key])
        self.text = self.put(f"{of}.text", return_value="lines")
        size = mock.Mock(return_value=SimpleNamespace(columns=66))
        self.enter_context(mock.patch("shutil.get_terminal_size", size))

    def test_keys_of_the_command_line_are_its_own(self):
        changes = ["--config.train.lr=2", "--noconfig.data.cache", "--config.seed", "3"]
        words = ("file.py:a", changes[0], "train", *changes[1:])
        self.assertEqual(command_calls.words(why.main, *words), (0, "lines\n", ""))
        self.configured.assert_called_once_with("file.py:a", changes)
        self.recipe.assert_called_once_with("file.py:a")
        names = ["train.lr", "data.cache", "seed"]
        self.of_config.assert_called_once_with("config", "sources", names)
        self.chosen.assert_called_once_with("keys", "train", False)
        self.text.assert_called_once_with(self.chosen.return_value, 66)

    def test_all_as_json(self):
        code, out, _ = command_calls.words(why.main, "quickstart", "--all", "--json")
        self.assertEqual((code, json.loads(out)), (0, {"train.lr": {"value": 1}}))
        self.chosen.assert_called_once_with("keys", None, True)
        self.text.assert_not_called()

    def test_its_help_says_what_stands_where(self):
        out = command_calls.words(why.main, "--help").out
        self.assertIn("CONFIG [KEY] [--config.key=value ...] [flags]", " ".join(out.split()))

    def test_an_unknown_key(self):
        self.chosen.side_effect = ValueError("no key 'lr'")
        self.assertIn("no key 'lr'", self.refused(why.main, "quickstart", "lr"))


class NetworksTest(CallCase):
    def test_an_analysis(self):
        checked = self.put("papers.networks.analyses.checked", return_value="settings")
        written = self.put(
            "papers.networks.analyses.written", return_value=[Path("a.png"), Path("a.csv")]
        )
        words = ("effectiveness", "--workdir=w", "--split=s", "--epsilon=4/255", "--n=3")
        ended = command_calls.words(analyse.main, *words, "--steps", "1", "5", "--out=there")
        self.assertEqual(ended, (0, "a.png\na.csv\n", ""))
        written.assert_called_once_with("settings")
        given, named = checked.call_args.args
        self.assertEqual((named["workdir"], named["split"]), ("w", "s"))
        self.assertEqual(named["epsilon"], 4 / 255)
        self.assertLen(named, 14)  # network, images and threat
        self.assertNoCommonElements(given, named)
        self.assertEqual((given["analysis"], given["n"]), ("effectiveness", 3))
        self.assertEqual((given["steps"], given["out"]), ((1, 5), Path("there")))
        self.assertEqual((given["seed"], given["batch"]), (0, 64))

    def test_an_analysis_that_fails(self):
        self.put("papers.networks.analyses.checked", side_effect=OSError("a full disk"))
        ended = command_calls.words(analyse.main, "effectiveness")
        self.assertEqual((ended.code, ended.out), (3, ""))
        self.assertIn("With that solved, run the same command again", ended.error)

    @parameterized.parameters(
        (analyse, "papers.networks.analyses.written", ("effectiveness",)),
        (landscape, "papers.networks.landscape.written", ("--workdir=w",)),
        (sparsity, "papers.networks.sparsity.written", ("--workdir=w",)),
    )
    def test_libraries_are_quiet_while_it_computes(self, command, name, words):
        self.put("papers.networks.analyses.checked")
        written = self.put(name, return_value=[])
        with mock.patch.object(command, "quiet_libraries") as quiet:
            written.side_effect = lambda *given: quiet.assert_called_once_with() or []
            self.assertEqual(command_calls.words(command.main, *words), (0, "\n", ""))

    def test_a_landscape(self):
        written = self.put(
            "papers.networks.landscape.written", return_value=[Path("a.png"), Path("a.csv")]
        )
        words = ("--workdir=w", "--side=5", "--reach=0.5", "--points=7", "--batch=9", "--seed=2")
        ended = command_calls.words(landscape.main, *words, "--n=11", "--out=there")
        self.assertEqual(ended, (0, "a.png\na.csv\n", ""))
        named, plane, out = written.call_args.args
        own = {"side": 5, "reach": 0.5, "points": 7, "batch": 9, "seed": 2}
        self.assertEqual((plane._asdict(), out), (own, Path("there")))
        self.assertEqual((named["workdir"], named["n"], named["split"]), ("w", 11, None))
        self.assertNoCommonElements(named, {*own, "out"})

    @parameterized.parameters(
        ("--side=4", "--side=4 has no point in the middle"),
        ("--side=2", "--side=2 must be at least 3"),
        ("--side=1", "--side=1 must be at least 3"),
        ("--reach=0", "--reach=0 must be above 0"),
        ("--reach=inf", "--reach=inf must be above 0"),
        ("--reach=nan", "--reach=nan must be above 0"),
        ("--n=0", "--n=0 must be at least 1"),
    )
    def test_no_landscape(self, word, sentence):
        written = self.put("papers.networks.landscape.written")
        self.assertIn(sentence, self.refused(landscape.main, "--workdir=w", word))
        written.assert_not_called()

    def test_sparsity(self):
        written = self.put("papers.networks.sparsity.written", return_value=[Path("a.png")])
        ended = command_calls.words(sparsity.main, "--workdir=w", "--out=there")
        self.assertEqual(ended, (0, "a.png\n", ""))
        named, out = written.call_args.args
        self.assertEqual((named["workdir"], out), ("w", Path("there")))
        self.assertNotIn("out", named)


class ConversionTest(CallCase):
    def setUp(self):
        super().setUp()
        self.cache = self.enter_context(mock.patch.object(compilation, "use_persistent_cache"))
        logs = mock.patch.object(export_weights.logging, "set_verbosity")
        self.logs = self.enter_context(logs)

    @parameterized.parameters((True, 0), (None, 0), (False, 1))
    def test_a_certificate(self, agrees, code):
        compare_them = self.put(
            "publish.certificate.compare", return_value={"agrees": agrees, "of": 1}
        )
        words = ("--weights=w", "--against=t.pt", "--model=m", "--image_size=64", "--images=i")
        ended = command_calls.words(certificate.main, *words, "--options={'a': 1}", "--json")
        self.assertEqual((ended.code, json.loads(ended.out)), (code, {"agrees": agrees, "of": 1}))
        own = {"model": "m", "image_size": 64, "options": {"a": 1}, "images": Path("i")}
        compare_them.assert_called_once_with(Path("w"), Path("t.pt"), **own)
        self.cache.assert_called_once_with()

    @parameterized.parameters(
        (ValueError("no names"), 2), (RuntimeError("no pickle"), 2), (OSError("a full disk"), 3)
    )
    def test_no_certificate(self, error, code):
        self.put("publish.certificate.compare", side_effect=error)
        ended = command_calls.words(certificate.main, "--weights=w", "--against=t.pt", "--json")
        self.assertEqual((ended.code, ended.out), (code, ""))
        self.assertIn(str(error), ended.error)

    def test_an_export(self):
        export = self.put("publish.export_torch.export", return_value={"file": "f"})
        words = ("--workdir=w", "--phase=p", "--which=raw", "--selected", "--layout=hub")
        words = (*words, "--out=there", "--record=r.jsonl", "--evaluation=e", "--id=i")
        words = (*words, "--confirm=5", "--license=mit", "--nocertificate", "--json")
        ended = command_calls.words(export_weights.main, *words)
        self.assertEqual((ended.code, json.loads(ended.out)), (0, {"file": "f"}))
        (given,) = export.call_args.args
        self.assertEqual((given.workdir, given.phase, given.which), (Path("w"), "p", "raw"))
        self.assertEqual((given.selected, given.layout, given.out), (True, "hub", Path("there")))
        self.assertEqual((given.record, given.evaluation, given.id), (Path("r.jsonl"), "e", "i"))
        self.assertEqual((given.confirm, given.license, given.nocertificate), (5, "mit", True))
        self.cache.assert_called_once_with()
        self.logs.assert_called_once_with(export_weights.logging.FATAL)

    def test_an_import(self):
        call = self.put("publish.import_torch.import_weights", return_value={"folder": "f"})
        words = ("source", "--model=m", "--out=there", "--image_size=64", "--num_classes=7")
        words = (*words, "--options={'a': 1}", "--init_stem", "--which=ema", "--normalize=none")
        words = (*words, "--sha256=abc", "--cast", "--seed=3", "--json")
        ended = command_calls.words(import_weights.main, *words)
        self.assertEqual((ended.code, json.loads(ended.out)), (0, {"folder": "f"}))
        source, out, request = call.call_args.args
        self.assertEqual((source, out), ("source", Path("there")))
        self.assertEqual(call.call_args.kwargs, {"sha256": "abc", "certified": True})
        own = {"model": "m", "image_size": 64, "num_classes": 7, "options": {"a": 1}}
        own |= {"init_stem": True, "which": "ema", "normalize": "none", "cast": True, "seed": 3}
        self.assertEqual(request._asdict(), request._field_defaults | own)
        command_calls.words(import_weights.main, "source", "--out=there", "--nocertificate")
        self.assertEqual(call.call_args.kwargs, {"sha256": None, "certified": False})
        self.assertEqual(call.call_args.args[2].normalize, "auto")


if __name__ == "__main__":
    absltest.main()
