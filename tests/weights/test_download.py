"""Downloads against servers on this machine that behave as the hub, a drive and others do."""

import hashlib
from pathlib import Path

import numpy as np

from jaxrobust.weights.fetch import remote_weights
from tests.support import sweeps
from tests.support.modules import hidden
from tests.support.servers import ServedCase

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class LocalCase(ServedCase):
    """A server that has a file."""

    def setUp(self):
        super().setUp()
        self.server.files = {"/w/weights.pth": CONTENT}
        self.url = f"{self.server.address}/w/weights.pth"
        self.said: list[str] = []

    def fetch(self, source=None, **how) -> Path:
        return remote_weights.fetch(source or self.url, tell=self.said.append, **how)[0]


class UrlTest(LocalCase):
    def test_a_dropped_connection_is_resumed(self):
        self.server.cut_after = [100_000, 50_000]
        path = self.fetch(sha256=SHA256.upper())
        self.assertEqual(path.read_bytes(), CONTENT)
        ranges = [asked[2] for asked in self.server.asked]
        self.assertEqual(ranges, [None, "bytes=100000-", "bytes=150000-"])
        self.assertEqual(self.left(), ["weights.pth"])
        self.assertIn("trying again", " ".join(self.said))

    def test_other_bytes_than_those_asked_for_are_not_appended(self):
        self.server.cut_after, self.server.ahead = [100_000], 1
        self.assertEqual(self.fetch().read_bytes(), CONTENT)  # without a hash to tell
        self.assertEqual([asked[2] for asked in self.server.asked], [None, "bytes=100000-", None])
        self.assertIn("asked for bytes 100000-, but the server sent bytes 100001-", str(self.said))

    def test_another_process_continues(self):
        self.server.cut_after = [100_000, 0, 0, 0, 0, 0]
        with self.assertRaisesRegex(OSError, "ended early, 5 times.*100,000 bytes are saved"):
            self.fetch()
        self.server.asked.clear()
        self.assertEqual(self.fetch().read_bytes(), CONTENT)
        self.assertEqual([asked[2] for asked in self.server.asked], ["bytes=100000-"])

    def test_two_at_once(self):
        """Which wrote into each other's file: the first to end took it with holes."""
        asked = []

        def tell(line):
            with self.assertRaisesRegex(ValueError, f"the download of {self.url} is in use by"):
                self.fetch()
            asked.append(line)

        remote_weights.fetch(self.url, tell=tell)
        self.assertNotEmpty(asked)
        self.assertEqual(self.fetch().read_bytes(), CONTENT)

    def test_a_file_that_changed_starts_again(self):
        self.server.cut_after = [100_000, 0, 0, 0, 0, 0]
        with self.assertRaises(OSError):
            self.fetch()
        other = CONTENT[::-1]
        self.server.files["/w/weights.pth"] = other
        self.assertEqual(self.fetch().read_bytes(), other)
        self.assertIn("the file changed", " ".join(self.said))

    def test_a_server_without_ranges_starts_again(self):
        self.server.ranges, self.server.cut_after = False, [100_000]
        self.assertEqual(self.fetch().read_bytes(), CONTENT)
        self.assertIn("cannot resume", " ".join(self.said))

    def test_web_pages_and_missing_files(self):
        with self.assertRaisesRegex(ValueError, "answers 404 .*no such file; check the address"):
            self.fetch(self.server.address + "/nowhere.pth")
        self.server.kind = "text/html; charset=utf-8"
        with self.assertRaisesRegex(ValueError, "web page, not a file.*open it in a browser"):
            self.fetch()
        self.assertEmpty(self.left())

    def test_no_server_is_another_mistake(self):
        self.server.close()
        with self.assertRaisesRegex(
            remote_weights.Unreachable,
            "refused, 5 times in a row; if .* no network, run `curl -L -o .* http.*give the file$",
        ):
            self.fetch()

    @sweeps.rows(
        ("ftp://there/file.pth", "give a file, https"),
        ("https://host/", "names no file"),
        ("hf://timm", "write hf://ORG/REPO"),
        ("hf://timm/x y", "write hf://ORG/REPO"),
    )
    def test_sources_that_are_none(self, source, message):
        with self.assertRaisesRegex(ValueError, message):
            self.fetch(source)

    @sweeps.rows(
        ("hf://timm/convnext_tiny.fb_in1k", ("timm/convnext_tiny.fb_in1k", None, None)),
        ("hf://a/b@v1.0", ("a/b", "v1.0", None)),
        ("hf://a/b@refs%2Fpr%2F1/c/d.pth", ("a/b", "refs/pr/1", "c/d.pth")),
        ("hf://a/b/c.bin", ("a/b", None, "c.bin")),
    )
    def test_names_on_the_hub(self, source, expected):
        self.assertEqual(remote_weights.parse_hub(source), expected)


