"""Small networks in PyTorch, healthy and faulty; a file that `--torch` can name."""

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
