"""An epoch of real photographs with worker processes; kills at random; other hosts and workers."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxrobust.data.sources import registry
from jaxrobust.data.stream import pipeline
from tests.support import paths
from tests.support.paths import NO_SHARED, SHARED

PHOTOGRAPHS = SHARED / "data" / "imagenet_samples"  # one of each of 200 classes
OPTIONS = {"batch_size": 24, "seed": 5, "augmentation": "heavy", "image_size": 32}

# Consumes batches from where its log ends, one line each: position, digest of images and labels.
CONSUMER = """
import contextlib, hashlib, json, sys
from jaxrobust.data import pipeline, sources

def main():
    folder, log, workers, hosts, options = sys.argv[1:6]
    options, workers, hosts = json.loads(options), int(workers), int(hosts)
    with open(log, "a+") as lines:
        lines.seek(0)
        start = sum(1 for line in lines if line.endswith("\\n")) * options["batch_size"]
        source = sources.open_source(f"folder:{folder}", "all")
        parts = [
            pipeline.train_batches(
                source, start=start, workers=workers, process_index=i, process_count=hosts,
                **options,
            )
            for i in range(hosts)
        ]
        for batches in zip(*parts):
            digest = hashlib.sha256()
            for field in ("images", "labels"):
                for batch in batches:
                    digest.update(getattr(batch, field).tobytes())
            print(digest.hexdigest(), file=lines, flush=True)

if __name__ == "__main__":
    main()
"""


class PhotographsTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if not PHOTOGRAPHS.is_dir():
            raise absltest.SkipTest(NO_SHARED)
        cls.source = registry.open_source(f"folder:{PHOTOGRAPHS}", "all")

    def digests(self, steps, **options):
        batches = pipeline.train_batches(self.source, **OPTIONS | options)
        with contextlib.closing(batches):
            return [
                hashlib.sha256(batch.images.tobytes() + batch.labels.tobytes()).hexdigest()
                for _, batch in zip(range(steps), batches, strict=False)
            ]

    @pytest.mark.slow
    def test_every_photograph_once_per_epoch_with_three_workers(self):
        batches = pipeline.train_batches(
            self.source, **OPTIONS | {"batch_size": 40, "augmentation": "basic"}, workers=3
        )
        with contextlib.closing(batches):
            for _ in range(3):
                labels = np.concatenate([next(batches).labels for _ in range(5)])
                self.assertEqual(sorted(labels.tolist()), list(range(200)))  # a label is an image

    @pytest.mark.slow
    def test_kill_at_random_and_resume_with_other_workers_and_hosts(self):
        steps = 12  # one and a half epochs of 8
        expected = self.digests(steps)
        generator = random.Random(0)
        with tempfile.TemporaryDirectory() as root:
            log, script = Path(root) / "log", Path(root) / "consumer.py"
            script.write_text(CONSUMER)
            log.touch()
            for _ in range(40):
                workers, hosts = generator.choice([(0, 1), (0, 2), (2, 1), (3, 1), (1, 2)])
                process = subprocess.Popen(
                    [
                        *(sys.executable, script, PHOTOGRAPHS, log, str(workers), str(hosts)),
                        json.dumps(OPTIONS),
                    ],
                    env=os.environ | {"PYTHONPATH": str(paths.ROOT)},
                    stderr=subprocess.DEVNULL,  # what is cleaned up after a kill
                )
                wanted = len(log.read_text().splitlines()) + generator.randint(1, 5)
                while len(log.read_text().splitlines()) < min(wanted, steps):
                    self.assertIsNone(process.poll(), "the consumer ended by itself")
                    time.sleep(0.005)
                process.kill()  # its workers end by themselves
                process.wait()
                found = log.read_text().split("\n")[:-1]
                log.write_text("".join(f"{line}\n" for line in found))  # drops a line cut off
                if len(found) >= steps:
                    break
        self.assertEqual(found[:steps], expected)
