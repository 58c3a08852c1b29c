"""The seeded weights and the images of the golden logits."""

import numpy as np


def seeded_weights(listing) -> dict[str, np.ndarray]:
    """The weights of the golden logits: rule in section 7 of the facts of the main paper."""
    weights = {}
    for i, line in enumerate(listing.read_text().splitlines()):
        name, dimensions, _ = line.split("\t")
        shape = tuple(int(d) for d in dimensions.split(",")) if dimensions else ()
        last = name.split(".")[-1]
        if name.startswith("normalize."):
            value = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}[last]
            weights[name] = np.array(value, np.float32).reshape(shape)
            continue
        z = np.random.RandomState(1000 + i).standard_normal(shape)
        if last == "gamma":
            z = 0.5 + 0.1 * z
        elif z.ndim >= 2:
            z = z / np.sqrt(np.prod(shape[1:]))
        elif last == "weight":
            z = 1 + 0.1 * z
        else:
            z = 0.1 * z
        weights[name] = z.astype(np.float32)
    return weights


def golden_images() -> np.ndarray:
    """f32[2,224,224,3], the input of the golden logits."""
    images = np.random.RandomState(7).random_sample((2, 3, 224, 224)).astype(np.float32)
    return images.transpose(0, 2, 3, 1)
