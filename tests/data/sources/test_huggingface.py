"""Data sets of Hugging Face are read: from folders, from a hub, with their splits and columns."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from absl.testing import absltest, parameterized
from PIL import Image

from jaxrobust import data
from jaxrobust.data import imagenet
from jaxrobust.data.sources import huggingface
from tests.support import paths, sweeps
from tests.support.data_hub import DataHub
from tests.support.datasets import image_bytes
from tests.support.modules import hidden

try:
    import datasets
except ImportError:
    datasets = None  # type: ignore[assignment]

NEEDED = "needs Hugging Face's datasets: pip install 'jaxrobust[hf]'"
NAMES = ["ant", "bee", "cat"]


def file(number, size=(8, 6), mode="RGB", kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (number, 2 * number, 5)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def rows(count, first=0, **how):
    """Images as `datasets` keeps them."""
    return [
        {"bytes": file(first + i, **how), "path": f"image_{first + i}.png"} for i in range(count)
    ]


class NeededTest(absltest.TestCase):
    def test_without_the_extra(self):
        with (
            hidden("datasets"),
            self.assertRaisesRegex(
                data.DataError,
                r"^hf:me/digits needs Hugging Face's datasets: pip install 'jaxrobust\[hf\]'$",
            ),
        ):
            data.open_source("hf:me/digits", "test")

    def test_what_is_not_a_name(self):
        for name in ("hf:a b", "hf:a/b/c", "hf:@main"):
            with self.assertRaisesRegex(
                data.DataError, "is not the name of a data set; write hf:N"
            ):
                data.open_source(name, "test")
        for name in ("hf:/nowhere/x", "hf:./nowhere"):
            with self.assertRaisesRegex(data.DataError, "there is no directory .*nowhere"):
                data.open_source(name, "test")


@absltest.skipUnless(datasets, NEEDED)
class FolderCase(parameterized.TestCase):
    """A folder for parquet files, and a cache that goes with the test."""

    def setUp(self):
        super().setUp()
        self.folder = Path(self.create_tempdir()) / "set"
        self.folder.mkdir()
        cache = self.folder.parent / "cache"
        self.enter_context(mock.patch.object(datasets.config, "HF_DATASETS_CACHE", cache))
        bars = datasets.utils.logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        self.addCleanup(datasets.enable_progress_bars if bars else lambda: None)

    def write(self, split="train", images=None, labels=None, *, kinds=None, columns=None):
        """A parquet file of these columns; the name of the data set."""
        images = rows(12) if images is None else images
        labels = [i % 3 for i in range(len(images))] if labels is None else labels
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)} | (
            kinds or {}
        )
        found = {"image": images, "label": labels} | (columns or {})
        found = {key: value for key, value in found.items() if value is not None and kinds.get(key)}
        kinds = datasets.Features({key: kinds[key] for key in found})
        table = datasets.Dataset.from_dict(found, features=kinds)
        table.to_parquet(str(self.folder / f"{split}-00000-of-00001.parquet"))
        return f"hf:{self.folder}"

    def refused(self, name, pattern, split="train"):
        with self.assertRaisesRegex(data.DataError, pattern) as caught:
            data.open_source(name, split)
        self.assertNotIn("\n", str(caught.exception))


class FolderTest(FolderCase):
    def test_splits(self):
        name = self.write()
        self.write("validation", rows(5, 100))
        train = data.open_source(name, "train")
        self.assertEqual((len(train), train.num_classes, train.channels), (12, 3, 3))
        self.assertEqual(train.classes, tuple(NAMES))
        self.assertEqual(train.image_shape, (6, 8, 3))
        self.assertEqual(tuple(train[7]), (file(7), 1))
        self.assertEqual(train.describe(7), "image_7.png (record 7)")
        for split in ("validation", "val"):
            self.assertEqual(data.open_source(name, split)[4].image, file(104))
        part = data.open_source(name, "train[50%:]")
        self.assertEqual([record.label for record in part], [0, 1, 2] * 2)
        self.assertEqual(pickle.loads(pickle.dumps(part)).read([5, 0]), [train[11], train[6]])
        loaded = data.load(name, split="train[2:4]", image_size=6)
        self.assertEqual(loaded.images.shape, (2, 6, 6, 3))
        self.assertEqual(loaded.classes, tuple(NAMES))
        self.refused(name, r"no split 'test': it has train \(12\), validation \(5\); w", "test")

    def test_how_files_name_their_splits(self):
        self.write()
        content = (self.folder / "train-00000-of-00001.parquet").read_bytes()
        (self.folder / "results.jsonl").write_text('{"a": 1}\n')
        for file in ("test.parquet", "default/val/0000.parquet", "train-00001-of-00002.parquet"):
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).write_bytes(content)
        for split, size in (("train", 24), ("test", 12), ("validation", 12)):
            self.assertLen(data.open_source(f"hf:{self.folder}", split), size)

    def test_a_card_names_the_classes(self):
        plain = {"image": datasets.Value("binary"), "label": datasets.Value("int64")}
        name = self.write(images=[file(i) for i in range(6)], kinds=plain)
        names = "".join(f"          '{i}': {word}\n" for i, word in enumerate(NAMES))
        (self.folder / "README.md").write_text(
            "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n"
            f"    dtype:\n      class_label:\n        names:\n{names}---\n"
        )
        self.assertEqual(data.open_source(name, "train").classes, tuple(NAMES))

    def test_what_save_to_disk_wrote_is_the_same_data(self):
        name = self.write()
        every = datasets.load_dataset(str(self.folder))
        saved = self.folder.parent / "saved"
        every.save_to_disk(saved)
        first, other = (data.open_source(n, "train") for n in (name, f"hf:{saved}"))
        self.assertEqual(first.read(range(12)), other.read(range(12)))
        self.assertEqual(first.files_sha256, other.files_sha256)
        every["train"].shuffle(seed=0).save_to_disk(self.folder.parent / "one")
        one = data.open_source(f"hf:{self.folder.parent}/one", "train")
        self.assertNotEqual(one.files_sha256, first.files_sha256)
        self.assertCountEqual(one.read(range(12)), first.read(range(12)))

    def test_the_hash_is_of_labels_names_and_sizes(self):
        found = [data.open_source(self.write(), "train").files_sha256]
        found.append(data.open_source(self.write(), "train[:11]").files_sha256)
        found.append(data.open_source(self.write(labels=[0] * 12), "train").files_sha256)
        found.append(data.open_source(self.write(images=rows(12, 1)), "train").files_sha256)
        longer = rows(12)
        longer[3]["bytes"] += b"\0"  # the same name, another file
        found.append(data.open_source(self.write(images=longer), "train").files_sha256)
        self.assertLen(set(found), 5)
        self.assertEqual(data.open_source(self.write(), "train").files_sha256, found[0])

    def test_classes_and_ids(self):
        name = self.write()
        listed = self.folder.parent / "listed"
        listed.write_text("cat\nant\n")
        chosen = data.open_source(name, "train", classes=str(listed))
        self.assertEqual([record.label for record in chosen], [1, 0] * 4)
        listed.write_text("bee/image_4.png\nimage_3.png\n")
        chosen = data.open_source(name, f"train@{listed}")
        self.assertEqual([record.image for record in chosen], [file(4), file(3)])
        self.assertIsNone(chosen.files_sha256)

    def test_grey_images_and_many_sizes(self):
        grey = data.open_source(self.write(images=rows(3, mode="L")), "train")
        self.assertEqual((grey.channels, grey.image_shape), (1, (6, 8, 1)))
        both = rows(3) + rows(3, size=(5, 5), kind="JPEG")
        self.assertIsNone(data.open_source(self.write(images=both), "train").image_shape)

    def test_damaged_images(self):
        images = rows(12)
        images[3]["bytes"] = images[3]["bytes"][:20]
        images[5] = None
        name = self.write(images=images)
        loaded = data.load(name, split="train", image_size=6, strict=False)
        self.assertEqual(loaded.ids.tolist(), [0, 1, 2, 4, *range(6, 12)])
        with self.assertRaisesRegex(
            data.DataError, r"image_3.png \(record 3\) is damaged: .*; copy its files again"
        ):
            data.load(name, split="train", image_size=6)
        name = self.write(images=[{"bytes": b"no image", "path": "x"}] * 3)
        self.refused(name, r"none of record 0, record 1, record 2 \(3\) is an image")


class ColumnTest(FolderCase):
    def test_files_of_others(self):
        """Parquet without the types of `datasets`: bytes, integers, texts."""
        plain = {"image": datasets.Value("binary"), "label": datasets.Value("int64")}
        name = self.write(images=[file(i) for i in range(6)], kinds=plain)
        source = data.open_source(name, "train")
        self.assertEqual((source.num_classes, source.classes), (3, ()))
        self.assertEqual(tuple(source[4]), (file(4), 1))
        self.assertEqual(source.describe(4), "record 4")
        self.write("test", [file(0)], [5], kinds=plain)  # a class that no other split has
        self.assertEqual(data.open_source(name, "train").num_classes, 6)
        (self.folder / "test-00000-of-00001.parquet").unlink()
        structs = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        name = self.write(images=rows(3), kinds={"image": structs})
        self.assertEqual(data.open_source(name, "train").describe(2), "image_2.png (record 2)")
        texts = {"label": datasets.Value("string")}
        self.write("test", rows(2), ["dog", "bee"], kinds=texts)
        name = self.write(images=rows(3), labels=["cat", "ant", "cat"], kinds=texts)
        source = data.open_source(name, "train")
        self.assertEqual(source.classes, ("ant", "bee", "cat", "dog"))
        self.assertEqual([record.label for record in source], [2, 0, 2])

    def test_several_labels(self):
        """As CIFAR-100 has them on the hub."""
        kinds = {
            k: datasets.ClassLabel(names=n) for k, n in (("fine_label", NAMES), ("coarse", "ab"))
        }
        columns = {"fine_label": [2, 1, 0], "coarse": [1, 1, 0]}
        name = self.write(
            images=rows(3), labels=[0] * 3, kinds=kinds | {"label": None}, columns=columns
        )
        self.assertEqual(data.open_source(name, "train").num_classes, 3)
        coarse = data.open_source(f"{name}#coarse", "train")
        self.assertEqual([record.label for record in coarse], [1, 1, 0])
        self.refused(
            f"{name}#other", r"no column 'other': its columns are image \(.*coarse \(int64\)"
        )
        kinds["first"] = kinds.pop("fine_label")
        columns["first"] = columns.pop("fine_label")
        name = self.write(
            images=rows(3), labels=[0] * 3, kinds=kinds | {"label": None}, columns=columns
        )
        self.refused(
            name,
            "the label column of .* is unclear; write hf:.*#COLUMN, where COLUMN is one of coarse",
        )

    def test_no_image_classification_set(self):
        name = self.write(kinds={"label": datasets.Value("float32")})
        self.refused(
            name, "the label column of .* is unclear; write .* is one of image .*label .float32"
        )
        name = self.write(images=["a", "b"], kinds={"image": datasets.Value("string")})
        self.refused(
            name, r"has no image column: its columns are image \(string\), label \(int64\)"
        )

    def test_files_of_which_some_have_names(self):
        """Names of ImageNet's validation images on the hub carry their class, which is cut off."""
        import pyarrow

        name = "ILSVRC2012_val_00000007_n01440764.JPEG"
        given = [(b"abc", f"val/{name}"), (b"de", None), (None, "train/n01440764_1.JPEG")]
        images = pyarrow.array([{"bytes": data, "path": path} for data, path in given])
        names, sizes = huggingface._files(images)
        self.assertEqual(names, ["ILSVRC2012_val_00000007.JPEG", "", "n01440764_1.JPEG"])
        self.assertEqual(sizes, [3, 2, 0])
        nameless = pyarrow.array([{"bytes": b"abc", "path": None}], images.type)
        self.assertEqual(huggingface._files(nameless), (None, [3]))

    @sweeps.rows(
        (["L", "1"], (6, 8), 1),
        (["L", "RGB"], (6, 8), 3),
        (["RGBA", "RGBA"], (6, 8), 3),
    )
    def test_channels_and_sides_of_what_is_looked_at(self, modes, shape, channels):
        images = [{"bytes": file(3, mode=mode), "path": None} for mode in modes]

        def looked():
            source = data.open_source(self.write(images=images), "train")
            return source.channels, source.image_shape

        self.assertEqual(looked(), (channels, (*shape, channels)))
        images[1]["bytes"] = file(3, size=(6, 8))  # on its side
        self.assertIsNone(looked()[1])
        images[1]["bytes"] = b"no image"
        self.assertEqual(looked()[1][:2], shape)

    def test_a_split_without_labels(self):
        """Labels of -1, as ImageNet's test split has them, or none."""
        self.write("test", rows(4), [-1] * 4)
        name = self.write()
        self.assertLen(data.open_source(name, "train"), 12)
        said = "label holds -1, which is not a class; a split published without labels cannot"
        self.refused(name, said, "test")
        self.write("test", rows(4), [0, 1, None, 2])
        self.refused(name, "label is missing in some records; give a labeled split", "test")

    def test_imagenet_s_lists_by_its_names_on_the_hub(self):
        synsets, lines = imagenet.synsets(), imagenet.robustbench()[:4]
        numbers = [line.rpartition("/")[2].removesuffix(".JPEG") for line in lines]
        labels = [synsets.index(line.partition("/")[0]) for line in lines]
        images = [
            {"bytes": image_bytes(i), "path": f"{number}_{synsets[label]}.JPEG"}
            for i, (number, label) in enumerate(zip(numbers, labels, strict=True))
        ]
        words = datasets.ClassLabel(names=[f"word {i}" for i in range(1000)])
        name = self.write("validation", images[::-1], labels[::-1], kinds={"label": words})
        with mock.patch.object(imagenet, "robustbench", lambda: lines):
            from jaxrobust.data.splits import subsets

            with mock.patch.dict(subsets._LISTS, robustbench=lambda: lines):
                source = data.open_source(name, "val@robustbench")
                self.assertEqual([record.label for record in source], labels)
                self.assertEqual(source[0].image, image_bytes(0))
                wrong = [(label + 1) % 1000 for label in labels[::-1]]
                name = self.write("validation", images[::-1], wrong, kinds={"label": words})
                self.refused(name, "disagrees with .* about 4 of 4", "val@robustbench")


