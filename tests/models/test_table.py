import collections
import contextlib
import io
import json
import re
import sys
import unicodedata
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from jaxrobust import models
from jaxrobust.commands import models as command
from jaxrobust.data import evaluation_transform
from jaxrobust.models import published, table
from jaxrobust.models.interface.family import PaperFigures
from jaxrobust.models.published import PUBLISHED
from jaxrobust.models.table import COUNTED as COUNTED_BY_US
from tests.support import parity, paths, sweeps
from tools.generate import refresh_counts

# 1e9 multiply-adds of convolutions, linear maps and attention's products, counted on the references
# and printed to 1e6. Table 14 of Singh, Croce, Hein 2023 (arXiv 2303.01870) counts norms too.
COUNTED = {
    "convnext_t": 4.456,
    "convnext_t_cvst": 4.587,
    "iso_convnext_s": 4.286,
    "iso_convnext_s_cvst": 4.664,
    "vit_s": 4.599,
    "vit_s_cvst": 4.976,
    "vit_m": 7.991,
    "vit_m_cvst": 8.359,
    "convnext_s": 8.684,
    "convnext_s_cvst": 8.816,
    "vit_b": 17.564,
    "vit_b_cvst": 17.912,
    "convnext_b": 15.355,
    "convnext_b_cvst": 15.877,
    "convnext_l": 34.361,
    "convnext_l_cvst": 35.536,
}
# As Debenedetti's thesis (EPFL 2022) quotes them, from a counter that also counts norms.
QUOTED = {
    "deit_s": 4.61,
    "cait_s12": 4.76,
    "xcit_s12": 4.82,
    "xcit_m12": 8.54,
    "xcit_l12": 18.97,
    "resnet50": 4.11,
    "wide_resnet50_2": 11.47,
}


def check(test, name: str) -> None:
    found = table.counted(name)
    if name in COUNTED:
        test.assertAlmostEqual(found.multiply_adds / 1e9, COUNTED[name], delta=6e-4)
    if name in QUOTED:
        test.assertLess(abs(found.multiply_adds / 1e9 / QUOTED[name] - 1), 0.01)


class MultiplyAddsTest(parameterized.TestCase):
    @pytest.mark.landing
    def test_is_the_sheets(self):
        check(self, "vit_s")

    @pytest.mark.slow
    @sweeps.rows(*sorted((COUNTED.keys() | QUOTED.keys()) - {"vit_s"}))
    def test_is_the_sheets_of_others(self, name):
        check(self, name)

    def test_small_network_by_hand(self):
        row = table.counted("convnext_n")
        self.assertEqual(row.image_size, 32)
        expected = 16 * 16 * (2 * 2 * 3) * 64  # stem
        for side, dim in ((16, 64), (8, 128), (4, 256)):
            expected += 2 * side**2 * (49 * dim + 8 * dim * dim)
            expected += side**2 * (2 * 2 * dim // 2) * dim if dim > 64 else 0
        self.assertEqual(row.multiply_adds, expected + 256 * 1000)

    def test_loops_choices_and_groups(self):
        x, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 2, 12))

        def platform(a):
            choices = {"cpu": lambda a: a, "default": lambda a: a @ a}
            return jax.lax.platform_dependent(a, **choices)

        def program(x, a):
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=3
            )
            b, _ = jax.lax.scan(lambda c, _: (jax.checkpoint(platform)(c), None), a, length=5)
            return y, jnp.einsum("nij,nkj->nik", b[None], b[None])

        count = table._count(jax.make_jaxpr(program)(x, jnp.ones((4, 4))).jaxpr)
        self.assertEqual(count, 2 * 4 * 4 * 12 * 9 * 2 + 5 * 4**3 + 4**3)


