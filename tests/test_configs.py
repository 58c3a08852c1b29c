import functools
import importlib
import itertools
import re
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from configs import light_recipe, revisiting_at, transfer
from jaxrobust import config as resolved
from jaxrobust.config import base, network_of, of_phase, phases
from jaxrobust.data.source import Source
from jaxrobust.data.stream.plan import plan
from jaxrobust.data.transforms.presets import PRESETS
from jaxrobust.models.published import PUBLISHED
from jaxrobust.papers.tables import tables
from jaxrobust.runtime.commandline.arguments import config_name, load_config
from jaxrobust.training import build
from jaxrobust.training.update import optim
from jaxrobust.weights.naming import compose, convert
from jaxrobust.weights.store.artifact import Network
from tests.support import paths, sweeps
from tests.support.command_line import parsed, refused
from tools.generate import refresh_configs


def sized(size, name):
    """A source of 10 classes of which only its size is asked."""
    return Source(name, "all", size, 10, 3, (32, 32, 3), read=lambda indices: [])


class ConfigsTest(parameterized.TestCase):
    def test_resolved_text_is_reviewed(self):
        for name in ("base", *refresh_configs.names()):
            with self.subTest(name=name):
                self.assertEqual(
                    refresh_configs.golden(name).read_text(),
                    refresh_configs.resolved(name),
                    "run `python tools/generate/refresh_configs.py` and review the difference",
                )

    @sweeps.fast("quickstart", "cifar10_convnext", "mart")
    @parameterized.parameters(*refresh_configs.names())
    def test_builds(self, name):
        config = refresh_configs.load(name)
        for phase in phases(config):
            with jax.numpy_dtype_promotion("standard"):
                seen = of_phase(config, phase)
                built = build.phase(seen, phase, 49_000, devices=jax.devices()[:1])
            self.assertGreater(built.total_steps, 0)

    def test_is_locked_and_says_what_it_reaches(self):
        for name in refresh_configs.names():
            with self.subTest(name=name):
                module = importlib.import_module(f"configs.{name.partition(':')[0]}")
                with self.assertRaises(AttributeError):
                    refresh_configs.load(name).train.epocs = 3
                self.assertIn(f"--config configs/{name.partition(':')[0]}.py", module.__doc__)
                self.assertRegex(module.__doc__.lower(), "not yet measured|measured")


