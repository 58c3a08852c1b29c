"""Which weights a file of PyTorch's holds under which key, and files in parts."""

from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized
from safetensors.numpy import save_file

from jaxrobust.weights.store import files
from tests.support import paths, sweeps

try:
    import torch
except ImportError:
    torch = None

# Keys of a checkpoint, and what is read where none, the averaged or the raw weights are asked for:
# "kind of place", or a word of the refusal.
PLACES = (
    ("state_dict", "- of state_dict", "says not", "says not"),
    ("model_state_dict net", "- of model_state_dict", "says not", "says not"),
    ("net model state_dict", "- of state_dict", "says not", "says not"),
    ("model model_ema", "ema of model_ema", "ema of model_ema", "raw of model"),
    ("state_dict_ema state_dict", *["ema of state_dict_ema"] * 2, "raw of state_dict"),
    ("swa_model_state_dict", "ema of swa_model_state_dict", "ema of swa_model_state_dict", "only"),
    ("wa_net net", *["ema of wa_net"] * 2, "raw of net"),
    (
        "model_state_dict unaveraged_model_state_dict",
        *["ema of model_state_dict"] * 2,
        "raw of unaveraged_model_state_dict",
    ),
    (
        "net model_state_dict unaveraged_model_state_dict",
        *["ema of model_state_dict"] * 2,
        "raw of unaveraged_model_state_dict",
    ),
    (
        "unaveraged_model_state_dict net",
        "- of net",
        "says not",
        "raw of unaveraged_model_state_dict",
    ),
    ("unaveraged_net", "raw of unaveraged_net", "only", "raw of unaveraged_net"),
    *(
        (f"{raw} {ema}", *[f"ema of {ema}"] * 2, f"raw of {raw}")
        for raw, ema in (
            ("net", "ema_model"),
            ("model_state_dict", "ema_state_dict"),
            ("model_state_dict", "model_ema_state_dict"),
            ("model_state_dict", "ema_model_state_dict"),
            ("model", "swa_model"),
        )
    ),
    ("ema/module model", *["ema of ema/module"] * 2, "raw of model"),
    ("ema/shadow", *["ema of ema/shadow"] * 2, "only"),
    ("model/state_dict", "- of model/state_dict", "says not", "says not"),
    ("epoch", "holds no", "holds no", "holds no"),
)


@absltest.skipIf(torch is None, paths.PARITY)
class StateTest(parameterized.TestCase):
    @sweeps.rows(*PLACES)
    def test_place(self, keys, *expected):
        tree = {"epoch": 3, "optimizer": {"state": {}}}
        for number, key in enumerate(key for key in keys.split() if key != "epoch"):
            outer, _, inner = key.partition("/")
            state = {"w": torch.full((2,), float(number))}
            tree[outer] = {inner: state, "other": 1} if inner else state
        places = [key for key in keys.split() if key != "epoch"]
        for which, wanted in zip((None, "ema", "raw"), expected, strict=True):
            kind, _, place = wanted.partition(" of ")
            if not place:
                message = {"only": "only .*, under", "says not": "does not say whether"}
                with self.assertRaisesRegex(ValueError, f"a.pt.*{message.get(wanted, wanted)}"):
                    files._state(Path("a.pt"), tree, which)
                continue
            found = files._state(Path("a.pt"), tree, which)
            self.assertEqual((found.facts.which or "-", found.facts.place), (kind, place))
            self.assertEqual(found.arrays["w"].tolist(), [places.index(place)] * 2)

    def test_arrays_alone(self):
        found = files.state_dict({"a": torch.ones(1), "b": torch.zeros(2)}, None)
        self.assertEqual((found.facts.which, found.facts.place), (None, ""))
        self.assertEqual([*found.arrays], ["a", "b"])
        self.assertIsNone(files.state_dict({}, None))
        self.assertIsNone(files.state_dict([torch.ones(1)], None))
        deep = {"w": torch.ones(1)}
        for _ in range(4):
            deep = {"model": deep}
        self.assertEqual(files.state_dict(deep, None).facts.place, "model/model/model/model")
        self.assertIsNone(files.state_dict({"model": deep}, None))

    @sweeps.rows(
        (
            torch.bfloat16 if torch else None,
            "w is torch.bfloat16; rounding would change the weights",
        ),
        (torch.complex64 if torch else None, "w is torch.complex64"),
    )
    def test_types(self, dtype, message):
        file = Path(self.create_tempdir(), "net.pt")
        torch.save({"w": torch.full((2, 3), 0.5, dtype=dtype), "n": torch.tensor(7)}, file)
        with self.assertRaisesRegex(ValueError, message):
            files.read(file)
        if dtype == torch.bfloat16:
            found = files.artifact(file, cast=True).arrays
            self.assertEqual((found["w"].dtype, found["n"].dtype), (np.float32, np.int64))
            np.testing.assert_array_equal(found["w"], np.full((2, 3), 0.5))

    def test_strides_are_honoured(self):
        file = Path(self.create_tempdir(), "net.pth")
        torch.save({"w": torch.arange(6.0).view(2, 3).T}, file)
        found = files.read(file)["w"]
        np.testing.assert_array_equal(found, np.arange(6.0).reshape(2, 3).T)
        self.assertTrue(found.flags.c_contiguous)


class PartsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir())

    def part(self, number, count=2, **arrays):
        file = self.folder / f"net-{number:05d}-of-{count:05d}.safetensors"
        save_file({k: np.float32([v]) for k, v in arrays.items()}, file)
        return file

    def test_all_parts_are_read_whichever_is_named(self):
        files_of = [self.part(1, a=1, b=2), self.part(2, c=3)]
        for file in files_of:
            found = files.read(file)
            self.assertEqual(
                {k: v.tolist() for k, v in found.items()}, {"a": [1], "b": [2], "c": [3]}
            )

    def test_a_part_that_is_not_there_and_an_array_that_is_there_twice(self):
        first = self.part(1, 3, a=1)
        with self.assertRaisesRegex(
            ValueError, "is one of 3 parts, .* get net-00002-of-00003.*, net-00003-of-00003"
        ):
            files.read(first)
        first = self.part(1, a=1)
        self.part(2, a=2)
        with self.assertRaisesRegex(ValueError, r"00002-of-00002.*repeats \['a'\] of an"):
            files.read(first)
        first = self.part(1, d=1, c=1, b=1, a=1)
        self.part(2, d=2, c=2, b=2, a=2)
        with self.assertRaisesRegex(ValueError, r"repeats \['a', 'b', 'c'\] of an"):
            files.read(first)

    def test_refusals(self):
        with self.assertRaisesRegex(ValueError, "which='best' must be one of ema, raw, or None"):
            files.artifact(self.folder / "a.pt", weights_kind="best")
        with self.assertRaisesRegex(ValueError, "a.pt: no such file; give one of .safetensors"):
            files.read(self.folder / "a.pt")
        (self.folder / "a.npz").write_text("x")
        with self.assertRaisesRegex(ValueError, "a.npz: unknown kind of file; give one of"):
            files.read(self.folder / "a.npz")
        empty = self.folder / "b.safetensors"
        save_file({}, empty)
        with self.assertRaisesRegex(ValueError, "holds no arrays; download it again"):
            files.read(empty)

    def test_halves_are_cast_and_whole_numbers_stay(self):
        file = self.folder / "c.safetensors"
        arrays = {
            "h": np.float16([0.1]),
            "d": np.float64([0.1]),
            "i": np.int64([3]),
            "b": np.bool_([1]),
        }
        save_file(arrays, file)
        found = files.artifact(file, cast=True).arrays
        self.assertEqual(
            {k: a.dtype.name for k, a in found.items()},
            {"h": "float32", "d": "float32", "i": "int64", "b": "bool"},
        )
        self.assertEqual(found["h"][0], np.float32(np.float16(0.1)))
        self.assertEqual(files.read(file)["d"].dtype, np.float64)