class ShippedTest(parameterized.TestCase):
    """The table prints figures that are shipped, at once; what a change moves is refreshed by
    `python tools/generate/refresh_counts.py`.
    """

    def test_every_network_has_them(self):
        self.assertEqual(list(COUNTED_BY_US), models.available())

    def test_are_those_of_the_network(self):
        self.assertEqual(table.architecture("cifar_mixer"), table.counted("cifar_mixer"))

    @sweeps.rows(*models.available())
    @pytest.mark.slow
    def test_are_those_of_every_network(self, name):
        self.assertEqual(table.architecture(name), table.counted(name))

    def test_nothing_is_traced_for_the_table(self):
        with mock.patch.object(models, "create", side_effect=AssertionError("traced")):
            for name in models.available():
                table.line(table.architecture(name))

    def test_the_file_is_what_the_tool_writes(self):
        written = refresh_counts.text(map(table.architecture, models.available()))
        self.assertEqual(written, (paths.ROOT / "jaxrobust/models/counted.json").read_text())


class PaperFiguresTest(absltest.TestCase):
    """What papers print, next to the figures that are shipped."""

    def test_are_those_of_our_networks(self):
        rows = [row for row in map(table.architecture, models.available()) if row.paper]
        self.assertGreater(len(rows), 50)
        for row in rows:
            paper = row.paper
            if paper.multiply_adds:  # of which some counters count norms too
                share = float(paper.multiply_adds) / (row.multiply_adds / 1e9)
                self.assertBetween(share, 0.99, 1.01, row.name)
            if paper.parameters:
                unit = 10.0 ** -len(paper.parameters.partition(".")[2])  # rounded, or cut
                near = abs(row.parameters / 1e6 - float(paper.parameters)) <= unit
                self.assertEqual(near, not (paper.misprint or paper.other), row.name)
            self.assertTrue(paper.parameters or paper.multiply_adds, row.name)
        self.assertEqual(
            [row.name for row in rows if row.paper.misprint], ["convnext_s", "convnext_s_cvst"]
        )
        other = [row.name for row in rows if row.paper.other]
        self.assertEqual(other, ["cifar_levit", "cifar_vitae"])

    def test_of_the_thesis_are_as_it_quotes_them(self):
        for name, quoted in QUOTED.items():
            paper = models.member(name).paper
            self.assertEqual((paper.parameters, paper.multiply_adds), (None, f"{quoted:.2f}"))


LISTED = [key for key in PUBLISHED if (paths.GOLDEN / "models" / f"{key}.tsv").exists()]


class PublishedTest(parameterized.TestCase):
    @sweeps.rows(*LISTED)
    def test_is_the_listing(self, key):
        net = PUBLISHED[key]
        path = paths.GOLDEN / "models" / f"{key}.tsv"
        names = [line.split("\t")[0] for line in path.read_text().splitlines()]
        bare = models.torch_keys(net.model)
        for old, new in net.renamed:
            bare = [name.replace(old, new) for name in bare]
        wrapped = ["normalize.mean", "normalize.std", *(f"model.{name}" for name in bare)]
        inside = wrapped if net.buffers is None else [*net.buffers, *bare]
        self.assertEqual(names, inside if net.normalised else bare)
        evaluation_transform(net.preprocessing)  # refuses an unknown one

    def test_is_robustbenchs(self):
        try:
            from jaxrobust.publish import torch_networks

            torch_networks.import_robustbench()
        except ImportError as error:
            self.skipTest(str(error))
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
        from robustbench.model_zoo.models import model_dicts

        zoo = {
            (key, name): row
            for key, board in published.LEADERBOARDS.items()
            for name, row in model_dicts[BenchmarkDataset(board.dataset)][
                ThreatModel(board.threat)
            ].items()
        }
        loaded = {f"{net.board.folder}/{published.own_id(key)}" for key, net in PUBLISHED.items()}
        self.assertLen(loaded, len(PUBLISHED))
        self.assertEmpty(loaded & published.others().keys())
        every = {f"{published.LEADERBOARDS[board].folder}/{name}" for board, name in zoo}
        self.assertEqual(loaded | published.others().keys(), every)
        for key, net in PUBLISHED.items():
            row = zoo[net.dataset, published.own_id(key)]
            if not re.search("XCiT|DeiT", key):  # whose preprocessing comes from timm
                named = row.get("preprocessing", "none")  # images of 32 px as they are
                self.assertEqual(net.preprocessing, named, key)
            if file := row["gdrive_id"]:
                self.assertTrue(net.address.endswith(f"&id={file}"), key)
        from robustbench.model_zoo.architectures import deit, xcit

        of_timm = [key for key in PUBLISHED if re.search("XCiT|DeiT", key)]
        self.assertLen(of_timm, 11)
        for key in of_timm:
            net, name = PUBLISHED[key], published.own_id(key).lower().replace("-", "_")
            of_zoo = deit.default_cfgs | xcit.default_cfgs
            theirs = of_zoo[f"{name}_{net.board.dataset}_{net.board.threat.lower()}"]
            theirs = theirs if isinstance(theirs, dict) else theirs.to_dict()
            self.assertEqual(net.address, theirs["url"])
            if net.normalised:
                self.assertEqual(net.inside, (theirs["mean"], theirs["std"]))


