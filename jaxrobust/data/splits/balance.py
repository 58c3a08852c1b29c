"""Balances images over classes by their labels: their order, and whether they are balanced."""

import numpy as np

_ENOUGH = 32  # below this many images, few classes may be chance


def rows(labels: np.ndarray, n: int, ids: np.ndarray | None = None) -> np.ndarray:
    """Choose `n` of the images with labels i[N], ascending; `ids` i[N]: their places."""
    return np.sort(order(labels, ids)[:n])


def order(labels: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """Order images with labels i[N] so that the first n are spread over the classes, for every n.

    The image of rank r among the N_c of its class comes at r / N_c (Adams' apportionment); hashes
    of `ids` i[N], by default the rows, break ties.
    """
    labels = np.asarray(labels)
    hashes = hash_of(np.arange(len(labels)) if ids is None else np.asarray(ids))
    by_class = np.lexsort((hashes, labels))
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    ranks = np.arange(len(labels)) - np.repeat(first, counts)
    at = np.empty(len(labels))
    at[by_class] = ranks / np.repeat(counts, counts)
    return np.lexsort((hashes, at))


def hash_of(ids: np.ndarray) -> np.ndarray:
    """Hash ids i[N] to u64[N] without collisions; SplitMix64 (Steele et al. 2014)."""
    z = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


_REMEDY = (
    "give images of all classes: --n and the `images` keys choose from the full split, but a part "
    "such as [:1000] selects consecutive images"
)


def one_class(labels: np.ndarray, classes: int) -> str:
    """Return a sentence if several images with labels i[N] all have the same class, else ""."""
    labels = np.asarray(labels)
    if len(labels) < 2 or classes < 2 or (labels != labels[0]).any():
        return ""
    return (
        f"all {len(labels)} images belong to class {labels[0]}, one of {classes} classes, so their "
        f"accuracy does not represent the split; {_REMEDY}"
    )


def lopsided(labels: np.ndarray, classes: int, counts: np.ndarray | None = None) -> str:
    """Return a sentence if images with labels i[N] do not represent their split, else "".

    `counts` i[classes] are the split's images per class. The class shares must differ by a
    twentieth or more (total variation), and by more than a random choice explains: the chi-square
    statistic is eight standard deviations above its mean. Without `counts`, the images, 32 or more,
    must cover less than half of the classes that they could.
    """
    n, shown = len(labels), np.bincount(labels, minlength=classes)
    if not n or classes < 2:
        return ""
    there, most = int((shown > 0).sum()), int(shown.argmax())
    words = (
        f"{n} images cover {there} of {classes} classes, and {shown[most] / n:.1%} of them belong "
        f"to class {most}"
    )
    if counts is None:
        return f"{words}; {_REMEDY}" if n >= _ENOUGH and 2 * there < min(n, classes) else ""
    total, present = int(counts.sum()), counts > 0
    if n >= total or present.sum() < 2:
        return ""
    expected = n * counts[present] / total
    apart = np.abs(shown[present] - expected)
    statistic = (apart**2 / expected).sum() * (total - 1) / (total - n)
    freedom = int(present.sum()) - 1
    if apart.sum() / (2 * n) < 0.05 or statistic <= freedom + 8 * (2 * freedom) ** 0.5:
        return ""
    return (
        f"{words}, which has {counts[most] / total:.1%} of the split's {total:,} images, so "
        f"they are not a random sample of it; {_REMEDY}"
    )


def flags(labels: np.ndarray, classes: int, counts: np.ndarray | None = None) -> dict[str, str]:
    """Flag `one-class` or `lopsided-classes`; arguments as for `lopsided`."""
    if words := one_class(labels, classes):
        return {"one-class": words}
    words = lopsided(labels, classes, counts)
    return {"lopsided-classes": words} if words else {}
