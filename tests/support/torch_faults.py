"""Small networks in PyTorch, healthy and faulty; a file that `--torch` can name."""

import warnings

import torch
from torch import nn

CLASSES, SIDE, CHANNELS = 10, 8, 3


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(CHANNELS * SIDE * SIDE, CLASSES)

    def forward(self, x):
        return self.head(x.flatten(1))


class Convolutional(nn.Module):
    def __init__(self, width: int = 8, channels: int = CHANNELS):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Branch(Linear):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        return -super().forward(x)


class Thresholded(Linear):
    """Branches on numbers of its own, which images do not change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("updating", torch.tensor(0))
        self.register_buffer("center", torch.full((CLASSES,), 0.1))
        self.register_buffer("threshold", torch.tensor(0.3))

    def forward(self, x):
        logits = super().forward(x)
        if self.updating:
            self.center += logits.mean(0)
        if self.threshold == 0:
            return logits
        near = (logits - self.center).abs() < self.threshold
        return torch.where(near, self.center, logits)


class Random(Linear):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class Dropping(Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x))


class Bessel(Linear):
    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x))


class EachByItself(Linear):
    """Its loop over the images can be written down for a fixed number of them only."""

    def forward(self, x):
        return torch.stack([self.head(image.flatten()) for image in x])


class Replacing(Linear):
    """Puts a picture in place of bright images, of which a mask of images tells how many."""

    def __init__(self):
        super().__init__()
        self.register_buffer("picture", torch.zeros(CHANNELS, SIDE, SIDE))

    def forward(self, x):
        x = x.clone()
        x[x.mean((1, 2, 3)) > 0.5] = self.picture
        return super().forward(x)


class Changing(Linear):
    def forward(self, x):
        x.sub_(0.5).div_(0.25)
        return super().forward(x)


class NormalisingItself(Linear):
    """Changes its weights in each pass, as RobustBench's Pang2020Boosting does."""

    def forward(self, x):
        self.head.weight.data = nn.functional.normalize(self.head.weight, dim=1)
        return super().forward(x)


class Both(Linear):
    def forward(self, x):
        return super().forward(x), x.mean((2, 3))


class Named(Linear):
    def forward(self, x):
        return {"logits": super().forward(x), "features": x.mean((2, 3))}


class WithFeatures(Linear):
    def forward(self, x):
        return {"features": x, "logits": super().forward(x)}


class NoLogits(Linear):
    def forward(self, x):
        return super().forward(x).argmax(1)


class Softmax(Linear):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Tied(Linear):
    def __init__(self):
        super().__init__()
        self.again = self.head

    def forward(self, x):
        return self.head(x.flatten(1)) + self.again(x.flatten(1))


class Thermometer(Linear):
    """No gradient reaches the images: the levels that a pixel is above are 0 or 1."""

    def forward(self, x):
        return super().forward((x > 0.3).to(x.dtype) + (x > 0.6).to(x.dtype))


class Rounded(Linear):
    """The same, of which PyTorch gives gradients that are zeros."""

    def forward(self, x):
        return super().forward((8 * x).round() / 8)


class Casting(Linear):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


class CastingElsewhere(Linear):
    """On the CPU this does nothing."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Unpooling(Linear):
    def forward(self, x):
        values, places = nn.functional.max_pool2d(x, 3, 1, 1, return_indices=True)
        return super().forward(nn.functional.max_unpool2d(values, places, 3, 1, 1))


class Masked(Linear):
    """Looks at some pixels only, by a mask among its buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.arange(SIDE * SIDE).view(SIDE, SIDE) % 5 == 2)
        self.head = nn.Linear(CHANNELS * int(self.mask.sum()), CLASSES)

    def forward(self, x):
        return self.head(x[:, :, self.mask].flatten(1))


class Choosing(Linear):
    def forward(self, x):
        return super().forward(x) + x[x > 0.5].sum()


class Counting(Linear):
    def forward(self, x):
        return super().forward(x) + x.nonzero().sum()


class Binning(Linear):
    def forward(self, x):
        return super().forward(x) + (9 * x).long().flatten().bincount(minlength=10)[0]


class Overwriting(Linear):
    """What a backward pass needs is changed in place."""

    def forward(self, x):
        y = x.exp()
        y.mul_(2)
        return super().forward(y)


class Underived(Linear):
    """By a function of which PyTorch has no derivative in this operand."""

    def forward(self, x):
        return super().forward(torch.special.gammainc(x + 1, x))


class Reading(Linear):
    def forward(self, x):
        return super().forward(x) * x.max().item()


class Conditional(Linear):
    def forward(self, x):
        return torch.cond(x.sum() > 1, super().forward, lambda x: self.head(-x.flatten(1)), (x,))


class Containing(nn.Module):
    """A module of TorchScript inside of one that is none."""

    def __init__(self):
        super().__init__()
        self.net = torch.jit.script(Linear())

    def forward(self, x):
        return self.net(x)


def quantised():
    """Return a network whose weights are integers."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIDE * SIDE, CLASSES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's says that this will move to another package
        return torch.ao.quantization.quantize_dynamic(layers.eval(), {nn.Linear}, torch.qint8)


def of_larger_images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, CLASSES))


def of_grey_images():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear4())


class Linear4(nn.Linear):
    def __init__(self):
        super().__init__(4, CLASSES)