class RowsTest(parameterized.TestCase):
    """What the rows say of ids, tables, files and licenses."""

    def test_ids_of_other_tables_have_these_in_front(self):
        for key, net in PUBLISHED.items():
            folder, name = net.board.folder, published.own_id(key)
            alone = net.dataset in ("imagenet", "cifar10")
            second = {("imagenet", "Peng2023Robust"), ("cifar10", "Engstrom2019Robustness")}
            second |= {("cifar10", f"Debenedetti2022Light_XCiT-{size}12") for size in "SML"}
            alone = alone and (net.dataset, name) not in second | {("cifar10", "Wong2020Fast")}
            self.assertEqual(key, name if alone else f"{folder}/{name}")
            if net.file and not re.search("XCiT|DeiT", key):  # of which timm keeps the files
                self.assertEqual(net.file, f"{folder}/{name}.pt")
            self.assertIn(net.model, models.available())
            evaluation_transform(net.preprocessing)  # refuses an unknown one
        counts = collections.Counter(net.dataset for net in PUBLISHED.values())
        expected = {"cifar10": 66, "imagenet": 27, "cifar100": 34, "cifar10-L2": 19}
        expected |= {"cifar10-corruptions": 12, "imagenet-corruptions": 11}
        self.assertEqual(counts, expected | {"cifar100-corruptions": 7})

    def test_others_have_a_reason(self):
        parts = collections.Counter(
            through_torch for _, through_torch in published.others().values()
        )
        self.assertEqual(parts, {True: 23, False: 7})
        self.assertLen(PUBLISHED.keys() | published.others().keys(), 206)

    def test_others_are_listed(self):
        """In the README of the models, with the counts of those that load."""
        said = (paths.ROOT / "jaxrobust/models/README.md").read_text()
        rows: dict[tuple[str, bool], list[str]] = {}
        for key, of in published.others().items():
            rows.setdefault(of, []).append(f"`{key}`")
        lines = [
            f"| {', '.join(keys)} | {reason} | {'`torch:`' if through_torch else 'refused'} |"
            for (reason, through_torch), keys in rows.items()
        ]
        self.assertIn("\n".join(["|---|---|---|", *lines]), said)
        self.assertIn(f"{len(PUBLISHED)} of the 206 ids", said)

    def test_each_is_called_once(self):
        """Drive's keys, so that no row was copied without being changed; one network may stand in
        several tables.
        """
        tables: dict[str, list[str]] = {}
        networks: dict[str, tuple] = {}
        for net in PUBLISHED.values():
            tables.setdefault(net.address, []).append(net.dataset)
            row = (net.model, net.options, net.inside)
            self.assertEqual(networks.setdefault(net.address, row), row)
        for datasets in tables.values():
            self.assertLen(set(datasets), len(datasets))
            several = [name for name in datasets if not name.endswith("corruptions")]
            self.assertIn(several, ([], several[:1], ["cifar10", "cifar10-L2"]))
        self.assertLen(tables, 163)

    @sweeps.rows(
        ("Wang2023Better_WRN-28-10", "linf", 8 / 255, 10, (0.4914, 0.4822, 0.4465)),
        ("cifar10/L2/Wang2023Better_WRN-28-10", "l2", 0.5, 10, (0.4914, 0.4822, 0.4465)),
        ("cifar100/Linf/Wang2023Better_WRN-28-10", "linf", 8 / 255, 100, (0.5071, 0.4865, 0.4409)),
    )
    def test_networks_of_one_name(self, key, norm, epsilon, classes, mean):
        board = PUBLISHED[key].board
        self.assertEqual((board.norm, board.epsilon, board.num_classes), (norm, epsilon, classes))
        self.assertEqual(board.mean, mean)
        self.assertEqual(published.paper(key).venue, "ICML 2023")

    def test_licences_are_those_that_robustbench_states(self):
        """Its LICENSE: MIT, but for five groups of ours; torchvision's weights are not its own."""
        of = {key: net.license for key, net in PUBLISHED.items()}
        apache = [key for key, name in of.items() if name == "Apache-2.0"]
        for key in apache:
            groups = "Gowal2020Uncovering|Gowal2021Improving|Rebuffi2021Fixing|^Hendrycks2019Using"
            self.assertRegex(key, groups)
        self.assertLen(apache, 28)
        none = ["Standard_R50", "imagenet/corruptions/Standard_R50"]
        self.assertEqual([key for key, name in of.items() if not name], none)
        bsd = [key for key, name in of.items() if name == "BSD-3-Clause"]
        self.assertEqual(bsd, ["cifar10/L2/Rony2019Decoupling"])
        self.assertEqual({*of.values()}, {"MIT", "Apache-2.0", "BSD-3-Clause", ""})