class RevisitingTest(absltest.TestCase):
    """Facts of Singh, Croce, Hein 2023."""

    def test_clean_epochs_of_a_new_stem_are_the_same_in_every_row(self):
        """Appendix A.1 and D.2: heavy augmentation and label smoothing 0.1, before any row."""
        rows = [f"augmentation={name}" for name in ("heavy", "light", "basic")]
        rows += [f"label_smoothing={share}" for share in (0.0, 0.1, 0.2)]
        networks = [name for name in revisiting_at.MODELS if name.endswith("_cvst")]
        for name in networks:
            clean = refresh_configs.load(f"convstem_pretraining:{name}")
            self.assertEqual(clean.data.augmentation, "heavy")
            self.assertEqual(build.mixes_and_erases(clean), (0.8, 1.0, 0.25, 0.1))
            small = name.startswith(("convnext_t", "iso_convnext_s", "vit_s"))
            self.assertEqual(clean.pretrain.epochs, 100 if small else 50)
        for name, row in itertools.product(networks, rows):
            config = refresh_configs.load(f"revisiting_at:{name},{row}")
            with self.subTest(f"{name},{row}"):
                self.assertEqual(config.init.weights, f"run:convstem_pretraining:{name}")
                self.assertEqual((config.init.stem, phases(config)), ("keep", ["train"]))
                key, _, value = row.partition("=")
                if key == "augmentation":
                    self.assertEqual(config.data.augmentation, value)
                else:
                    self.assertEqual(build.mixes_and_erases(config)[-1], float(value))

    def test_a_large_batch_is_that_of_the_start_too(self):
        config = refresh_configs.load("revisiting_at:vit_b_cvst,batch=4096")
        self.assertEndsWith(config.init.weights, ":vit_b_cvst,batch=4096")
        start = refresh_configs.load(config.init.weights.removeprefix("run:"))
        self.assertEqual((start.pretrain.batch_size, config.train.batch_size), (4096, 4096))
        self.assertEqual(start.pretrain.lr, config.train.lr)

    def test_networks_normalise_as_their_published_weights(self):
        """A run's weights can be exported under the id of the network that it trains."""
        ids = {row.model: key for key, row in PUBLISHED.items() if key.startswith("Singh2023")}
        given = {f"revisiting_at:{name}": name for name in revisiting_at.MODELS if name in ids}
        given |= {name: name for name in refresh_configs.names() if name in ids}
        given |= {"convstem_pretraining:vit_s_cvst": "vit_s_cvst"}
        given |= {"revisiting_at:vit_s_cvst,start=random": "vit_s_cvst"}
        self.assertContainsSubset(("vit_s_cvst", "vit_b_cvst", "convnext_t_cvst"), given)
        for line, name in given.items():
            with self.subTest(line):
                how = refresh_configs.load(line).init.normalize
                wanted = "imagenet" if PUBLISHED[ids[name]].normalised else "keep"
                self.assertEqual(how, wanted)

    def test_vit_s_goes_out_and_in_under_its_id(self):
        config = refresh_configs.load("vit_s_cvst")
        key = "Singh2023Revisiting_ViT-S-ConvStem"
        shapes = jax.eval_shape(network_of(config).init, jax.random.key(0))
        filled = [jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), part) for part in shapes]
        filled[1] |= {"normalize.std": np.ones_like(filled[1]["normalize.std"])}
        raw = Network("vit_s_cvst", *filled, 1000, 224, {})
        with self.assertRaisesRegex(ValueError, "ImageNet's mean and std and ignores others"):
            convert.to_torch("vit_s_cvst", raw.params, raw.stats, layout=key)
        start = compose.normalized(raw, config.init.normalize)
        exported = convert.to_torch("vit_s_cvst", start.params, start.stats, layout=key)
        mean = exported["normalize.mean"].ravel()
        np.testing.assert_array_equal(mean, np.float32([0.485, 0.456, 0.406]))
        _, stats = convert.from_torch("vit_s_cvst", exported)
        for name, values in start.stats.items():
            np.testing.assert_array_equal(stats[name], values, name)

    def test_which_attack_chooses_the_epoch(self):
        """A.3: one step for small networks, ten for the others; of Tables 2 and 4 alike."""
        steps = {"convnext_t_cvst": 1, "vit_s_cvst": 1, "convnext_b_cvst": 10}
        for name, expected in steps.items():
            for family in ("revisiting_at", "larger_radius"):
                with self.subTest(f"{family}:{name}"):
                    config = refresh_configs.load(f"{family}:{name}")
                    self.assertEqual(config.evaluation.steps, expected)


class LightTest(parameterized.TestCase):
    """Facts of Debenedetti's thesis and of the repository of Debenedetti et al. 2022."""

    @parameterized.product(model=("xcit_s12", "xcit_m12", "xcit_l12"), data=("cifar10", "cifar100"))
    def test_no_colour_jitter_on_cifar(self, model, data):
        config = refresh_configs.load(f"transfer:{model},{data}")
        chain = PRESETS[config.data.augmentation].chain
        self.assertNotIn("jitter", chain)
        self.assertIn("flip", chain)
        self.assertEqual(config.train.epochs - config.train.cooldown_epochs, 20)

    def test_epochs_with_their_cooldown(self):
        """The rows of Tables 7 and 8 count the code's epochs at the last rate, as the runs do."""
        lines = {"table_7": ("flowers", 30), "table_8": ("cifar10", 22)}
        for table in tables.tables("xcit_light_recipe"):
            data, epochs = lines.get(table.id, (None, 0))
            if data is None:
                continue
            self.assertEqual(table.rows[0]["epochs"], epochs)
            said = refresh_configs.load(f"transfer:xcit_s12,{data}").train.epochs
            self.assertEqual(said, epochs)

    def test_figures_that_the_thesis_lacks_are_marked(self):
        for module in (transfer, light_recipe):
            with self.subTest(module=module):
                printed = {
                    (row.get("clean"), row.get(key))
                    for table in tables.tables("xcit_light_recipe")
                    for row in table.rows
                    for key in ("linf_4_255", "linf_8_255")
                }
                lines = re.findall(r"(?:xcit|resnet50).*(?:\n.*\d\d\.\d\d, .*)*", module.__doc__)
                pairs = re.findall(r"(\d\d\.\d\d),\s(\d\d\.\d\d)(\+?)", "\n".join(lines))
                self.assertGreaterEqual(len(pairs), 7)
                for clean, robust, mark in pairs:
                    with self.subTest(clean):
                        known = (float(clean), float(robust)) in printed
                        self.assertEqual(mark, "" if known else "+")


