"""Modules that read a number of a tensor, in every way there is, or count their passes."""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as f

SIDE, CHANNELS, CLASSES = 4, 3, 5


def _submodule(net, t, x):
    return net.reader(t) * x


def _while(net, t, x):
    times = 1
    while t * times < 1:
        times += 1
    return x * times


def _range(net, t, x):
    for _ in range(int(t * 10)):
        x = x * 1.5
    return x


def _assertion(net, t, x):
    assert t > 0.01
    return x * t


def _without_grad(net, t, x):
    with torch.no_grad():
        scale = float(t * 2)
    return x * scale


def _put(net, t, x):
    scale = torch.zeros(3)
    scale[0] = t.item()
    return x + scale.sum()


def _remembered(net, t, x):
    net.last = float(t)
    return x * net.last


def _at_first(net, t, x):
    if net.cache is None:
        net.cache = float(t)
    return x * net.cache


def _loop(net, t, x):
    for value in torch.stack([t, t]):
        if value > 0.3:
            x = x * 2
    return x


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t):
        ctx.scale = float(t)
        return x * ctx.scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


@torch.jit.script
def _scripted(x: torch.Tensor, t: torch.Tensor):
    if bool(t > 0.3):
        return x * 2
    return x


@torch.compile
def _compiled(x, t):
    return x * float(t)


# Each is refused where training changes `t`.
READS = {
    "item": lambda net, t, x: x * t.item(),
    "float": lambda net, t, x: x * float(t),
    "int": lambda net, t, x: x * int(t * 10),
    "bool": lambda net, t, x: x * 2 if bool(t > 0.3) else x,
    "if": lambda net, t, x: x * 2 if t > 0.3 else x,
    "and": lambda net, t, x: x * (((t > 0.3) and 2) or 1),
    "chain": lambda net, t, x: x * 2 if 0.1 < t < 0.3 else x,
    "while": _while,
    "assert": _assertion,
    "list": lambda net, t, x: x * t.reshape(1).tolist()[0],
    "numpy": lambda net, t, x: x * float(t.detach().numpy()),
    "array": lambda net, t, x: x * float(np.asarray(t.detach())),
    "round trip": lambda net, t, x: (
        x * torch.from_numpy(np.atleast_1d(t.detach().cpu().numpy() * 2))
    ),
    "max": lambda net, t, x: x * max(t, 0.1),
    "sorted": lambda net, t, x: x * sorted([t, torch.tensor(0.3)])[0],
    "round": lambda net, t, x: x * round(t.item(), 1),
    "math": lambda net, t, x: x * math.exp(t),
    "slice": lambda net, t, x: x[:, :, : int(t * 10) + 1].mean(2, keepdim=True),
    "size": lambda net, t, x: f.interpolate(x, size=int(t * 20), mode="bilinear"),
    "range": _range,
    "full": lambda net, t, x: x + torch.full((1,), t.item()),
    "put": _put,
    "tensor": lambda net, t, x: x * torch.tensor(t.item()),
    "setting": lambda net, t, x: x.clamp(max=t.item()),
    "exponent": lambda net, t, x: x ** t.item(),
    "pad": lambda net, t, x: f.pad(x, [int(t * 10)] * 4),
    "equal": lambda net, t, x: x if torch.equal(t, torch.tensor(0.25)) else 2 * x,
    "allclose": lambda net, t, x: x if torch.allclose(t, torch.tensor(0.25)) else 2 * x,
    "in": lambda net, t, x: x if t in (0.25, 1) else 2 * x,
    "any": lambda net, t, x: x if (t.reshape(1) > 0.3).any() else 2 * x,
    "key": lambda net, t, x: x * {2: 1.0, 5: 3.0}.get(int(t * 10), 0.5),
    "no_grad": _without_grad,
    "data": lambda net, t, x: x * t.data.item(),
    "clone": lambda net, t, x: x * t.detach().clone().item(),
    "norm": lambda net, t, x: x / (1 + torch.stack([t, t]).norm().item()),
    "submodule": _submodule,
    "loop": _loop,
    "function": lambda net, t, x: _Scaled.apply(x, t),
    "vmap": lambda net, t, x: torch.vmap(lambda row: row * t.item())(x),
    "compiled": lambda net, t, x: _compiled(x, t),
    "remembered": _remembered,
    "at first": _at_first,
    "alias": lambda net, t, x: x * net.alias,
    "shadow": lambda net, t, x: x * net.shadow,
    "closure": lambda net, t, x: x * net.closure(),
}
# Refused of any tensor, for `torch.export` has no value for them.
UNKNOWN = {
    "select": lambda net, t, x: x[:, :, (t * 10).long()][:, :, None],
    "index": lambda net, t, x: x[:, :, : (t * 10).long() + 1].mean(2, keepdim=True),
    "mask": lambda net, t, x: x * torch.stack([t, t])[torch.stack([t, t * 0]) > 0.1].sum(),
    "nonzero": lambda net, t, x: x * len(torch.stack([t > 0.3, t > 0.1]).nonzero()),
    "scripted": lambda net, t, x: _scripted(x, t),
}
# Computed with the tensor, so that training changes what they give.
TENSORS = {
    "product": lambda net, t, x: x * t,
    "where": lambda net, t, x: torch.where(t > 0.3, x * 2, x),
    "clamp": lambda net, t, x: x.clamp(max=t),
    "power": lambda net, t, x: x**t,
    "shape": lambda net, t, x: x * net.head.weight.shape[0] * t.numel() * t,
    "printed": lambda net, t, x: x * t if f"{t}" and repr(t) else x,
    "frozen": lambda net, t, x: x * float(net.fixed) * t,
    "copied": lambda net, t, x: x * net.copied * t,
    "zeros": lambda net, t, x: x * t + float(torch.zeros_like(t)),
}