class DescribedTest(parameterized.TestCase):
    """How a row is written."""

    def row(self, paper=None, published=()):
        of = table.architecture("resnet18")
        return of._replace(paper=paper, published=dict.fromkeys(published))

    @sweeps.rows(
        ({}, "  11.5 224"),
        ({"misprint": True}, " 11.5! 224"),
        ({"other": True}, " 11.5? 224"),
    )
    def test_marks_of_what_a_paper_prints(self, how, expected):
        line = table.line(self.row(PaperFigures("11.5", "", **how)))
        self.assertIn(expected, line)

    def test_checkpoints_stand_in_the_row_as_far_as_they_fit(self):
        bare = table.line(self.row(published=["x"]))
        names = ["Salman2020Do_R18", "Salman2020Do_50_2", "Standard"]
        whole = table.line(self.row(published=names), width=len(bare) - 1 + 19)
        self.assertEqual(whole, bare[:-1] + "Salman2020 Standard")
        first, below = table.line(self.row(published=names), width=len(whole) - 1).splitlines()
        self.assertEqual(first, bare[:-1].rstrip())
        self.assertEqual(below, " " * 20 + "Salman2020 Standard")

    def test_what_goes_into_a_checkpoint(self):
        plain = PUBLISHED["Salman2020Do_R18"]
        row = table.architecture("resnet18")
        for normalised, word in ((True, "norm."), (False, "[0,1]")):
            own = row._replace(published={"key": plain._replace(normalised=normalised)})
            line = table.checkpoints([own]).splitlines()[2]
            self.assertEqual(line.split()[:4], ["key", "52.92", "25.32", word])
            self.assertEqual(line.split()[4:], ["MIT", "Res256Crop224"])
        corrupted = row._replace(published={"key": plain._replace(autoattack=None)})
        self.assertIn("52.92     - norm.", table.checkpoints([corrupted]))
        none = row._replace(published={"key": plain._replace(license="")})
        self.assertIn("norm. not stated Res256Crop224", table.checkpoints([none]))
        self.assertEqual(table.checkpoints([row._replace(published={})]), "")


