"""The features that are kept between steps, per site and branch, and the bytes they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cacheplan.adapters.calls import tensors
from cacheplan.types import FeatureSite

Feature = Any  # a tensor, None, or (nested) tuples of those


class Store:
    """Kept features, newest first.  Each owns its memory: nobody else writes to it."""

    def __init__(self) -> None:
        self.peak = 0
        self.bytes = 0
        self._kept: dict[tuple[FeatureSite, int], list[tuple[int, Feature]]] = {}

    def newest(self, site: FeatureSite, branch: int) -> list[tuple[int, Feature]]:
        """Steps and features, newest first."""
        return self._kept.get((site, branch), [])

    def put(self, site: FeatureSite, branch: int, step: int, feature: Feature) -> None:
        self._kept.setdefault((site, branch), []).insert(0, (step, feature))
        self.bytes += storage_bytes(feature)
        self.peak = max(self.peak, self.bytes)

    def keep(self, wanted: Callable[[FeatureSite, int], bool]) -> None:
        """Drop every feature for whose site and step `wanted` is false."""
        for (site, branch), kept in list(self._kept.items()):
            stay = [item for item in kept if wanted(site, item[0])]
            if len(stay) < len(kept):
                self._replace(site, branch, stay)

    def trim(self, site: FeatureSite, branch: int, most: int) -> None:
        """Drop all but the newest `most`."""
        kept = self.newest(site, branch)
        if len(kept) > most:
            self._replace(site, branch, kept[:most])

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0

    def everything(self) -> list[Feature]:
        return [feature for kept in self._kept.values() for _, feature in kept]

    def _replace(self, site: FeatureSite, branch: int, stay: Sequence[tuple[int, Feature]]) -> None:
        gone = [item for item in self._kept[site, branch] if all(item is not s for s in stay)]
        self.bytes -= sum(storage_bytes(feature) for _, feature in gone)
        self._kept[site, branch] = list(stay)


def storage_bytes(feature: Feature) -> int:
    """Bytes of the storages behind a feature, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors(feature))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
