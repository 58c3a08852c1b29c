"""Small PyTorch computations that choose by order, places or masks, and join what is chosen."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

CHANNELS, SIDE = 4, 9


def _middle(x):
    values, places = x.median(dim=2)
    whole = x.flatten(1).median(1, keepdim=True)[0]
    return values + 0.1 * places.to(x.dtype) + x.median() + whole[..., None]


def _kth(x):
    values, places = x.flatten(2).kthvalue(17, dim=2)
    return values + 0.01 * places.to(x.dtype)


def _reduced(x):
    places = torch.tensor([0, 3, 3, 1, 0, 0, 3, 5, 5]).expand_as(x)
    start = (x.flip(3) * 2 - 0.7)[..., :7]
    y = x - 0.4
    kinds = ("sum", "prod", "mean", "amax", "amin")
    return torch.cat(
        [
            start.scatter_reduce(3, places, y, kind, include_self=own)
            for kind in kinds
            for own in (True, False)
        ],
        1,
    )


def _reduced_ties(x):
    places = torch.tensor([0, 3, 3, 1, 0, 0, 3, 5, 5]).expand_as(x)
    start, y = ((x.flip(3) * 2).round() * x.round())[..., :7], (x * 2).round() * x
    y = torch.where(y > 0.8, 1 + 0 * y, y)
    kinds = ("prod", "amax", "amin")
    return torch.cat([start.scatter_reduce(3, places, y, kind) for kind in kinds], 1)


def _distances(x):
    y = torch.arange(5 * SIDE).view(5, SIDE).to(x.dtype).cos()
    orders = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf"))
    return torch.cat([torch.cdist(x, y, p=p) for p in orders], 3)


def _far_and_near(x):
    """Distances by a product of matrices: more than 25, of which some are zero."""
    rows = x.flatten(1, 2)
    near = torch.cdist(rows, rows.flip(1) * 0.5)
    same = torch.cdist(rows, torch.zeros_like(rows)) + torch.cdist(0 * rows, torch.zeros_like(rows))
    few = torch.cdist(x[:, 0], x[:, 0]) + torch.cdist(x[:, 0], x[:, 1], p=1.0)
    return torch.cat([near.flatten(1), same.flatten(1), few.flatten(1)], 1)


def _running(x):
    most, where = (x * 4).round().cummax(3)
    least, there = x.cummin(2)
    found = most + least + 0.1 * where.to(x.dtype) + 0.1 * there.to(x.dtype)
    return found + x.cumprod(3) + (x - x.round()).cumprod(2) + x.logcumsumexp(3)


def _buckets(x):
    x, bounds = x.contiguous(), torch.linspace(0, 1, 5).to(x.dtype)
    edges = (x * 4).round() / 4
    rows = torch.searchsorted(x.sort(3)[0].detach(), x.flip(2).contiguous())
    found = torch.bucketize(edges, bounds) + torch.bucketize(edges, bounds, right=True)
    mixed = bounds[torch.tensor([3, 0, 4, 1, 2])]
    order = torch.searchsorted(mixed, x, sorter=torch.tensor([1, 3, 4, 0, 2]))
    return x * (found + rows + torch.searchsorted(bounds, edges, side="right") + order)


def _unpooled(x):
    values, places = F.max_pool2d(x, 3, 2, return_indices=True)
    part, there = F.adaptive_max_pool2d((4 * x).round() * x, (2, 4), return_indices=True)
    whole = F.max_unpool2d(values * 2, places, 3, 2, output_size=x.shape[2:])
    equal = F.max_pool2d((2 * x).round() * (x / x.detach()), 3, 1)  # which all have gradients
    found = whole, part, part * there, equal
    return torch.cat([each.flatten(1) for each in found], 1)


def _known_masks(x):
    mask = torch.arange(SIDE * SIDE).view(SIDE, SIDE) % 3 == 1
    y = x.clone()
    y[:, :, mask] = 0.5
    y[:, torch.tensor([True, False, True, False])] *= 2
    y[x > 0.8] = 0.1
    return torch.cat([y.flatten(1), (x[:, :, mask] * 2).flatten(1)], 1)


def _volumes(x):
    split = x.unflatten(2, (3, 3))
    return torch.cat(
        [
            F.adaptive_avg_pool3d(split, (2, 2, 4)).flatten(1),
            F.adaptive_max_pool3d(split, (2, 2, 4)).flatten(1),
            F.adaptive_max_pool3d((3 * split).round() * 0.3, (1, 3, 3)).flatten(1),
        ],
        1,
    )


def _few_bits(x):
    return torch.fake_quantize_per_tensor_affine(x, 0.07, 2, 0, 12)


def _twice_written(x):
    y, places = x.clone(), torch.tensor([1, 1, 2])
    y[:, places] = x[:, :1].expand(-1, 3, -1, -1) * 2
    index = torch.zeros(x.shape[0], 2, SIDE, SIDE, dtype=int)
    return y + x.scatter(1, index, x[:, :1].expand(-1, 2, -1, -1).contiguous() * 3)


def _frequent(x):
    values, places = (4 * x).round().mode(3)
    found = values + 0.1 * places.to(x.dtype) + x.round().mode(2)[0] * x.mean(2)
    return found + (x * x.round()).mode(3)[0]


def _middle_of_numbers(x):
    some = torch.where(x > 0.6, torch.nan, x)
    values, places = torch.where(x.mean(3, keepdim=True) > 0.5, x, some).nanmedian(2)
    whole = some.nanmedian() + torch.where(x > 0.5, torch.nan, x.round()).nanmedian()
    return values + 0.1 * places.to(x.dtype) + whole


def _counted(x):
    y = (x.detach() * 4).round() / 4
    ranges = (y.histc(4, 0, 1), x.detach().histc(7), y.histc(3, 0.2, 0.6), (0 * y).histc(4))
    counts = torch.cat(ranges)
    places = torch.arange(1, len(counts) + 1, dtype=x.dtype)  # in which bin, too
    return x.mean(1) * (places * counts).cos().sum()


def _put_flat(x):
    places, values = torch.tensor([[3, 7, -2], [80, 7, 9]]), x[0, 0, :2, :3] * 2
    added = x.put(places, values, accumulate=True)
    y = x.index_put((torch.tensor([1, 1, 2]), torch.tensor([0])), x[:1, 0], accumulate=True)
    return added + x.put(places, values) + y


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "the middle": _middle,
    "the k-th": _kth,
    "the most frequent": _frequent,
    "the middle of numbers": _middle_of_numbers,
    "counted in bins": _counted,
    "put flat": _put_flat,
    "reduced into places": _reduced,
    "reduced into places, of equal ones": _reduced_ties,
    "distances": _distances,
    "distances of many": _far_and_near,
    "distances among rows": lambda x: x.mean(1) * F.pdist(x[0, 0]).mean(),
    "running ones": _running,
    "buckets": _buckets,
    "errors back": lambda x: (
        (x * 0.9).erfinv() + torch.lgamma(x + 1) + torch.digamma(x + 1) + x.isinf()
    ),
    "unpooling": _unpooled,
    "known masks": _known_masks,
    "volumes": _volumes,
    "few bits": _few_bits,
    "the largest of all": lambda x: x * x.max() + x.min(),
    "written twice": _twice_written,
    "equal ones": lambda x: (
        (2 * x).round().median(2)[0] * x.mean(2)
        + ((3 * x).round() * x.round()).median()
        + torch.stack([x * x.round(), x.round(), x], 0).median(0)[0].mean(2)
        + (3 * x).round().kthvalue(4, 2)[0] * x.mean(2)
    ),
    "a number": lambda x: x * torch.scalar_tensor(x.shape[0]),
    "norms of zeros": lambda x: (
        torch.cat([torch.linalg.vector_norm(x - x, p, 1) for p in (2, 3, 1, float("inf"))], 1)
        + x.flatten(1, 2)
    ),
}
