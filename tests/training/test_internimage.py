"""InternImage's training: where it starts, and the batch norm of its head on several hosts."""

from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from jaxrobust import models
from jaxrobust.weights import start as start_weights
from jaxrobust.weights.naming import convert
from tests.support.processes import start, wait
from tests.support.random_weights import drawn
from tests.support.runs import tiny

BODY = {"depths": (1, 1), "dims": (8, 12), "groups": (2, 3), "head_dim": 10}
CONV_STEM = {"stem_widths": (4, 8), "stem_strides": (2, 1)}
PATCH_STEM = {"stem_widths": (), "stem_strides": (2,)}


class StartTest(absltest.TestCase):
    def test_the_authors_body_and_a_new_patch_stem(self):
        """Appendix C.3: their file, names and all, then 50 clean epochs of `internimage_t_ps`."""
        sizes = {"num_classes": 10, "image_size": 8}
        params, stats = drawn("internimage_t", in_channels=1, **sizes, **BODY, **CONV_STEM)
        theirs = convert.to_torch("internimage_t", params, stats, **BODY, **CONV_STEM)
        file = Path(self.create_tempdir()) / "internimage_t_1k_224.safetensors"
        arrays = {f"model.{key}": np.ascontiguousarray(array) for key, array in theirs.items()}
        save_file(arrays, file)
        model = {"model__name": "internimage_t_ps", "model__options": ConfigDict(BODY | PATCH_STEM)}
        with self.assertRaisesRegex(ValueError, "only the stem differs.*init.stem=fresh"):
            start_weights.of_config(tiny(init__weights=str(file), **model))
        config = tiny(init__weights=str(file), init__stem="fresh", **model)
        with jax.numpy_dtype_promotion("standard"):
            found, record = start_weights.of_config(config)
        net = models.create("internimage_t_ps", in_channels=1, **sizes, **BODY, **PATCH_STEM)
        wanted, _ = jax.eval_shape(net.init, jax.random.key(0))
        shapes = {key: array.shape for key, array in found.params.items()}
        self.assertEqual(shapes, {key: array.shape for key, array in wanted.items()})
        patches = ("stem.0.bias", "stem.0.kernel", "stem.1.bias", "stem.1.scale")
        self.assertSameElements(found.fresh, patches)
        for key, array in found.params.items():
            if key not in patches:
                np.testing.assert_array_equal(array, params[key], key)
        for key in ("features.norm.mean", "features.norm.var"):
            np.testing.assert_array_equal(found.stats[key], stats[key], key)
        self.assertGreater(found.params["stem.0.kernel"].std(), 0.1)  # uniform in +-1/2
        self.assertEqual(record["stem"], "fresh")


SMALL = {"depths": (1,), "dims": (4,), "groups": (2,), "head_dim": 10}
SMALL |= {"stem_widths": (4,), "stem_strides": (4,)}
# Saves, after each step, this host's own copy of the running statistics.
STATISTICS = f"""
import sys
from pathlib import Path
from jaxrobust.runtime.processes.launch import join_hosts
join_hosts()
import jax
import numpy as np
from ml_collections import ConfigDict
from jaxrobust.models.kernels.deformable import operator
from jaxrobust.training.run import loop, run
from tests.support.runs import one_phase

operator._ON["cpu"] = "gathers"  # which compiles in a moment

real, seen = loop._Loop.take, []

def take(self):
    real(self)
    stats = self.state.stats
    parts = (stats["features.norm.mean"], stats["features.norm.var"])
    seen.append([[np.asarray(s.data) for s in part.addressable_shards] for part in parts])

loop._Loop.take = take
options = ConfigDict({SMALL!r})
config = one_phase(
    model__name="internimage_t", model__options=options, train__epochs=1, train__warmup_epochs=0,
    test__steps=1, attack__statistics="running",
)
with jax.numpy_dtype_promotion("standard"):
    run.run(config, Path(sys.argv[1]))
np.save(f"{{sys.argv[1]}}-{{jax.process_index()}}.npy", seen)
"""


@pytest.mark.slow
class HostsTest(absltest.TestCase):
    def test_hosts_agree_on_running_statistics(self):
        """After every step, bit for bit, on all devices of all hosts, each of which saw others."""
        run = Path(self.create_tempdir()) / "run"
        codes, said = wait(start(2, 2, ["-c", STATISTICS, str(run)]), 600)
        self.assertEqual(codes, [0, 0], said)
        hosts = [np.load(f"{run}-{process}.npy") for process in range(2)]
        # f32[steps,mean and var,devices,features] of each host.
        self.assertEqual([host.shape for host in hosts], [(4, 2, 2, 10)] * 2)
        for host in hosts:
            for device in range(2):
                np.testing.assert_array_equal(host[:, :, device], hosts[0][:, :, 0])
        moved = np.abs(np.diff(hosts[0][:, :, 0], axis=0)).max(axis=2)
        self.assertGreater(moved.min(), 1e-4)
