"""Which folders are bundles, and what the file of networks says of them."""

from pathlib import Path

from absl.testing import parameterized

from jaxrobust.results.board import listing

TEXT = '[a]\nweights = "w"\nname = "A"\n["b/deep"]\nfunction = "n.py:f"\nsplit = "test"\n'


class ListingTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.root = Path(self.create_tempdir())

    def bundle(self, name, *, file="SHA256SUMS") -> Path:
        folder = self.root / name
        folder.mkdir(parents=True)
        (folder / file).write_text("")
        return folder

    def test_bundles_and_folders_of_them(self):
        b, a = self.bundle("all/b"), self.bundle("all/a", file="bundle.json")
        alone = self.bundle("alone", file="images.jsonl")
        self.bundle("all/.c.part")  # one that is being written
        self.bundle("all/out", file="results.jsonl")
        found = listing.find([self.root / "all", alone, b])
        self.assertEqual([one.folder for one in found], [a, b, alone])
        self.assertTrue(all(not one.flags for one in found))

    def test_networks_beside_the_bundles(self):
        self.bundle("a")
        deep = self.bundle("b/deep")
        (self.root / "networks.toml").write_text(TEXT)
        (a,) = listing.find([self.root])
        self.assertEqual(a.given, {"weights": "w", "name": "A"})
        self.assertEqual(a.flags, {"weights": "w"})
        self.assertEqual(listing.find([deep])[0].given, {})  # whose folder has no such file
        (one,) = listing.find([deep], self.root / "networks.toml")
        self.assertEqual(one.given, {})  # it is named by its path from elsewhere
        text = TEXT.replace("b/deep", str(deep))
        (self.root / "others.toml").write_text(text)
        (one,) = listing.find([deep], self.root / "others.toml")
        self.assertEqual(one.flags, {"function": "n.py:f", "split": "test"})

    def test_mistakes_in_the_file_of_networks(self):
        self.bundle("a")
        for text, said in (
            ("[a", "is not TOML .*; correct it"),
            ("a = 3", "a is not a section; write"),
            ('[a]\nweigths = "w"', r"\[a\] has weigths; did you mean weights\?"),
            ("[a]\nweights = 3", r"weights of \[a\] is 3; write a string"),
            ('[a]\nsplit = "test"', r"\[a\] names no network; give it weights or function"),
            ('[a]\nweights = "w"\nfunction = "f"', r"\[a\] names two networks; leave weights or"),
        ):
            with self.subTest(row=(text, said)):
                (self.root / "networks.toml").write_text(text)
                with self.assertRaisesRegex(ValueError, f"networks.toml.*{said}"):
                    listing.find([self.root])

    def test_nothing_there(self):
        empty = self.root / "empty"
        with self.assertRaisesRegex(ValueError, "empty is not a folder; name bundles, or a folder"):
            listing.find([empty])
        empty.mkdir()
        with self.assertRaisesRegex(ValueError, "empty holds no bundle; name folders that `jax"):
            listing.find([empty])
        with self.assertRaisesRegex(ValueError, "toml does not exist; name a file of networks"):
            listing.find([self.bundle("a")], self.root / "none.toml")
