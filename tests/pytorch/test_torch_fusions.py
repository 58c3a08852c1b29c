"""Operators of PyTorch's modules that are computed together, next to the same ones one by one."""

import collections
import functools

import jax
import numpy as np
import pytest
from absl.testing import parameterized

from jaxrobust.pytorch import blocks
from jaxrobust.pytorch import trainable as trained
from jaxrobust.pytorch.networks import torch_fusions, torch_kernels
from tests.support import paths, sweeps

torch = pytest.importorskip("torch", reason=paths.PARITY)
from torch import nn  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from jaxrobust.pytorch.reading.training_mode import trainable  # noqa: E402
from tests.support import trainable_modules as modules  # noqa: E402

SIDE, WIDTH, HEADS = 6, 12, 3
TOKENS = SIDE * SIDE // 4
KERNELS = torch_kernels.KERNELS | torch_fusions.KERNELS
FASTER = trained.Faster(KERNELS, fused=torch_fusions.fused)


class Block(nn.Module):
    """A block of a ViT as timm writes it, with one thing otherwise."""

    def __init__(self, otherwise: str = "") -> None:
        super().__init__()
        bias = otherwise != "without bias"
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        inside = 3 * WIDTH if otherwise == "threes" else WIDTH
        self.fc1, self.fc2 = nn.Linear(inside, 2 * inside), nn.Linear(2 * inside, inside)
        self.mask = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.otherwise = otherwise

    def attend(self, x):
        if self.otherwise == "written out, windows":  # of which an image has three
            x = x.reshape(-1, TOKENS // 3, WIDTH)
        batch, tokens, _ = x.shape
        product = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1)
        if self.otherwise == "heads first":
            product = product.reshape(batch, tokens, HEADS, 3, -1).permute(3, 0, 2, 1, 4)
        else:
            product = product.permute(2, 0, 3, 1, 4)
        q, k, v = product.unbind(0)
        if self.otherwise == "swapped":
            q, k = k, q
        if self.otherwise == "normed":
            q = nn.functional.normalize(q, dim=-1)
        how = {}
        if self.otherwise == "mask":
            how["attn_mask"] = self.mask
        if self.otherwise == "truths":
            how["attn_mask"] = self.mask > 0
        if self.otherwise == "causal":
            how["is_causal"] = True
        if self.otherwise == "scale":
            how["scale"] = 0.3
        if self.otherwise.startswith("written out"):
            y = self.written_out(q, k, v)
        else:
            y = scaled_dot_product_attention(q, k, v, **how)
        return self.proj(y.transpose(1, 2).reshape(-1, TOKENS, WIDTH))

    def written_out(self, q, k, v):
        how = self.otherwise.removeprefix("written out").removeprefix(", ")
        scale, tokens = 0.4, q.shape[2]
        if how == "one query":  # whose scores get rows from the bias
            q = q.mean(2, keepdim=True)
        bias = self.mask[:, :tokens, :tokens]
        if how == "normed":
            q = nn.functional.normalize(q, dim=-1)
        if how == "scaled twice":
            k = k * 0.7
        if how == "one key":
            k = k[:, :1].expand(-1, HEADS, -1, -1)
        if how == "scaled after":
            scores = (q @ k.transpose(-2, -1)) / 2.5 + bias
        elif how == "scaled by nothing":
            scores = (q @ k.transpose(-2, -1)) * 0 + bias
        elif how == "tensor":
            scores = q @ k.transpose(-2, -1) * bias
        elif how == "scaled last":
            scores = (q @ k.transpose(-2, -1) + bias) * scale
        else:
            scores = bias.unsqueeze(0) + (q * scale) @ k.transpose(-2, -1)
        if how == "windows":
            mask = torch.stack([bias[0], bias[1], bias[2]])[None, :, None]
            scores = scores.view(-1, 3, HEADS, tokens, tokens) + mask
            scores = scores.view(-1, HEADS, tokens, tokens)
        if how == "masked":
            scores = scores.masked_fill(bias > 1, -1e9)
        return scores.softmax(2 if how == "of keys" else -1) @ v

    def forward(self, x):
        if self.otherwise == "twice":  # two norms of the same tokens
            return self.attend(self.norm1(x)) + self.fc2(self.fc1(self.norm2(x))) + x
        x = x + self.attend(self.norm1(x))
        normal = self.norm2(x)
        if self.otherwise == "rolled":
            normal = normal.roll(-2, 1)
        if self.otherwise == "reversed":
            normal = normal.index_select(1, torch.arange(TOKENS - 1, -1, -1))
        if self.otherwise == "threes":
            inside = self.fc1(normal.reshape(len(x), TOKENS // 3, 3 * WIDTH))
            return x + self.fc2(nn.functional.gelu(inside)).reshape(x.shape)
        if self.otherwise == "rows":
            hidden = self.fc1(normal.reshape(-1, WIDTH))
            hidden = (hidden - hidden.mean(0)).reshape(len(x), TOKENS, -1)
        else:
            hidden = self.fc1(normal)
        return x + self.fc2(nn.functional.gelu(hidden))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images):
        x = self.stem(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@functools.cache
def written(*others):
    torch.manual_seed(0)
    return trainable(Net(*map(Block, others)), (SIDE, SIDE, 3))


class FusionTest(parameterized.TestCase):
    @sweeps.rows(
        # How many maps are of tokens as they lie, whether attention is read, and of one product.
        ("", 4, True, True),
        ("without bias", 4, True, True),
        ("mask", 4, True, True),
        ("scale", 4, True, True),
        ("truths", 4, True, True),
        ("causal", 4, False, False),
        ("heads first", 4, True, False),
        ("swapped", 4, True, False),
        ("normed", 4, True, False),
        ("threes", 4, True, True),
        ("rows", 3, True, True),
        ("twice", 4, True, True),
        ("rolled", 4, True, True),
        ("reversed", 4, True, True),
        ("written out", 4, True, True),
        ("written out, scaled after", 4, True, True),
        ("written out, windows", 4, True, True),
        ("written out, scaled twice", 4, True, False),
        ("written out, scaled last", 4, False, False),
        ("written out, normed", 4, True, False),
        ("written out, one key", 4, True, False),
        ("written out, of keys", 4, False, False),
        ("written out, tensor", 4, False, False),
        ("written out, masked", 4, False, False),
        ("written out, one query", 4, False, False),
        ("written out, scaled by nothing", 4, False, False),
    )
    def test_values_and_gradients(self, otherwise, maps, attends, of_one):
        network = written(otherwise)
        parts, constants = blocks.parted(network.training), network.training.constants
        found = collections.Counter(
            step.operator
            for part in parts
            if part.block
            for step in torch_fusions.fused(part, constants)
        )
        # Each norm has a residual connection next to it.
        rolls = int(otherwise == "rolled")
        wanted = [maps, rolls, 2, int(attends and not of_one), int(of_one)]
        self.assertEqual([found[name] for name in torch_fusions.KERNELS], wanted)
        modules.check_faster(network, FASTER)

    def test_blocks_as_one_that_are_computed_again(self):
        network = written("", "", "")
        modules.check_faster(network, FASTER, scan=True, remat=True)

    def test_timm_s_own(self):
        from jaxrobust.publish import torch_networks

        timm = torch_networks.import_timm()
        module = timm.create_model(
            "vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, num_classes=5, img_size=32
        )
        network = trainable(module, (32, 32, 3))
        parts, constants = blocks.parted(network.evaluation), network.evaluation.constants
        found = [step.operator for part in parts for step in torch_fusions.fused(part, constants)]
        self.assertEqual([found.count(name) for name in torch_fusions.KERNELS], [8, 0, 4, 0, 2])
        x = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
        net = trained.classifier(network, FASTER)
        logits = net.apply(*net.init(jax.random.key(0)), x)[0]
        with torch.no_grad():
            want = module.eval()(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        np.testing.assert_allclose(logits, want, atol=1e-5)
