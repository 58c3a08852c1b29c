"""Which networks can be told apart, as letters: those that share one cannot be.

Source: Piepho 2004, doi:10.1198/1061860043515, the algorithm of insertion and absorption.
"""

from collections.abc import Iterable


def of_pairs(count: int, apart: Iterable[tuple[int, int]]) -> list[str]:
    """Give each of `count` networks its letters.

    Args:
      count: number of networks, best first.
      apart: pairs of networks that can be told apart.
    Returns:
      For each network its letters, sorted: two networks have a letter in common exactly if they
      are not in `apart`. The first letters are those of the best networks.
    """
    columns = [frozenset(range(count))]
    for one, other in apart:
        divided = [
            part
            for column in columns
            for part in ([column - {one}, column - {other}] if {one, other} <= column else [column])
        ]
        kept: list[frozenset[int]] = []
        for column in sorted(set(divided), key=lambda c: (-len(c), sorted(c))):
            if not any(column <= larger for larger in kept):  # what is inside of it, it says too
                kept.append(column)
        columns = kept
    columns.sort(key=sorted)
    names = [_letter(at) for at in range(len(columns))]
    return [
        "".join(name for name, column in zip(names, columns, strict=True) if network in column)
        for network in range(count)
    ]


def _letter(at: int) -> str:
    """Name a column: a to z, then A to Z; beyond these no figure can be read."""
    if at >= 52:
        raise ValueError("these networks need more than 52 letters; show fewer in one figure")
    return chr(ord("a") + at) if at < 26 else chr(ord("A") + at - 26)