class RefusedTest(FolderCase):
    def test_a_folder_that_is_none(self):
        self.refused(f"hf:{self.folder}", "holds no parquet files; put SPLIT.parquet there")
        (self.folder / "train.parquet").write_bytes(b"PAR1 not really")
        self.refused(f"hf:{self.folder}", "cannot be loaded: Parquet .*; copy its files again")
        (self.folder / "train.parquet").unlink()
        (self.folder / "set.py").write_text("raise SystemExit")
        self.refused(
            f"hf:{self.folder}", "it is a loading script, which is never run; hf:NAME@refs/convert/"
        )


ON_THE_HUB = """
import json, sys
from jaxrobust import data

def said(name, split="train"):
    try:
        source = data.open_source(name, split)
        return [len(source), source[1].label, source.describe(1)]
    except (data.DataError, ConnectionError) as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps({name: said(f"hf:{name}") for name in sys.argv[1:]}))
"""


@absltest.skipUnless(datasets, NEEDED)
class RevisionTest(parameterized.TestCase):
    """Which commit is asked for, on a hub that is made up."""

    COMMIT, OTHER = "ab12" * 10, "cd34" * 10

    def ask(self, revision, *, there=COMMIT, fails=None, cached=COMMIT):
        """The revision that is loaded; `there`: the commit that a name means."""
        from huggingface_hub import HfApi

        files = [{"filename": f"/cache/me/{cached}/x.arrow"}] if cached else []
        made = {"train": mock.Mock(cache_files=files)}
        known = mock.Mock(sha=there)
        out = io.StringIO()
        with (
            mock.patch.object(datasets, "load_dataset", return_value=made) as load,
            mock.patch.object(HfApi, "dataset_info", side_effect=fails, return_value=known) as info,
            contextlib.redirect_stderr(out),
        ):
            address = huggingface._Address("me/x", "small", revision, None, None)
            self.assertIs(huggingface._from_hub(address), made)
        self.assertEqual(load.call_args.args, ("me/x", "small"))
        self.assertIn("hf:me/x: contacting the hub", out.getvalue())
        self.assertEqual(info.call_args_list, [mock.call("me/x", revision=revision)] * info.called)
        return load.call_args.kwargs["revision"], info.called

    def test_a_name_is_looked_up_and_a_commit_is_not(self):
        self.assertEqual(self.ask(None), (None, False))
        self.assertEqual(self.ask("main"), (self.COMMIT, True))
        self.assertEqual(self.ask(self.COMMIT), (self.COMMIT, False))
        self.assertEqual(self.ask(self.COMMIT[1:]), (self.COMMIT, True))  # no whole commit

    def test_files_of_another_commit_are_refused(self):
        for revision in ("main", self.COMMIT):
            with self.assertRaisesRegex(data.DataError, f"^hf:me/x has no revision {revision}$"):
                self.ask(revision, cached=self.OTHER)
            self.assertEqual(self.ask(revision, cached=None)[0], self.COMMIT)  # kept in memory
        self.assertEqual(self.ask(None, cached=self.OTHER), (None, False))

    def test_what_the_hub_does_not_say(self):
        from huggingface_hub import errors

        missing = mock.Mock(headers={}, request=mock.Mock())
        none = errors.RevisionNotFoundError("no such", response=missing)
        with self.assertRaisesRegex(data.DataError, "^hf:me/x has no revision v9$"):
            self.ask("v9", fails=none)
        with self.assertRaisesRegex(ConnectionError, "^cannot resolve the revision v9: down$"):
            self.ask("v9", fails=OSError("down.\nmore"))
        nobody = errors.RepositoryNotFoundError("no set", response=missing)
        self.assertEqual(self.ask("v9", fails=nobody, cached="v9"), ("v9", True))