class OptionsTest(absltest.TestCase):
    """Which options make another network, and how it is called then."""

    def test_what_decides_what_weights_compute(self):
        found = models.computed("convnext_n", {"drop_path": 0.5, "dtype": "bfloat16"})
        self.assertEqual(found, models.computed("convnext_n", {}))
        row = models.variant("convnext_n")._asdict()
        free = {"dtype", "remat", "scan", "drop_path", "in_channels"} & row.keys()
        self.assertEqual(found.keys(), row.keys() - free)
        self.assertEqual(found["dims"], row["dims"])
        for gamma, there in ((None, False), (0.5, True), (1e-6, True)):
            found = models.computed("vit_s", {"gamma_init": gamma})
            self.assertIs(found["gamma_init"], there)

    def test_words_name_the_options_that_make_another_network(self):
        row = models.variant("convnext_n")
        same = {"depths": row.depths, "remat": True, "drop_path": 0.5, "gamma_init": 0.5}
        self.assertEqual(models.essential("convnext_n", same), {})
        self.assertEqual(models.words("convnext_n", same), "convnext_n without options")
        other = same | {"dims": (8, 9, 10), "depths": (1, 2, 1)}
        expected = {"depths": [1, 2, 1], "dims": [8, 9, 10]}
        self.assertEqual(models.essential("convnext_n", other), expected)
        said = "convnext_n with depths=[1, 2, 1], dims=[8, 9, 10]"
        self.assertEqual(models.words("convnext_n", other), said)

    def test_sizes(self):
        for size in (1, 8192):
            models.check_size(size)
        for size, said in ((0, "at least 1$"), (-1, "at least 1$"), (8193, "at most 8192; give")):
            with self.assertRaisesRegex(ValueError, f"^image_size={size} must be {said}"):
                models.check_size(size)

    def test_papers_of_published_networks(self):
        of = {key: published.paper(key) for key in PUBLISHED}
        self.assertIs(of["Salman2020Do_R18"], published.paper("Salman2020Do_R18"))
        self.assertEqual(of["Salman2020Do_R18"], of["Salman2020Do_R50"])
        title = "Do Adversarially Robust ImageNet Models Transfer Better?"
        self.assertEqual(of["Salman2020Do_R50"].title, title)
        for key, paper in of.items():
            if not published.own_id(key).startswith("Standard"):
                author = re.match(r"[A-Z][a-z]+(?=\d|[A-Z])", published.own_id(key))[0]
                plain = unicodedata.normalize("NFD", paper.authors).encode("ascii", "ignore")
                self.assertIn(author, plain.decode(), key)
                self.assertStartsWith(paper.link, "https://")
            self.assertTrue(paper.venue, key)
        board = PUBLISHED["Huang2021Exploring"].board
        self.assertEqual((board.num_classes, board.image_size, board.epsilon), (10, 32, 8 / 255))

    def test_a_networks_parameters_are_listed_and_summed(self):
        lines = table.parameters("convnext_n").splitlines()
        (total,) = [line for line in lines if line.startswith("Total")]
        self.assertIn(f"{table.architecture('convnext_n').parameters:,}", total)
        (head,) = [line for line in lines if "head.fc.kernel" in line]
        self.assertIn("(256, 1000)", head)
        self.assertIn("256,000", head)


class CommandTest(absltest.TestCase):
    def run_with(self, *arguments) -> str:
        out = io.StringIO()
        with (
            mock.patch.object(sys, "argv", ["models", *arguments]),
            mock.patch.dict("os.environ", COLUMNS="80"),
            contextlib.redirect_stdout(out),
        ):
            command.main()
        return out.getvalue()

    def test_table(self):
        out = self.run_with("resnet18", "convnext_n")
        self.assertRegex(out, r"resnet18 +11\.69 +224 +1\.814 +conv 7 +BN\n +Salman2020\n")
        self.assertRegex(out, r"convnext_n +1\.\d\d +32 +0\.058 +patch 2 +LN\n")
        self.assertRegex(out, r"Salman2020Do_R18 +52\.92 +25\.32 +norm\. MIT +Res256Crop224\n")
        self.assertLessEqual(max(map(len, out.splitlines())), 80)

    def test_json(self):
        out = self.run_with("--json", "resnet18")
        (row,) = json.loads(out.splitlines()[-1])["architectures"]
        self.assertEqual(row["parameters"], parity.parameters("resnet18"))
        self.assertEqual(row["published"]["Salman2020Do_R18"]["autoattack"], 25.32)

    def test_unknown_name(self):
        err = io.StringIO()
        with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(err):
            self.run_with("resnet19")
        self.assertEqual(caught.exception.code, 2)
        self.assertRegex(
            err.getvalue(), r"^jaxrobust: unknown model 'resnet19'; did you mean .+\n$"
        )