# What Google Drive sends before a large file, and where it sends none, in their essence.
ASKS = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<p>weights.pth (1G) is too large for Google to scan for viruses.</p>
<form id="download-form" action="/download" method="get">
<input type="submit" id="uc-download-link" value="Download anyway"/>
<input type="hidden" name="id" value="KEY"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a-b">
</form></body></html>"""
QUOTA = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can't view or download this file at this time.</p>"""


class DriveTest(LocalCase):
    """A drive that sends web pages, as Google's does."""

    def setUp(self):
        super().setUp()
        self.asked = "/uc?export=download&confirm=t&id=KEY"
        self.url = self.server.address + self.asked
        self.confirmed = "/download?id=KEY&export=download&confirm=t&uuid=a-b"

    def test_the_question_whether_it_is_meant_is_answered(self):
        self.server.pages[self.asked] = ASKS
        self.server.files[self.confirmed] = CONTENT
        self.server.cut_after = [100_000]
        path = self.fetch(name="Salman2020Do_R18.pt", sha256=SHA256)
        self.assertEqual(path.read_bytes(), CONTENT)
        self.assertEqual(path.name, "Salman2020Do_R18.pt")
        again = [(self.asked, "bytes=100000-"), (self.confirmed, "bytes=100000-")]
        first = [(self.asked, None), (self.confirmed, None)]
        self.assertEqual([asked[1:] for asked in self.server.asked], first + again)

    def test_a_page_that_only_asks_again_is_no_file(self):
        self.server.pages |= {self.asked: ASKS, self.confirmed: ASKS}
        with self.assertRaisesRegex(ValueError, "web page .'Google Drive - Virus scan warning'"):
            self.fetch(name="x.pt")
        self.assertLen(self.server.asked, 2)

    def test_a_quota(self):
        self.server.pages[self.asked] = QUOTA
        with self.assertRaisesRegex(
            ValueError, "web page .'Google Drive - Quota exceeded'., not a file.*in a browser, save"
        ):
            self.fetch(name="x.pt")
        self.assertEmpty(self.left())

    def test_forbidden(self):
        self.server.refusals["/uc"] = 403, ""
        with self.assertRaisesRegex(
            ValueError,
            "answers 403 Forbidden: access is forbidden; download it in a browser and give",
        ):
            self.fetch(name="x.pt")
        self.assertLen(self.server.asked, 1)
        self.assertEmpty(self.left())


class HashTest(LocalCase):
    def test_how_it_begins_is_enough_where_no_more_is_published(self):
        self.assertEqual(self.fetch(sha256=SHA256[:8]).read_bytes(), CONTENT)
        with self.assertRaisesRegex(
            ValueError, "expected 0123abcd: a different or.*it was removed"
        ):
            self.fetch(sha256="0123abcd")
        self.assertEmpty(self.left())
        with self.assertRaisesRegex(ValueError, "expected"):
            self.fetch(sha256=SHA256[:7])  # too short to tell anything

    def test_in_the_address(self):
        self.assertEqual(self.fetch(f"{self.url}#sha256={SHA256}").read_bytes(), CONTENT)
        with self.assertRaisesRegex(ValueError, f"has sha256 {SHA256}, expected {'0' * 64}"):
            self.fetch(f"{self.url}#sha256={'0' * 64}")


