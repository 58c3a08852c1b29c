"""Small PyTorch computations with a kink, a tie, an order or an infinite slope, one in each.

Beside `torch_operators`, which have every row of the table. Each has images of its own, so that
what is not a number in one hides nothing of another.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

INF = float("inf")
# Where something of the functions below begins, ends or turns, and what saturates them.
LEVELS = (-20, -6, -3, -2, -1, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 2, 3, 6, 20)
Function = Callable[[torch.Tensor], Any]


def _other(x: torch.Tensor) -> torch.Tensor:
    return x.flip(3)


def _named(module: Any, *names: str) -> dict[str, Function]:
    return {name: getattr(module, name) for name in names}


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


def _grid(x: torch.Tensor, **settings: Any) -> torch.Tensor:
    return F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1) * 2 - 1, **settings)


UNARY: dict[str, Function] = {
    **_named(torch, "abs", "sqrt", "rsqrt", "log", "log2", "log10", "log1p", "reciprocal", "sinc"),
    **_named(torch, "asin", "acos", "atan", "atanh", "acosh", "asinh", "erfinv", "logit", "square"),
    **_named(torch, "sign", "floor", "ceil", "trunc", "round", "frac", "nan_to_num"),
    **_named(torch.special, "entr"),
    **_named(F, "relu", "relu6", "hardtanh", "hardsigmoid", "hardswish", "hardshrink", "selu"),
    **_named(F, "softshrink", "tanhshrink", "leaky_relu", "elu", "celu", "rrelu", "logsigmoid"),
    **_named(F, "softplus", "softsign", "silu", "mish", "gelu"),
    "lgamma": lambda x: torch.lgamma(x.relu()),
    "digamma": lambda x: torch.digamma(x.relu()),
    "logit with an end": lambda x: torch.logit(x, 0.25),
    "threshold": lambda x: F.threshold(x, 0.5, 20),
    "softplus with a threshold": lambda x: F.softplus(x, 2, 6),
    "leaky_relu, negative": lambda x: F.leaky_relu(x, -0.1),
    "prelu": lambda x: F.prelu(x, x.new_tensor([0.25, -0.1, 2.0, 0.0])),
    "roots of differences": lambda x: (x - _other(x)).abs().sqrt(),
    "signed roots": lambda x: x.sign() * (x.abs() + 1e-5).sqrt(),
    **{
        f"to the power of {power}": lambda x, power=power: x**power
        for power in (0, 1, 2, 3, -1, 0.5, -0.5, 1.5, 0.0, 2.0, 1 / 3)
    },
}
BINARY: dict[str, Function] = {
    name: lambda x, function=function: function(x, _other(x))
    for name, function in {
        **_named(torch, "maximum", "minimum", "atan2", "hypot", "xlogy", "fmod", "remainder"),
        **_named(torch, "logaddexp", "pow", "div"),
        **_named(torch.special, "xlog1py"),
        "fmod, rounded to zero": lambda x, y: x + torch.div(x, y, rounding_mode="trunc"),
        "where": lambda x, y: torch.where(x > 0.5, x, y),
    }.items()
}
BINARY |= {
    "atan2 of one": lambda x: torch.atan2(x, x),
    "hypot of one": lambda x: torch.hypot(x, x),
    "x to x": lambda x: x**x,
    "0 to x": lambda x: torch.pow(0.0, x),
    "2 to x": lambda x: torch.pow(2.0, x),
    "numbers to x": lambda x: x.new_tensor([0.0, 1, 2, 0.5, -1, 3, 0, 1, 2]) ** x,
    "x to numbers": lambda x: x ** x.new_tensor([0.0, 1, 2, 0.5, -1, 3, 0, 1, 2]),
    "xlogy of one": lambda x: torch.xlogy(x, x),
    "xlogy of a number": lambda x: torch.xlogy(2.0, x),
    "xlogy with a number": lambda x: torch.xlogy(x, 2.0),
    "xlog1py of a number": lambda x: torch.special.xlog1py(2.0, x),
    "xlog1py with a number": lambda x: torch.special.xlog1py(x, -1.0),
}
BOUNDED: dict[str, Function] = {
    "clamp": lambda x: x.clamp(0, 1),
    "clamp below": lambda x: x.clamp(min=0.5),
    "clamp above": lambda x: x.clamp(max=0.5),
    "clamp swapped": lambda x: x.clamp(1, 0),
    "clamp by tensors": lambda x: x.clamp(_other(x), _other(x) + 0.5),
    "clamp by equal tensors": lambda x: x.clamp(_other(x), x.flip(2)),
    "clamp by tensors swapped": lambda x: x.clamp(_other(x) + 0.5, _other(x)),
    "clamp by a tensor below": lambda x: torch.clamp_min(x, _other(x)),
    "clamp by a tensor above": lambda x: torch.clamp_max(x, _other(x)),
    "quarters": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.25, 0, 0, 4),
    **{
        f"{mode} samples, {padding}, {align}": functools.partial(
            _grid, mode=mode, padding_mode=padding, align_corners=align
        )
        for mode, padding, align in (
            *(("bilinear", "border", True), ("bilinear", "reflection", True)),
            *(("bilinear", "zeros", False), ("nearest", "border", False)),
        )
    },
}
REDUCED: dict[str, Function] = {
    **{
        f"norm of order {order}": lambda x, order=order: x.norm(p=order, dim=3)
        for order in (0, 1, 2, 3, 0.5, 1.5, -1, INF, -INF)
    },
    "norm": lambda x: x.norm(),
    "norm of order 1, of all": lambda x: x.norm(p=1),
    "divided by its norm": lambda x: x / (x.norm(dim=1, keepdim=True) + 1e-6),
    "norms of matrices": lambda x: torch.linalg.matrix_norm(x, 1),
    "renorm": lambda x: x.renorm(1, 0, 1.0),
    **{
        f"normalize by order {order}": lambda x, order=order: F.normalize(x, order)
        for order in (1, 2, INF)
    },
    "cosine_similarity": lambda x: F.cosine_similarity(x, _other(x)),
    "pairwise_distance": lambda x: F.pairwise_distance(x, _other(x)),
    "pairwise_distance of order 1": lambda x: F.pairwise_distance(x, _other(x), 1),
    **{
        f"cdist of order {order}": lambda x, order=order: torch.cdist(x, _other(x), order)
        for order in (0.0, 0.5, 1.0, 2.0, 3.0, INF)
    },
    "std": lambda x: x.std((2, 3)),
    "std of channels": lambda x: x.std(1),
    "std of rows": lambda x: x.std(-1, keepdim=True),
    "std of all": lambda x: x.std(),
    "std without a correction": lambda x: x.std((2, 3), correction=0),
    "std as a pooling": lambda x: torch.cat([x.mean((2, 3)), x.std((2, 3))], 1),
    "root of var": lambda x: (x.var((2, 3)) + 1e-5).sqrt(),
    "divided by std": lambda x: (
        (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 0.1)
    ),
    "layer_norm": lambda x: F.layer_norm(x, (9,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": F.instance_norm,
    "rms_norm": lambda x: F.rms_norm(x, (9,)),
    "logsumexp": lambda x: x.logsumexp(3),
    "logcumsumexp": lambda x: x.logcumsumexp(3),
    "prod": lambda x: x.prod(3),
    "cumprod": lambda x: x.cumprod(3),
    "differences": lambda x: x.diff(dim=3).abs(),
    "softmax": lambda x: (1000 * x).softmax(1),
}
ORDERED: dict[str, Function] = {
    "max": lambda x: x.max(),
    "max of rows": lambda x: x.max(3),
    "min of channels": lambda x: x.min(1),
    "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: x.amin((2, 3)),
    "median": lambda x: x.median(),
    "median of rows": lambda x: x.median(2),
    "nanmedian": lambda x: x.nanmedian(2),
    "mode": lambda x: x.mode(2),
    "kthvalue": lambda x: _rows(x).kthvalue(30, 1),
    "kthvalue of rows": lambda x: x.kthvalue(3, 2),
    "cummax": lambda x: x.cummax(3),
    "cummin": lambda x: x.cummin(2),
    "quantile": lambda x: x.quantile(0.3, dim=3),
    "quantile of all": lambda x: _rows(x).quantile(0.3, dim=1),
    "sort": lambda x: x.sort(3),
    "sort, descending": lambda x: x.flatten(2).sort(2, descending=True),
    "sort of all": lambda x: _rows(x).sort(1),
    "sort, stable": lambda x: _rows(x).sort(dim=1, stable=True),
    "topk of rows": lambda x: x.topk(3, 3),
    "topk of few": lambda x: x.flatten(2).topk(20, 2, largest=False),
    "topk of many": lambda x: _rows(x).topk(5, 1),
    "topk, not in order": lambda x: _rows(x).topk(40, 1, sorted=False),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max_pool2d with places": lambda x: F.max_pool2d(x, 3, 2, return_indices=True),
    "max_pool2d, dilated": lambda x: F.max_pool2d(x, 2, 1, 0, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (2, 4)),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 1, 2),
    "scattered extremes": lambda x: torch.zeros_like(x).scatter_reduce(
        3, torch.tensor([0, 3, 3, 1, 0, 0, 3, 5, 5]).expand_as(x), x, "amax"
    ),
}
LOSSES: dict[str, Function] = {
    name: lambda x, function=function, settings=settings: function(
        x, _other(x), reduction="none", **settings
    )
    for name, function, settings in (
        *(("l1_loss", F.l1_loss, {}), ("huber_loss", F.huber_loss, {"delta": 0.5})),
        ("smooth_l1_loss", F.smooth_l1_loss, {}),
        *(("of beta 0", F.smooth_l1_loss, {"beta": 0.0}), ("mse_loss", F.mse_loss, {})),
        ("bce_with_logits", F.binary_cross_entropy_with_logits, {}),
    )
}
LOSSES |= {
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(
        x.clamp(0, 1), torch.full_like(x, 0.25), reduction="none"
    ),
    "binary_cross_entropy of means": lambda x: F.binary_cross_entropy(
        x.sigmoid().square(), x.clamp(0, 1), torch.full_like(x, 2.0)
    ),
    "hinge": lambda x: F.hinge_embedding_loss(x, -torch.ones_like(x), reduction="none"),
    "ranking": lambda x: F.margin_ranking_loss(
        x, _other(x), torch.ones_like(x), 0.5, reduction="none"
    ),
    "triplets": lambda x: F.triplet_margin_loss(
        _rows(x), _rows(_other(x)), _rows(x.flip(2)), reduction="none"
    ),
}
KINKS = UNARY | BINARY | BOUNDED | REDUCED | ORDERED | LOSSES
