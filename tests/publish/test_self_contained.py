import ast
import hashlib
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized

from jaxrobust import models
from tests.support import paths, sweeps

try:
    import torch
except ImportError:
    torch = None


def depth(name: str) -> int:
    row = models.variant(name)._asdict()
    return sum(row["depths"]) if "depths" in row else row.get("depth", row.get("cells", 0))


# The smallest network of each PyTorch file.
NAMES = {
    models.family(name).file: name for name in sorted(models.available(), key=depth, reverse=True)
}


def written(folder, name, device="meta", mean=(0.0,) * 3, std=(1.0,) * 3):
    """The one file of a network with fresh weights, and the network behind its first layer."""
    from jaxrobust.publish import references, self_contained, torch_networks
    from jaxrobust.publish.network_account import Account
    from jaxrobust.publish.references import Network

    stats = {"normalize.mean": np.float32(mean), "normalize.std": np.float32(std)}
    network = Network(name, {}, stats, 10, 32 if name.startswith("cifar") else 224, {})
    row = references.module_row(network)
    with torch.device(device):
        net = torch_networks.module(references.module_file(name).name).model(**row)
    weights = folder / "weights.pt"
    torch.save(net.state_dict(), weights)
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return self_contained.text(network, Account("fresh"), weights, sha256), net


def unread(code):
    """Names that a file defines or imports and does not read."""
    tree = ast.parse(code)
    defined, read = set(), {"ROW", "model", "load", "network"}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {alias.name for alias in node.names}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read.add(node.id)
    return defined - read


@absltest.skipIf(torch is None, paths.PARITY)
class FileTest(parameterized.TestCase):
    def run_alone(self, name, device="meta", **moments):
        folder = Path(self.create_tempdir())
        code, net = written(folder, name, device, **moments)
        module = {"__name__": "alone", "__file__": str(folder / "alone.py")}
        exec(compile(code, "alone.py", "exec"), module)
        return code, module, net

    @sweeps.rows(*NAMES)
    def test_holds_what_it_needs_and_no_more(self, file):
        code, module, _ = self.run_alone(NAMES[file])
        self.assertEmpty(unread(code))
        self.assertNotIn("jaxrobust.convert", code)
        with torch.device("meta"):
            state = module["model"](**module["ROW"]).state_dict()
        self.assertEqual(list(state), models.torch_keys(NAMES[file]))

    def test_logits_are_those_of_the_module(self):
        _, module, net = self.run_alone("cifar_mixer", "cpu")
        images = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            logits = module["load"]()(images)
            torch.testing.assert_close(logits, net.eval()(images), rtol=0, atol=0)

    def test_the_first_layer_normalises_as_ours(self):
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
        _, module, net = self.run_alone("cifar_mixer", "cpu", mean=mean, std=std)
        images = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            logits = module["normalized"](net.eval(), module["MEAN"], module["STD"])(images)
            normal = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            torch.testing.assert_close(logits, net(normal), rtol=1e-4, atol=1e-5)