class AlignedTest(absltest.TestCase):
    """Facts of DIG-Beihang/RobustART, cifar10/train.py, as its configs have them."""

    def test_learning_rate(self):
        expected = np.load(paths.GOLDEN / "updates/cifar_updates.npz")["warmup8_cosine100_lr"]
        p = refresh_configs.load("cifar_aligned:cifar_vgg16").train
        self.assertLen(expected, p.epochs)
        with jax.enable_x64(True):
            schedule, _ = optim.of_phase(p, "train", decay_mask="all", steps_per_epoch=7)
            for epoch, value in enumerate(expected):
                rate = schedule(7 * epoch + 6)
                np.testing.assert_allclose(rate, value, rtol=1e-12, atol=1e-18)

    def test_attack_and_arguments(self):
        config = refresh_configs.load("cifar_aligned:cifar_densenet,mode=trades,l1=1e-5")
        attack = config.attack
        self.assertEqual((attack.name, attack.steps, attack.statistics), ("pgd", 15, "running"))
        self.assertAlmostEqual(attack.relative_step * attack.epsilon, 0.8 / 255, delta=1e-15)
        self.assertEqual((config.train.objective, config.train.l1), ("trades", 1e-5))
        self.assertEqual(config.evaluation.metric, "clean")
        self.assertEqual(config.data.selection_split, "train[49000:]")


