"""Files of RobustBench's networks whose ids several of its tables have, and their names."""

import functools
from pathlib import Path

import jax
import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

import jaxrobust
from jaxrobust import models
from jaxrobust.models.published import PUBLISHED
from jaxrobust.publish import layouts, network_account
from jaxrobust.weights import imports, load, reading
from jaxrobust.weights.fetch import sources
from jaxrobust.weights.naming import convert
from tests.support import parity, sweeps

WANG = "Wang2023Better_WRN-28-10"
R18 = "Rebuffi2021Fixing_R18_ddpm"
L2_R18 = "cifar10/L2/Rebuffi2021Fixing_R18_cutmix_ddpm"


@functools.cache
def arrays(classes: int) -> dict[str, np.ndarray]:
    """Arrays of a PreActResNet-18 under the names of its files, which have no mean and no std."""
    net = models.create("dm_preactresnet18", num_classes=classes, image_size=32)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params, stats = (
        {k: np.full(a.shape, 0.5 if a.ndim < 2 else 0.0, np.float32) for k, a in part.items()}
        for part in shapes
    )
    theirs = convert.reference_names("dm_preactresnet18", params | stats, wrapped=False)
    theirs["logits.bias"] = np.arange(classes, dtype=np.float32)
    return theirs


class LoadTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def file(self, classes: int, name: str = "weights.safetensors") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays(classes), path)
        return path

    @parameterized.parameters(
        (L2_R18, 10, "l2", 0.5, "cifar10", (0.9033, 0.7586), "Apache-2.0"),
        (f"cifar100/Linf/{R18}", 100, "linf", 8 / 255, "cifar100", (0.5687, 0.285), "Apache-2.0"),
    )
    def test_what_an_id_says_of_a_file(self, key, classes, norm, epsilon, data, reached, licence):
        path = self.file(classes)
        artifact = reading.artifact_of(sources.at(path)._replace(published=key))
        network = load.fitted(artifact, None)
        self.assertEqual((network.name, network.num_classes), ("dm_preactresnet18", classes))
        about = imports.described(network)
        self.assertEqual((about["norm"], about["epsilon"]), (norm, epsilon))
        (record,) = about["accuracies"]
        self.assertEqual((record["clean"], record["robust"]), reached)
        self.assertEqual((record["dataset"], record["split"]), (data, "test"))
        board = PUBLISHED[key].board
        for part in ("mean", "std"):
            expected = np.float32(getattr(board, part))
            np.testing.assert_array_equal(network.stats[f"normalize.{part}"], expected)
        known = network_account.of_weights(network, "the file")
        self.assertEqual((known.license, known.published), (licence, key))
        self.assertEqual(network_account.licence(known), licence)
        back = layouts.arrays(network, key)
        self.assertEqual(list(back), list(arrays(classes)))
        np.testing.assert_array_equal(back["logits.bias"], np.arange(classes))
        said = layouts.usage(network, key, Path("out"))
        name = key.rpartition("/")[2]
        self.assertEqual(
            said,
            f"robustbench.utils.load_model({name!r}, model_dir='out', dataset={data!r}, "
            f"threat_model={board.threat!r})",
        )

    def test_another_table_of_the_same_id_has_other_classes(self):
        path = self.file(10)
        with self.assertRaisesRegex(
            ValueError,
            f"its head has 10 classes, but RobustBench's cifar100/Linf/{R18} has 100: these",
        ):
            reading_of = sources.at(path)._replace(published=f"cifar100/Linf/{R18}")
            load.fitted(reading.artifact_of(reading_of), None, image_size=32)

    def test_weights_of_other_names_are_all_listed(self):
        path = self.folder / "other.safetensors"
        wrong = {k.replace("conv_2d_1", "conv1"): a for k, a in arrays(10).items()}
        save_file(wrong, path)
        with self.assertRaises(ValueError) as caught:
            jaxrobust.load(path, model=R18)
        said = str(caught.exception)
        self.assertIn("layer_0.0.conv1.weight", said)
        self.assertIn("layer_0.0.conv_2d_1.kernel", said)


class NameTest(parameterized.TestCase):
    def test_a_name_that_several_tables_have(self):
        keys = (WANG, f"cifar10/L2/{WANG}", f"cifar100/Linf/{WANG}")
        with self.assertRaisesRegex(
            ValueError,
            rf"^{WANG}.pt is RobustBench's file name for {', '.join(keys)}; run "
            rf"`jaxrobust import /somewhere/{WANG}.pt --model ID --out FOLDER`, or keep it in "
            rf"RobustBench's folders, as in cifar10/Linf/{WANG}",
        ):
            imports.published(None, Path(f"/somewhere/{WANG}.pt"))
        for key in keys:
            path = Path("/somewhere") / PUBLISHED[key].file
            self.assertEqual(imports.published(None, path), key)
            self.assertEqual(imports.published(key, Path("mine.pt")), key)
        name = Path("Xu2023Exploring_WRN-28-10.pt")  # of one table
        self.assertEqual(imports.published(None, name), name.stem)
        self.assertIsNone(imports.published("dm_wrn_70_16", name))

    @sweeps.rows(
        (
            "Gowal2020Uncovering",
            "RobustBench's networks with that id are cifar10/L2/Gowal2020Uncovering and "
            "cifar100/Linf/Gowal2020Uncovering$",
        ),
        (
            f"cifar10/Linf/{WANG}",
            f"not found; for RobustBench's network in that table, give just {WANG}",
        ),
        (f"cifar10/L2/{WANG}x", f"did you mean .*cifar10/L2/{WANG}"),
    )
    def test_ids_of_the_wrong_table(self, text, message):
        with self.assertRaisesRegex(ValueError, message):
            sources.parse(text)

    def test_an_id_of_each_table_is_a_source(self):
        for key in (WANG, L2_R18, f"cifar100/Linf/{R18}"):
            found = sources.parse(key)
            self.assertEqual((found.published, found.model), (key, PUBLISHED[key].model))
            self.assertEqual(found.address, PUBLISHED[key].address)


class RobustbenchTest(absltest.TestCase):
    def test_its_loader_reads_what_we_export(self):
        """A folder of ours, read by `load_model` of the right table."""
        torch = parity.torch_or_skip(self)
        from jaxrobust.publish import references, torch_networks

        try:
            torch_networks.import_robustbench()
        except ImportError as error:
            self.skipTest(str(error))
        folder = Path(self.create_tempdir())
        path = references.place(folder, L2_R18)
        path.parent.mkdir(parents=True)
        torch.save({k: torch.from_numpy(a) for k, a in arrays(10).items()}, path)
        net = references.load_model(folder, L2_R18)
        logits = net(torch.zeros(1, 3, 32, 32)).detach().numpy()[0]
        np.testing.assert_allclose(logits - logits[0], np.arange(10), atol=1e-5)
