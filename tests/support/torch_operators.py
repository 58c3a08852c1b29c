"""Small PyTorch computations that together use every row of `pytorch.operators.TABLE`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import torch_choices, torch_kinks, torch_matrices
from tests.support.torch_choices import CHANNELS, SIDE

aten = torch.ops.aten


class Computed(nn.Module):
    """A function of images as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x):
        found = self.function(x)
        if isinstance(found, tuple):  # values and places
            return torch.cat([part.reshape(part.shape[0], -1).to(x) for part in found], 1)
        return found.flatten(1) if found.ndim > 1 else found.reshape(-1, 1)


class Within(nn.Module):
    """A module, whose result is flattened."""

    def __init__(self, module: nn.Module, *before: nn.Module):
        super().__init__()
        self.before, self.module = nn.Sequential(*before), module

    def forward(self, x):
        return self.module(self.before(x)).flatten(1)


class Attention(nn.Module):
    def __init__(self, **settings: Any):
        super().__init__()
        self.settings = settings
        self.query = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        x = x.flatten(2).mT[:, None]
        return F.scaled_dot_product_attention(self.query(x), x, x.sin(), **self.settings).flatten(1)


class Position(nn.Module):
    """Swin's bias: an index into a table of weights."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, SIDE))
        self.register_buffer("places", torch.randint(0, 7, (SIDE,)))

    def forward(self, x):
        return (x + self.table[self.places]).flatten(1)


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 3)

    def forward(self, x):
        return (self.words((10 * x).long().clamp(0, 9)) * x[..., None]).flatten(1)


class Written(nn.Module):
    """In-place changes of parts."""

    def forward(self, x):
        y = torch.zeros_like(x)
        y[:, 1:3] = x[:, :2]
        y[:, 0] += x[:, 3] * 2
        y[..., 2:5].mul_(3)
        return y.flatten(1)


class Unpooling(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x):
        values, places = self.down(x)
        return self.up(values.sin(), places, (SIDE, SIDE)).flatten(1)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.form = nn.Bilinear(SIDE, CHANNELS, 5)

    def forward(self, x):
        return self.form(x.mean(1), x.mean(2).mT).flatten(1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(SIDE, 5, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.lstm(x.mean(1)[:, :3])[0].flatten(1)


def _with_max(x):
    values, places = x.max(dim=3)
    return values + 0.1 * places.to(x.dtype)


def _with_min(x):
    return x.flatten(2).min(dim=2)[0]


def _order(x):
    values, places = x.sort(dim=2, descending=True)
    return values + 0.01 * places.to(x.dtype) + x.sort(dim=2, stable=True)[0]


def _top(x):
    values, places = x.flatten(2).topk(5, dim=2)
    return values + 0.01 * places.to(x.dtype)


def _gathered(x):
    return x.gather(3, x.argsort(dim=3)[..., :4])


def _scattered(x):
    places = torch.arange(SIDE).flip(0).expand_as(x)
    return torch.zeros_like(x).scatter(3, places, x) + torch.zeros_like(x).scatter_add(2, places, x)


def _put(x):
    y = x.clone()
    y[:, [0, 2]] = x[:, [1, 3]] ** 2
    return y.index_put((torch.zeros(1, dtype=int),), x[:1])


def _masked(x):
    mask = torch.ones(SIDE, SIDE).tril().bool()
    y = x.masked_fill(~mask, -1.0)
    return torch.where(mask & ~(mask.logical_not()), y, 0.5) * (mask.any(0)).to(x.dtype)


def _bits(x):
    a, b = (x > 0.5), (x < 0.7)
    both = (a & b).logical_or(a ^ b).logical_and(a | b).logical_xor(~a)
    ints = (x * 10).to(torch.int32)
    bits = (ints & 3) + (ints | 4) + (ints ^ 1)
    return x * both + bits


def _compared(x):
    y = x.flip(3)
    marks = [x == y, x != y, x < y, x <= y, x > y, x >= y, x == 0.5, x != 0.5]
    marks += [x < 0.3, x <= 0.3, x > 0.3, x >= 0.3]
    return sum(mark.to(x.dtype) * (place + 1) * x for place, mark in enumerate(marks))


def _whole_numbers(x):
    n = torch.arange(1, SIDE + 1)
    below = (9 * x).to(torch.int32) - 5  # of the images, so that no constant is folded
    halves = torch.div(below, 2, rounding_mode="trunc") * x + below // 2 + below.remainder(3)
    return x * (n // 2) + torch.div(n, 2, rounding_mode="trunc") + n.remainder(3) + n / 3 + halves


def _strided(x):
    b = x.shape[0]
    return x.contiguous().as_strided((b, 3, 3), (CHANNELS * SIDE * SIDE, 20, 2), 1)


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "unary": lambda x: x.abs() + (-x).exp() + x.expm1() + (x + 1).log() + (x + 1).log2(),
    "roots": lambda x: (x + 1).sqrt() + (x + 1).rsqrt() + (x + 1).reciprocal() + (x + 2).log10(),
    "logarithms": lambda x: (
        torch.xlogy(x, x + 1)
        + torch.xlogy(2.0, x + 1)
        + torch.xlogy(x, 2.0)
        + torch.special.xlog1py(x, x)
        + torch.special.xlog1py(2.0, x)
        + torch.special.xlog1py(x, 2.0)
        + torch.special.entr(x)
        + torch.logit(0.5 * x + 0.2)
        + F.binary_cross_entropy(0.5 * x + 0.2, x)
    ),
    "waves": lambda x: (
        torch.sinc(x) + x.sin() + x.cos() + x.tan() + x.asin() + x.acos() + x.atan() + x.log1p()
    ),
    "hyperbolic": lambda x: x.sinh() + x.cosh() + x.tanh() + x.asinh() + (x + 2).acosh(),
    "errors": lambda x: x.erf() + (x / 2).atanh() + x.sigmoid() + torch.special.erfc(x),
    "steps": lambda x: x * x.floor() + x * x.ceil() + x * (3 * x).round() + x * (x - 0.5).sign(),
    "parts": lambda x: (
        x.trunc() + x.frac() + x.fmod(0.3) + x.remainder(0.3) + x.fmod(x.flip(3) + 1)
    ),
    "powers": lambda x: x**2 + x**0.5 + 2**x + x ** (x + 1) + (x + 1) ** -1 + x.square(),
    "arithmetic": lambda x: (
        torch.add(x, x, alpha=2) - torch.sub(3, x) + 2 * x / 3 - x / (x + 1) + 1
    ),
    "extremes": lambda x: torch.maximum(x, 1 - x) + torch.minimum(x, x.flip(3)) + x.clamp(0.2, 0.8),
    "bounds": lambda x: x.clamp(min=0.3) + x.clamp(max=0.6) + x.clamp(x.flip(3), x.flip(3) + 0.2),
    "angles": lambda x: (
        torch.atan2(x, x.flip(2)) + torch.hypot(x, x + 1) + torch.lerp(x, x**2, 0.3)
    ),
    "not numbers": lambda x: (
        torch.nan_to_num(torch.where(x > 0.5, x, torch.inf), posinf=2.0) + (x / x.floor()).isnan()
    ),
    "comparisons": _compared,
    "bits": _bits,
    "masks": _masked,
    "whole numbers": _whole_numbers,
    "rounded division": lambda x: (
        torch.div(x, 0.3, rounding_mode="floor") * x + x.div(0.3, rounding_mode="trunc")
    ),
    "views": lambda x: (
        x.view(x.shape[0], 2, -1).permute(2, 0, 1).unsqueeze(1).squeeze(1).transpose(0, 1)
    ),
    "detached": lambda x: x * x.sin().detach(),
    "written into what is empty": lambda x: torch.empty_like(x).copy_(x * 2),
    "repeats": lambda x: x.repeat(1, 2, 1, 1) + x.mean(1, keepdim=True).expand(-1, 8, -1, -1),
    "cuts": lambda x: (
        torch.cat([x[:, 1:3], x[:, ::2], x[:, -1:]], 1)[..., 1::2]
        + x.select(1, 2)[:, None, :, 1::2]
    ),
    "splits": lambda x: (
        sum(x.split([1, 3], 1)[1].chunk(3, 1)) + torch.stack(x.unbind(1), 2).sum(2, keepdim=True).mT
    ),
    "padding": lambda x: F.pad(x, (1, 2, 0, -1), value=0.3) + F.pad(x, (2, 1, 3, -4))[..., :1, :1],
    "other padding": lambda x: (
        F.pad(x, (2, 1, 1, 2), "reflect")
        + F.pad(x, (2, 1, 1, 2), "replicate")
        + F.pad(x, (2, 1, 1, 2), "circular")
    ),
    "padding between": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "strides": _strided,
    "windows": lambda x: x.unfold(2, 3, 2).unfold(3, 3, 2),
    "patches": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "patches back": lambda x: F.fold(
        F.unfold(x, 3, padding=1, stride=2), (SIDE, SIDE), 3, padding=1, stride=2
    ),
    "diagonals": lambda x: torch.diagonal(x, dim1=2, dim2=3) + x.tril().sum(3) + x.triu(1).sum(2),
    "rolls": lambda x: x.roll((1, -2), (2, 3)) + x.flip((2, 3)),
    "shuffles": lambda x: (
        F.pixel_shuffle(F.pixel_unshuffle(x[..., :8, :8], 2).flip(1), 2)
        + F.channel_shuffle(x, 2)[..., :8, :8]
    ),
    "new ones": lambda x: (
        x
        + torch.full_like(x, 2.0)
        + torch.ones(SIDE)
        + torch.linspace(0, 1, SIDE)
        + torch.eye(SIDE)
    ),
    "of the batch": lambda x: (
        x + torch.full((x.shape[0], 1, 1, 1), 0.5) + torch.arange(x.shape[0])[:, None, None, None]
    ),
    "sums": lambda x: (
        x.sum((2, 3))
        + x.mean((2, 3))
        + x.amax((2, 3))
        + x.amin((2, 3))
        + x.flatten(2).sum(2)
        + x.mean()
    ),
    "sums that stay": lambda x: (
        x.sum(1, keepdim=True)
        + x.mean((2, 3), keepdim=True)
        + x.amax(1, keepdim=True) * x.std((1, 2, 3), keepdim=True)
    ),
    "spread": lambda x: (
        x.var(1) + x.var((2, 3), correction=0, keepdim=True).mean(1) + x.std(2)[:, :, None].mean(1)
    ),
    "products": lambda x: (
        x.prod(1) + (x > 0.9).any(1) + x.cumsum(2).mean(1) + (x > 0.1).all() + (x > 0.2).any()
    ),
    "any of several": lambda x: (
        x * (x > 0.9).any(3, keepdim=True).any(2, keepdim=True) + (x > 2).sum()
    ),
    "norms of vectors": lambda x: (
        F.normalize(x)
        + x.norm(dim=1, keepdim=True)
        + x.norm(p=1, dim=(2, 3), keepdim=True)
        + x.norm(p=float("inf"), dim=3, keepdim=True)
        + x.norm(p=3, dim=3, keepdim=True)
    ),
    "a norm of zero": lambda x: (x - x).norm(dim=1) + x.mean(1),
    "the largest": _with_max,
    "the smallest": _with_min,
    "places": lambda x: x.mean(1) * x.argmax(1) + x.argmin(1),
    "order": _order,
    "the first of an order": _top,
    "gathering": _gathered,
    "scattering": _scattered,
    "putting": _put,
    "choosing": lambda x: (
        x[:, [2, 0, 1]][:, :, torch.arange(3), torch.arange(3)]
        + x.index_select(1, torch.tensor([1, 1, 3])).mean((2, 3))[..., None]
    ),
    "softmax": lambda x: (
        x.softmax(1)
        + x.log_softmax(3)
        + x.flatten(2).softmax(2).view_as(x)
        + x.logsumexp(1, keepdim=True)
    ),
    "matrices": lambda x: (
        x @ x.mT + torch.einsum("bchw,bcvw->bchv", x, x) + torch.bmm(x[:, 0], x[:, 1])[:, None]
    ),
    "rows": lambda x: (
        torch.tensordot(x, x.new_ones(SIDE, 3), ([3], [0]))
        + F.linear(x, x.new_ones(3, SIDE), x.new_ones(3))
    ),
    "resizing, nearest": lambda x: (
        F.interpolate(x, scale_factor=2) + F.interpolate(x, size=(18, 18), mode="nearest-exact")
    ),
    "resizing, linear": lambda x: (
        F.interpolate(x, size=(13, 5), mode="bilinear")
        + F.interpolate(x, size=(13, 5), mode="bilinear", align_corners=True)
    ),
    "resizing, by a factor": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "resizing, cubic": lambda x: (
        F.interpolate(x, size=(13, 5), mode="bicubic")
        + F.interpolate(x, size=(13, 5), mode="bicubic", align_corners=True)
    ),
    "resizing, smaller": lambda x: (
        F.interpolate(x, size=(4, 5), mode="bilinear", antialias=True)
        + F.interpolate(x, size=(4, 5), mode="bicubic", antialias=True)
    ),
    "resizing, a line": lambda x: (
        F.interpolate(x[..., 0], scale_factor=2) + F.interpolate(x[..., 0], size=18, mode="linear")
    ),
    "sampling": lambda x: F.grid_sample(
        x,
        F.affine_grid(
            torch.tensor([[[0.8, 0.1, 0], [0, 0.9, 0.2]]]).to(x.dtype).expand(x.shape[0], 2, 3),
            [x.shape[0], CHANNELS, 5, 5],
            align_corners=False,
        ),
        align_corners=False,
    ),
    "pooling of parts": lambda x: (
        F.adaptive_avg_pool2d(x, (3, 4)) + F.adaptive_max_pool2d(x, (3, 4))
    ),
    "pooling of a line": lambda x: (
        F.avg_pool1d(x[:, 0], 2) + F.max_pool1d(x[:, 1], 2) + F.adaptive_avg_pool1d(x[:, 2], 4)
    ),
    "pooling of a volume": lambda x: (
        F.avg_pool3d(x[:, None], 2)
        + F.max_pool3d(x[:, None], 2)
        + F.adaptive_avg_pool3d(x[:, None], (2, 4, 4))
    ),
    "overloads": lambda x: (
        aten.mul.Scalar(x, 2)
        + aten.add.Scalar(x, 2, 3)
        - aten.sub.Scalar(x, 1)
        + aten.div.Scalar(x, 3)
        + aten.alias(x)
        + aten.remainder.Tensor(x, x.flip(3) + 0.1)
        + aten.div.Scalar_mode(x, 0.3, rounding_mode="floor")
    ),
    "sizes": lambda x: (
        x
        + x.new_ones(x.shape[0] * 3 + x.shape[0]).view(-1, CHANNELS, 1, 1)
        * (x.shape[0] // 2 + x.shape[0] % 3 - 1)
    ),
    "marks": lambda x: x + torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0),
    "complex numbers": lambda x: torch.view_as_real(
        torch.view_as_complex(x[..., :2].contiguous()) ** 2
    ),
    "waves of images": lambda x: (
        torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(SIDE, SIDE)) + torch.fft.fft2(x).real
    ),
}
COMPUTED |= torch_choices.COMPUTED | torch_matrices.COMPUTED
MODULES: dict[str, Callable[[], nn.Module]] = {
    **{
        f"activation {name}": lambda name=name: Within(getattr(nn, name)())
        for name in (
            *("ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "CELU", "SELU", "GELU"),
            *("SiLU", "Mish", "Hardswish", "Hardsigmoid", "Hardtanh", "Hardshrink", "Softshrink"),
            *("Tanhshrink", "Softplus", "Softsign", "Sigmoid", "LogSigmoid", "Tanh"),
        )
    },
    "activation GELU, tanh": lambda: Within(nn.GELU("tanh")),
    "activation Threshold": lambda: Within(nn.Threshold(0.1, 20)),
    "activation GLU": lambda: Within(nn.GLU(1)),
    "activation Softmax": lambda: Within(nn.Softmax(1)),
    "activation Softmin": lambda: Within(nn.Softmin(1)),
    "activation LogSoftmax": lambda: Within(nn.LogSoftmax(1)),
    "activation Softmax2d": lambda: Within(nn.Softmax2d()),
    "activation PReLU of channels": lambda: Within(nn.PReLU(CHANNELS)),
    "convolution": lambda: Within(nn.Conv2d(CHANNELS, 6, 3, padding=1)),
    "convolution, same": lambda: Within(nn.Conv2d(CHANNELS, 6, (3, 5), padding="same")),
    "convolution, reflected": lambda: Within(
        nn.Conv2d(CHANNELS, 6, 3, padding=1, padding_mode="reflect")
    ),
    "convolution, strided": lambda: Within(
        nn.Conv2d(CHANNELS, 6, (3, 2), stride=(2, 1), bias=False)
    ),
    "convolution, grouped": lambda: Within(
        nn.Conv2d(CHANNELS, 6, 3, groups=2, dilation=2, padding=2)
    ),
    "convolution, depthwise": lambda: Within(
        nn.Conv2d(CHANNELS, CHANNELS, 7, groups=CHANNELS, padding=3)
    ),
    "convolution, transposed": lambda: Within(
        nn.ConvTranspose2d(CHANNELS, 6, 3, stride=2, padding=1, output_padding=1)
    ),
    "convolution, transposed in groups": lambda: Within(
        nn.ConvTranspose2d(CHANNELS, 6, 4, stride=2, groups=2, dilation=2)
    ),
    "convolution of a line": lambda: Within(nn.Conv1d(CHANNELS, 6, 5, padding=2), nn.Flatten(2)),
    "convolution of a volume": lambda: Within(
        nn.Conv3d(1, 2, 3, padding=1), nn.Unflatten(1, (1, CHANNELS))
    ),
    "weight norm": lambda: Within(nn.utils.parametrizations.weight_norm(nn.Conv2d(CHANNELS, 6, 3))),
    "batch norm": lambda: Within(nn.BatchNorm2d(CHANNELS)),
    "batch norm of vectors": lambda: Within(nn.BatchNorm1d(CHANNELS * SIDE * SIDE), nn.Flatten()),
    "batch norm, plain": lambda: Within(nn.BatchNorm2d(CHANNELS, affine=False)),
    "layer norm": lambda: Within(nn.LayerNorm(SIDE)),
    "layer norm, plain": lambda: Within(nn.LayerNorm((SIDE, SIDE), elementwise_affine=False)),
    "group norm": lambda: Within(nn.GroupNorm(2, CHANNELS)),
    "instance norm": lambda: Within(nn.InstanceNorm2d(CHANNELS, affine=True)),
    "rms norm": lambda: Within(nn.RMSNorm(SIDE)),
    "response norm": lambda: Within(nn.LocalResponseNorm(2)),
    "max pooling": lambda: Within(nn.MaxPool2d(3, 2, 1)),
    "max pooling, to the end": lambda: Within(nn.MaxPool2d(2, 3, ceil_mode=True, dilation=2)),
    # Where one more window would begin at the padding's own.
    "max pooling, not beyond": lambda: Within(nn.MaxPool2d(3, 5, 1, ceil_mode=True)),
    "average pooling, not beyond": lambda: Within(nn.AvgPool2d(2, 2, 1, ceil_mode=True)),
    "pooling, back": Unpooling,
    "form of two": lambda: Bilinear(),
    "average pooling": lambda: Within(nn.AvgPool2d(3, 2, 1)),
    "average pooling, to the end": lambda: Within(nn.AvgPool2d((2, 4), 3, 1, ceil_mode=True)),
    "average pooling, of what is there": lambda: Within(
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)
    ),
    "average pooling, divided": lambda: Within(nn.AvgPool2d(2, divisor_override=3)),
    "global pooling": lambda: Within(nn.AdaptiveAvgPool2d(1)),
    "power pooling": lambda: Within(nn.LPPool2d(2, 2)),
    "linear": lambda: Within(nn.Linear(SIDE, 3)),
    "linear, plain": lambda: Within(nn.Linear(SIDE, 3, bias=False)),
    "attention": lambda: Attention(),
    "attention, causal": lambda: Attention(is_causal=True),
    "attention, scaled": lambda: Attention(scale=0.3),
    "attention, biased": lambda: Attention(
        attn_mask=torch.linspace(-1, 1, SIDE**4).view(SIDE**2, SIDE**2)
    ),
    "attention, masked": lambda: Attention(attn_mask=torch.ones(SIDE**2, SIDE**2).triu().bool()),
    "encoder": lambda: Within(
        nn.TransformerEncoderLayer(SIDE - 1, 2, 16, batch_first=True),
        nn.Flatten(1, 2),
        nn.Linear(SIDE, SIDE - 1),
    ),
    "embedding by a table": Position,
    "embedding": Embedded,
    "parts written": Written,
    "recurrence": Recurrent,
    "dropout": lambda: Within(nn.Sequential(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout())),
    "up": lambda: Within(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
}


# Which sizes they compute with depends on the number of images.
OF_SIZES = (
    *("of the batch", "sizes", "strides", "new ones", "views", "a number", "activation RReLU"),
    "written into what is empty",
)
# PyTorch writes these with operators that others of them use in the same way.
_OF_OTHERS = (
    *("PReLU", "PReLU of channels", "CELU", "SELU", "Mish", "GLU"),
    *("Hardshrink", "Softshrink", "Tanhshrink", "Softplus", "Softsign", "LogSigmoid", "Threshold"),
    *("Softmin", "Softmax2d", "Tanh", "Sigmoid"),
)
COMPOSED = (
    *("matrices", "equal ones", "other padding", "splits", "shuffles", "unpooling", "sampling"),
    *("patches", "patches back", "any of several", "pooling of a line", "recurrence"),
    *("resizing, cubic", "resizing, linear", "resizing, a line", "attention", "attention, scaled"),
    *("convolution, same", "convolution, reflected", "linear", "linear, plain", "rms norm"),
    *("response norm", *(f"activation {name}" for name in _OF_OTHERS)),
)
# PyTorch writes these down for a fixed number of images only.
ALONE = ("few bits",)


def prepared(name: str, images: np.ndarray) -> np.ndarray:
    """Return images in [0, 1] as one of them takes them: a module's in [-3, 3]."""
    return images * 6 - 3 if name in MODULES else images


def tied(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return images by their kind: flat, binary and saturated ones."""
    random = np.random.default_rng(1)
    flat = random.random(shape)
    flat[0], flat[1, ..., 0], flat[-1, ..., 1] = 0.3, 0.7, 0
    kinds = {
        "zeros": np.zeros(shape),
        "ones": np.ones(shape),
        "equal": np.full(shape, 0.5),
        "binary": random.integers(0, 2, shape).astype(float),
        "dark": (random.random(shape) > 0.9).astype(float),
        "flat": flat,
        "quarters": random.integers(0, 5, shape) / 4,
        "noise": random.random(shape),
    }
    images = {kind: prepared(name, x) for kind, x in kinds.items()}
    wide = random.choice(torch_kinks.LEVELS, shape)
    return images if name in COMPUTED else images | {"levels": wide}


def module(name: str) -> nn.Module:
    """Return one of them in eval mode, with seeded weights and statistics."""
    torch.manual_seed(0)
    functions = COMPUTED | torch_kinks.KINKS
    made = MODULES[name]() if name in MODULES else Computed(functions[name])
    for key, buffer in made.named_buffers():
        if key.endswith(("mean", "var")):
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return made.eval()