class GeneratedTest(parameterized.TestCase):
    """Facts of wzekai99/DM-Improves-AT, as its config has them."""

    def test_an_epoch_is_50_000_rows_and_a_batch_has_its_share(self):
        """Their sampler's int(batch * fraction) and ceil(50000 / batch)."""
        for given, batch, epochs, steps, rows in (
            ("wrn_28_10,images=1m", 512, 400, 98, (154, 358)),
            ("wrn_28_10,images=20m", 2048, 2400, 25, (410, 1638)),
            ("wrn_70_16,images=50m,epochs=100,batch=1024", 1024, 100, 49, (205, 819)),
        ):
            with self.subTest(row=(given, batch, epochs, steps, rows)):
                config = refresh_configs.load(f"generated_data:{given}")
                p, own = config.train, config.data
                self.assertEqual((p.batch_size, p.epochs), (batch, epochs))
                self.assertEqual(own.epoch_images // batch, steps)
                sources = [
                    sized(size, name) for size, name in ((48_976, "real"), (10**6, "generated"))
                ]
                made = plan(
                    sources[0], batch_size=batch, extra=sources[1], extra_share=own.extra_share
                )
                self.assertEqual(made.rows, rows)
                self.assertEqual((p.warmup_epochs, p.ema_warmup_epochs), (round(epochs / 40),) * 2)

    def test_learning_rate_is_pytorchs(self):
        """OneCycleLR by epochs, whose first rate, peak and last one are these."""
        p = refresh_configs.load("generated_data:wrn_28_10,images=1m").train
        schedule, _ = optim.of_phase(p, "train", decay_mask="all", steps_per_epoch=98)
        rates = [float(schedule(98 * epoch)) for epoch in (0, 9, 399)]
        np.testing.assert_allclose(rates, [0.2 / 25, 0.2, 0.2 / 25 / 1e4], rtol=1e-5)

    def test_batch_norms_alone_do_not_decay(self):
        config = refresh_configs.load("generated_data:wrn_28_10,images=1m")
        params, _ = jax.eval_shape(network_of(config).init, jax.random.key(0))
        kept = {name for name in params if not optim.DECAY_MASKS[config.train.decay_mask](name, 0)}
        self.assertEqual(kept, {name for name in params if "batchnorm" in name})
        self.assertLen(kept, 2 * 25)
        self.assertEqual(sum(x.size for x in params.values()), 36_479_194)


class ArgumentsTest(parameterized.TestCase):
    """`FILE.py:ARGUMENTS`."""

    def test_refused(self):
        for given, message in (
            ("revisiting_at", "give the model after a colon, one of convnext_t, convnext_t_cvst"),
            ("revisiting_at:convnext", "model=convnext is not a valid value; did you mean conv"),
            (
                "revisiting_at:vit_s,epoch=50",
                "'epoch=50' is not an argument .*; did you mean epochs?",
            ),
            (
                "revisiting_at:vit_s,300",
                "'300' is not an argument of this config; one of model, start",
            ),
            ("revisiting_at:vit_s,epochs=60", "epochs=60 is not a valid value; one of 50, 250,"),
            ("revisiting_at:vit_s,steps=2,steps=3", "the argument steps is given twice; give it o"),
            ("revisiting_at:vit_s,start=stem", "start=stem needs a ConvStem; take vit_s_cvst, or"),
            (
                "revisiting_at:vit_s,start=21k",
                "start=21k is only for networks .*: convnext_t, vit_b",
            ),
            ("revisiting_at:vit_b_cvst,start=21k", "start=21k is only for networks"),
            (
                "revisiting_at:vit_s,augmentation=basic,label_smoothing=0.0",
                "label_smoothing belongs to mixing; use augmentation=heavy for it",
            ),
            (
                "revisiting_at:vit_s_cvst,start=clean,stem=C1",
                "stem=C1 is not a stem of .*; choose one of C2",
            ),
            ("revisiting_at:vit_s,stem=C2", "stem=C2 is not a stem of vit_s; leave it out"),
            ("revisiting_at:vit_s_cvst,stem=C2", "stem=C2 was .*; add start=clean"),
            ("light_recipe:xcit_s12,epsilon=6", "epsilon=6 is not a valid value; one of 4, 8"),
            ("light_ablation:xcit_n12,augmentation=cm", "augmentation=cm is not .*; did you mean "),
            ("light_ablation:resnet50,augmentation=m", "the ResNets have augmentation=none; leave"),
            ("transfer:xcit_s12", "add the data after the model; choose one of cifar10, cifar100"),
            ("transfer:xcit_s12,cifar11", "data=cifar11 is not a valid value; did you mean cif"),
            ("transfer:convnext_t_cvst,caltech", "data=caltech is not for the ConvNeXts; use cifa"),
            ("transfer:resnet50,cifar10", "data=cifar10 is not for resnet50; use flowers or calte"),
            (
                "transfer:xcit_m12,flowers,objective=clean",
                "objective=clean is only for xcit_s12 and",
            ),
            (
                "transfer:xcit_s12,flowers,start=random",
                "start=random is only for xcit_s12 on cifar",
            ),
            ("cifar_bat:wrn_a5", "model=wrn_a5 is not a valid value; did you mean wrn_a"),
            ("cifar_bat:resnet18,data=tiny,selection=held-out", "holds whole classes; leave it ou"),
            (
                "cifar_bat:wrn_a1,kernel_size=big",
                "kernel_size=big is not a whole number; write ker",
            ),
            ("cifar_aat:wrn_a1,data=cifar100,extra=500k", "extra=500k has the classes of cifar10"),
            ("cifar_aat:resnet18", "resnet18 has no silu; add activation=relu"),
            ("generated_data:wrn_28_10,images=2m", "images=2m is not a valid value; did you me"),
            ("generated_data:wrn_28_10,epochs=300", "epochs=300 is not a valid value; did you"),
            ("cifar_aligned:cifar_vgg16,l1=-1e-5", "l1=-1e-05 must be a number of at least 0"),
            ("cifar_aligned:cifar_vgg16,l1=much", "l1=much is not a number"),
            (
                "cifar_aligned:cifar_vgg17",
                "model=cifar_vgg17 is not a valid value; did you mean cifar_",
            ),
            ("cifar_aligned:cifar_vgg16_224,selection=held-out", "whole classes; leave it out"),
            ("larger_radius:vit_b_cvst", "is not a valid value; did you mean"),
            ("quickstart:fast", "takes no arguments; leave out what follows the colon"),
        ):
            with self.subTest(row=(given, message)):
                with self.assertRaisesRegex(ValueError, message):
                    load_config(given)
                said = refused(functools.partial(parsed, f"--config={given}"))
                self.assertRegex(said, f"^jaxrobust: .*{message}.*\\n$")

    def test_names_of_workdirs(self):
        for given, name in (
            ("configs/quickstart.py", "quickstart"),
            ("revisiting_at:vit_s", "revisiting_at-vit_s"),
            (
                "configs/revisiting_at.py:vit_s,start=random,epochs=300",
                "revisiting_at-vit_s-start=random-epochs=300",
            ),
        ):
            self.assertEqual(config_name(given), name)


class DecodersTest(parameterized.TestCase):
    def test_default_is_the_cores_that_are_left(self):
        for given, backend, cores, expected in (
            # (what the config says, where JAX computes, cores, processes that decode)
            (None, "tpu", 112, 108),
            (None, "gpu", 3, 0),
            (None, "cpu", 64, 0),  # it trains on them
            (16, "cpu", 2, 16),
            (0, "tpu", 112, 0),
        ):
            with self.subTest(row=(given, backend, cores, expected)):
                data = base().data
                data.workers = given
                with (
                    mock.patch("jax.default_backend", return_value=backend),
                    mock.patch.object(resolved.launch, "own_cores", return_value=cores),
                ):
                    self.assertEqual(resolved.decoders(data), expected)
