"""Arrays split over several hosts: the hashes of each host's blocks are compared on reading."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxrobust.weights.store import blocks
from tests.support.processes import start, wait

COMMAND = """
import contextlib, sys
from pathlib import Path
from jaxrobust.runtime.processes.launch import join_hosts
if sys.argv[3] != "1":
    join_hosts()
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrobust.runtime.devices import sharding
from jaxrobust.types import Weights
from jaxrobust.weights.store.checkpoint import Checkpoints

folder, row = Path(sys.argv[1]), int(sys.argv[2])
mesh = sharding.make_mesh(fsdp=jax.device_count())
values = {"split": np.arange(32, dtype=np.float32).reshape(8, 4), "equal": np.ones(3, np.float32)}
places = {"split": PartitionSpec("fsdp"), "equal": PartitionSpec()}
places = Weights({name: NamedSharding(mesh, place) for name, place in places.items()}, {})
if row >= 0:
    values["split"][row] += 1
with contextlib.closing(Checkpoints(folder, read_only=row == -1)) as files:
    if row == -1:
        shaped = lambda value, place: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place)
        try:
            files.restore(4, jax.tree.map(shaped, Weights(values, {}), places))
        except ValueError as error:
            sys.exit(str(error))
    else:
        def array(value, place):
            return jax.make_array_from_callback(value.shape, place, value.__getitem__)
        files.save(4, jax.tree.map(array, Weights(values, {}), places), {})
        files.wait()
"""


def ran(processes: int, folder: Path, row: int = -1) -> tuple[list[int], list[str]]:
    """Read a checkpoint whose array is split over these processes, or write it with a changed row.

    -1 reads; -2 writes without a change.
    """
    return wait(start(processes, 1, ["-c", COMMAND, str(folder), str(row), str(processes)]))


@pytest.mark.slow
class HostsTest(absltest.TestCase):
    def test_damage_on_one_host_stops_all(self):
        folder = Path(self.create_tempdir())
        codes, said = ran(2, folder / "whole", -2)
        self.assertEqual(codes, [0, 0], said)
        meta = folder / "whole" / "4" / "meta"
        self.assertEqual({p.name for p in meta.glob("blocks*")}, {"blocks_0", "blocks_1"})
        for row in (1, 6):  # of the first process, of the second
            codes, said = ran(2, folder / str(row), row)
            self.assertEqual(codes, [0, 0], said)
            shutil.rmtree(folder / str(row) / "4" / "meta")
            shutil.copytree(meta, folder / str(row) / "4" / "meta")
        for processes in (2, 1):
            codes, said = ran(processes, folder / "whole")
            self.assertEqual(codes, [0] * processes, said)
            self.assertNotIn("unnoticed", said[0])
            for row in (1, 6):
                codes, said = ran(processes, folder / str(row))
                self.assertEqual(codes, [1] * processes, said)
                for text in said:
                    self.assertIn("is damaged (params/split has a different sha256", text)
        codes, said = ran(4, folder / "whole")  # none of which holds a block
        self.assertEqual(codes, [0] * 4, said)
        self.assertIn("cannot compare the hashes of 1 of its arrays", said[0])

        path = meta / "blocks_1"
        content = path.read_bytes()
        path.unlink()  # what it covers is not taken for compared
        codes, said = ran(2, folder / "whole")
        self.assertEqual(codes, [0, 0], said)
        self.assertIn("cannot compare the hashes of 1 of its arrays", said[0])
        path.write_bytes(content)
        path.write_text(path.read_text().replace("4:8", "0:4"))
        codes, said = ran(2, folder / "whole")
        self.assertEqual(codes, [1, 1], said)
        self.assertIn("is damaged (meta/blocks_1 has a different sha256", said[0])


class BlockTest(parameterized.TestCase):
    @parameterized.parameters(
        ("", (slice(None), slice(None))),
        ("0:8,0:4", (slice(None), slice(None))),
        ("2:7,0:3", (slice(2, 7), slice(0, 3))),
        ("7:8,1:2", (slice(7, 8), slice(1, 2))),
    )
    def test_blocks_of_an_array_on_many_devices(self, index, expected):
        values = np.arange(32, dtype=np.float32).reshape(8, 4)
        mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
        for spec in (("a", "b"), ("b", None), (None, "a"), ()):
            array = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
            np.testing.assert_array_equal(blocks.block(array, index), values[expected])