class HubTest(LocalCase):
    """The hub's own client against the answers that it needs, on this machine."""

    def setUp(self):
        super().setUp()
        self.hub()

    def test_safetensors_before_bin_and_the_settings_beside(self):
        place = "/timm/net/resolve/main/"
        self.server.files = {place + "pytorch_model.bin": CONTENT, place + "config.json": b"{}"}
        path, settings = remote_weights.fetch("hf://timm/net", sha256=SHA256, tell=self.said.append)
        self.assertEqual(path.name, "pytorch_model.bin")
        self.assertEqual(path.read_bytes(), CONTENT)
        self.assertEqual(settings.read_text(), "{}")
        self.server.files[place + "model.safetensors"] = b"better"
        self.assertEqual(self.fetch("hf://timm/net").name, "model.safetensors")

    def test_revision_and_file(self):
        self.server.files = {"/a/b/resolve/v1/sub/net.pth": CONTENT}
        self.assertEqual(self.fetch("hf://a/b@v1/sub/net.pth").read_bytes(), CONTENT)

    def test_no_such_file(self):
        with self.assertRaisesRegex(ValueError, "a/b holds no model.safetensors or pytorch_model"):
            self.fetch("hf://a/b")

    def test_a_repository_without_weights(self):
        self.server.repository("a/b", {"README.md": b"", "nets/best.pth": b"", "x.npz": b""})
        with self.assertRaisesRegex(
            ValueError, "model.safetensors or .*; name one of its files: hf://a/b/nets/best.pth$"
        ):
            self.fetch("hf://a/b")
        self.server.repository("a/c", {"README.md": b""})
        with self.assertRaisesRegex(ValueError, "; choose a repository with PyTorch weights"):
            self.fetch("hf://a/c")

    @sweeps.rows(
        (403, "GatedRepo", "consent first: give it at https://huggingface.co/a/b, log in with .hf"),
        (401, "RepoNotFound", "a/b does not exist on the hub, or is private; .*`hf auth login`"),
        (404, "RevisionNotFound", "a/b has no revision"),
    )
    def test_refusals(self, status, code, message):
        self.server.refusals["/a/b"] = status, code
        with self.assertRaisesRegex(ValueError, f"hf://a/b: .*{message}"):
            self.fetch("hf://a/b")

    def test_no_network(self):
        self.server.close()
        with self.assertRaisesRegex(
            remote_weights.Unreachable,
            "does not answer.*not in the cache; try again, set HF_ENDPOINT to a mirror, or run "
            "`hf download a/b model.safetensors config.json --revision v1 --local-dir DIR` on a "
            "machine with network access and give DIR",
        ):
            self.fetch("hf://a/b@v1")

    def test_the_hash_that_the_hub_says(self):
        self.server.repository("a/b", {"model.safetensors": CONTENT, "config.json": b"{}"})
        self.server.linked["/a/b/resolve/main/model.safetensors"] = SHA256
        self.assertEqual(self.fetch("hf://a/b").read_bytes(), CONTENT)
        self.server.repository("a/c", {"model.safetensors": CONTENT[::-1]})
        self.server.linked["/a/c/resolve/main/model.safetensors"] = SHA256
        with self.assertRaisesRegex(
            ValueError,
            f"does not have the hub's sha256 .{SHA256}., so the download was damaged and has been "
            "removed; run",
        ):
            self.fetch("hf://a/c")
        self.server.files["/a/c/resolve/main/model.safetensors"] = CONTENT
        self.assertEqual(self.fetch("hf://a/c").read_bytes(), CONTENT)

    def test_without_its_client(self):
        with (
            hidden("huggingface_hub"),
            self.assertRaisesRegex(ValueError, r"pip install 'jaxrobust\[hub\]'"),
        ):
            self.fetch("hf://a/b")