def _counts(net, t, x):
    net.calls += 1
    return x * net.calls


def _appends(net, t, x):
    net.log["of passes"].append(1)
    return x * len(net.log["of passes"])


def _writes(net, t, x):
    with torch.no_grad():
        net.a.mul_(0.9)
    return x * net.a


def _replaces(net, t, x):
    net.head.weight.data = f.normalize(net.head.weight, dim=1)
    return x * t


def _initialises(net, t, x):
    if net.initialised == 0:
        net.initialised.fill_(1)
    return x * t


def _averages(net, t, x):
    net.a.data.copy_(0.9 * net.a + 0.1 * net.head.bias.mean())
    return x * t


PASSES = {
    "counts": (_counts, "its attribute `calls` changes in a training pass .1 before, 2 after"),
    "appends": (_appends, r"its attribute `len\(log\['of passes'\]\)` changes in a training pass"),
    "writes": (_writes, r"line \d+ \(net.a.mul_.*changes parameter `a`"),
    "replaces": (_replaces, "changes parameter `head.weight`"),
    "averages": (_averages, r"line \d+ .*changes parameter `a`"),
    "initialises": (
        _initialises,
        r"line \d+ \(if net.init.*value of buffer `initialised`.*call the module on a batch",
    ),
}
WAYS = READS | UNKNOWN | TENSORS | {name: way for name, (way, _) in PASSES.items()}


class Reader(nn.Module):
    """Reads a number of what it is given."""

    def forward(self, t):
        return float(t)


class Reading(nn.Module):
    """A classifier that does something with a number `t`: of a trained or frozen parameter, or of a
    statistic that a pass moves."""

    def __init__(self, way: str, of: str = "parameter") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.of = way, of
        self.a = nn.Parameter(torch.tensor(0.25), requires_grad=of == "parameter")
        self.fixed = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.norm = nn.BatchNorm2d(CHANNELS, momentum=0.3)
        nn.init.constant_(self.norm.running_var, 0.25)
        self.head, self.reader = nn.Linear(CHANNELS, CLASSES), Reader()
        self.calls, self.log, self.cache = 0, {"of passes": []}, None
        self.register_buffer("initialised", torch.tensor(0))
        self.copied = copy.deepcopy(self.t.detach())
        if way == "alias":
            self.alias = self.t.detach()
        if way == "shadow":
            self.register_buffer("shadow", self.t.data)
        if way == "closure":
            held = self.t.detach()
            self.closure = lambda: held

    @property
    def t(self) -> torch.Tensor:
        return self.norm.running_var[0] if self.of == "buffer" else self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = WAYS[self.way](self, self.t, x)
        return self.head(self.norm(y).mean((2, 3))) + self.head(y.mean((2, 3)))
