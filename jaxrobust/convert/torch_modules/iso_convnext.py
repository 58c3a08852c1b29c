"""Isotropic ConvNeXt with PatchStem or ConvStem in PyTorch.

Sources: Liu et al. 2022 (arXiv 2201.03545), section 3.3, and the names of its published weights;
stem: Singh, Croce, Hein 2023 (arXiv 2303.01870).
"""

from torch import Tensor, nn

from jaxrobust.convert.torch_modules.layers import EPS, conv_stem


def model(
    depth: int,  # number of blocks and their channels
    dim: int,
    stem_widths: tuple[int, ...] = (),  # of the ConvStem; empty: PatchStem
    stem_strides: tuple[int, ...] = (16,),
    stem_kernels: tuple[int, ...] = (),
    in_channels: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    if stem_widths:
        stem = conv_stem(in_channels, stem_widths, stem_strides, stem_kernels, dim)
    else:
        (stride,) = stem_strides
        stem = nn.Conv2d(in_channels, dim, stride, stride=stride)  # no norm follows
    return IsotropicConvNeXt(stem, depth, dim, num_classes)


class IsotropicConvNeXt(nn.Module):
    """Stem, blocks of one width, mean over the pixels, layer norm, linear."""

    def __init__(self, stem: nn.Module, depth: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*[Block(dim) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(images)).mean((2, 3))))


class Block(nn.Module):
    """x + MLP(LN(depthwise 7x7(x))), without a layer scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(nn.functional.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)
