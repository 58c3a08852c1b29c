"""The weights and the images of the golden logits: two rules of filling in, each from a listing."""

import numpy as np

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def entries(listing) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of each line of a state dict's listing, in its order."""
    rows = [line.split("\t") for line in listing.read_text().splitlines()]
    return [(name, _shape(dimensions), dtype) for name, dimensions, dtype in rows]


def _shape(dimensions: str) -> tuple[int, ...]:
    # The two kinds of listing write (1, 3) as "1,3" and "1x3", and () as "" and "scalar".
    if dimensions in ("", "scalar"):
        return ()
    return tuple(int(d) for d in dimensions.replace("x", ",").split(","))


def _fixed(name: str, shape):
    """What both rules leave alone: the normalization and the counters of batch norm; else None."""
    if name.startswith("normalize."):
        value = IMAGENET_MEAN if name.endswith("mean") else IMAGENET_STD
        return np.array(value, np.float32).reshape(shape)
    return np.zeros(shape, np.int64) if name.endswith("num_batches_tracked") else None


def seeded_weights(listing) -> dict[str, np.ndarray]:
    """Float32 weights of `logits_seeded_weights*.npz`: normal draws, seeded by their order."""
    weights = {}
    for i, (name, shape, _) in enumerate(entries(listing)):
        last = name.split(".")[-1]
        fixed = _fixed(name, shape)
        if fixed is not None:
            weights[name] = fixed
            continue
        z = np.random.RandomState(1000 + i).standard_normal(shape)
        if last == "running_var":
            z = 0.5 + np.abs(z)
        elif last.startswith("gamma") or last == "temperature":
            z = 0.5 + 0.1 * z
        elif last in ("cls_token", "pos_embed"):
            z = 0.5 * z
        elif z.ndim >= 2:
            z = z / np.sqrt(np.prod(shape[1:]))
        elif last == "weight":
            z = 1 + 0.1 * z
        else:
            z = 0.1 * z
        weights[name] = z.astype(np.float32)
    return weights


def golden_images() -> np.ndarray:
    """f32[2,224,224,3], the input of `logits_seeded_weights*.npz`."""
    images = np.random.RandomState(7).random_sample((2, 3, 224, 224)).astype(np.float32)
    return images.transpose(0, 2, 3, 1)


def forward_weights(listing) -> dict[str, np.ndarray]:
    """Float64 weights of `golden_forward.json`: sines of the places of entry and element."""
    weights = {}
    scale = (0.3, 0.1) if "resnet" in listing.name else (1, 0.2)  # of batch and layer norm
    for i, (name, shape, _) in enumerate(entries(listing)):
        last = name.split(".")[-1]
        fixed = _fixed(name, shape)
        if fixed is not None:
            weights[name] = fixed
            continue
        s = np.sin(0.7 * i + 0.13 * np.arange(np.prod(shape, dtype=int))).reshape(shape)
        fan_in = np.prod(shape[1:], dtype=int)
        if last == "running_var" or last == "temperature":
            value = 1 + 0.3 * s
        elif last == "running_mean":
            value = 0.1 * s
        elif last.startswith("gamma"):
            value = 0.5 + 0.2 * s
        elif s.ndim == 1 and last == "weight":
            value = scale[0] + scale[1] * s
        elif s.ndim == 1 and last == "bias":
            value = 0.05 * s
        elif last in ("cls_token", "pos_embed") or (s.ndim >= 2 and fan_in == 1):
            value = 0.2 * s
        elif s.ndim >= 2:
            value = s / np.sqrt(fan_in)
        else:
            value = 0.1 * s
        weights[name] = value
    return weights


def forward_images(side: int = 224) -> np.ndarray:
    """f64[2,side,side,3], the input of `golden_forward.json`."""
    flat = 0.5 + 0.5 * np.sin(0.017 * np.arange(2 * 3 * side * side))
    return flat.reshape(2, 3, side, side).transpose(0, 2, 3, 1)