@absltest.skipUnless(datasets, NEEDED)
class HubTest(FolderCase):
    @pytest.mark.slow
    def test_by_name(self):
        self.write()
        files = {f"data/{path.name}": path.read_bytes() for path in self.folder.iterdir()}
        hub = DataHub({"me/digits": files, "me/gated": files}, gated="me/gated")
        self.addCleanup(hub.close)
        commit, home = hub.commit("me/digits"), self.folder.parent / "home"
        environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home)}
        environment |= {"PYTHONPATH": str(paths.ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

        def ask(*names, **more):
            done = subprocess.run(
                [sys.executable, "-c", ON_THE_HUB, *names],
                env=environment | more,
                capture_output=True,
                text=True,
            )
            self.assertEqual(done.returncode, 0, done.stderr)
            return json.loads(done.stdout.splitlines()[-1])

        right = [12, 1, "image_1.png (record 1)"]
        names = ["me/digits", f"me/digits@{commit}", "me/digits@main", "me/digits:default"]
        bad = {
            "me/digits@v9": "hf:me/digits has no revision v9",
            f"me/digits@{'0' * 40}": f"Revision '{'0' * 40}' doesn't exist for dataset 'me/digits'",
            "me/digits:other": "its configurations are default; write hf:me/digits:CONFIG, wi",
            "me/other": "'me/other' doesn't exist .*; check the name and the revision, or",
            "me/gated": "gated dataset on the Hub.*log in with `hf auth login`",
        }
        found = ask(*names, *bad)
        for name in names:
            self.assertEqual(found[name], right)
        for name, pattern in bad.items():
            self.assertRegex(found[name], f"^DataError: .*{pattern}", name)
        # What is in the cache needs no network; what is not says so.
        found = ask(
            "me/digits", f"me/digits@{commit}", "me/new", "me/digits@main", HF_HUB_OFFLINE="1"
        )
        self.assertEqual([found["me/digits"], found[f"me/digits@{commit}"]], [right, right])
        self.assertRegex(
            found["me/new"],
            "^ConnectionError: hf:me/new: the hub does not answer .*, and the data set is not in "
            "the cache; try again, or give a folder with its parquet files as hf:FOLDER$",
        )
        self.assertRegex(found["me/digits@main"], "^ConnectionError: .*which commit main is")
