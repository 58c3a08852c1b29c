"""Steps that are on the device, and what those that ended there said."""

from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

_AHEAD = 2  # steps that may wait on the device for their turn, each with its batch


class Ahead:
    """Steps that are on the device, and what those that ended there said."""

    def __init__(self, meta: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Begin with nothing on the device; `meta`: what was `noted` where the run goes on."""
        self._waiting: deque[tuple[int, dict]] = deque()
        self._rows = list(meta.get("unlogged", ()))  # since the last window
        self.last: dict[str, float] = meta.get("last", {})
        self.skipped: int = meta.get("skipped", 0)  # steps in a row that updated nothing
        self.stop: tuple[int, int] | None = None  # why, and how many steps were taken before

    def add(self, step: int, values: dict) -> None:
        """Take note of a step's metrics, and wait until few enough are on the device."""
        self._waiting.append((step, values))
        if len(self._waiting) > _AHEAD:
            self._take()

    def noted(self) -> dict[str, Any]:
        """Copy the state that a checkpoint keeps of the steps so far; no later step changes it."""
        return {"unlogged": list(self._rows), "skipped": self.skipped, "last": self.last}

    def drain(self) -> None:
        """Wait for all steps that are on the device."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        step, values = self._waiting.popleft()
        row = {key: value.item() for key, value in jax.device_get(values).items()}
        why = row.pop("stop")
        if why and self.stop is None:
            self.stop = (why, step - 1)
        if self.stop is None:
            self.skipped = self.skipped + 1 if row["skipped"] else 0
            self.last = row | {"step": step}
            self._rows.append(row)

    def window(self) -> dict[str, float]:
        """Return means over the steps since the last call, and how many updated nothing."""
        rows, self._rows = self._rows, []
        good = [row for row in rows if not row["skipped"]]
        keys = sorted({key for row in good for key in row})
        means = {key: float(np.mean([row[key] for row in good if key in row])) for key in keys}
        return means | {"skipped": len(rows) - len(good)}
