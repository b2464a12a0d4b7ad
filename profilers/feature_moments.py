"""Streaming statistics of one feature over the steps of a run: second moments and distances.

Only the newest `lags` values are kept.  From the inner products of a feature with its earlier
values follow the cost of every reuse and forecast within those lags, and the best weights:
`|F_t - sum_i w_i F_i|^2 = G_tt - 2 sum_i w_i G_ti + sum_ij w_i w_j G_ij`.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


class Moments:
    """Moments of one site in one branch.

    `add` takes a step and its values `[M, C]` (sampled tokens x channels), in order of steps.
    Results stay on the device until they are asked for.
    """

    def __init__(self, steps: int, lags: int, *, channels: bool = False) -> None:
        self.recent: deque[tuple[int, Tensor]] = deque(maxlen=lags + 1)  # newest first
        self.shape = steps, lags + 1
        self.per_channel = channels
        self._rows: list[tuple[int, list[int], dict[str, Tensor]]] = []  # step, lags, results

    def add(self, step: int, value: Tensor) -> None:
        value = value.detach().float()
        self.recent.appendleft((step, value))
        past = torch.stack([v for _, v in self.recent])  # [l, M, C]
        lags = [step - earlier for earlier, _ in self.recent]
        known = [i for i, lag in enumerate(lags) if lag < self.shape[1]]
        past, lags = past[: len(known)], lags[: len(known)]
        product = (past * value).double()
        distance = (past - value).abs()
        distance[0] = value.abs()
        norms = past.norm(dim=-1)
        found = {
            "gram": product.mean((1, 2)),
            "l1": distance.double().mean((1, 2)),
            "ratio": (norms[0] / norms.clamp(min=1e-8)).double().mean(1),
        }
        if self.per_channel:
            found["channel_gram"] = product.mean(1).T  # [C, l]
            found["channel_mean"] = value.double().mean(0)  # [C]
        self._rows.append((step, lags, found))

    @property
    def gram(self) -> Floats:
        """`[T, lags + 1]`: mean of `F_t * F_{t-l}` over tokens and channels."""
        return self._table("gram")

    @property
    def l1(self) -> Floats:
        """`[T, lags + 1]`: mean of `|F_t - F_{t-l}|`, and of `|F_t|` at l = 0."""
        return self._table("l1")

    @property
    def token_ratio(self) -> Floats:
        """`[T]`: norm of a token relative to the step before, mean over tokens; 1 where unknown."""
        ratio = self._table("ratio")[:, 1]
        return np.where(ratio > 0, ratio, 1.0)

    @property
    def channel_gram(self) -> Floats:
        """`[C, T, lags + 1]`: `gram` of every channel."""
        found = np.zeros((len(self._rows[0][2]["channel_gram"]), *self.shape))
        for step, lags, row in self._rows:
            found[:, step, lags] = row["channel_gram"].cpu().numpy()
        return found

    @property
    def channel_mean(self) -> Floats:
        """`[C, T]`: mean of every channel."""
        found = np.zeros((len(self._rows[0][2]["channel_mean"]), self.shape[0]))
        for step, _, row in self._rows:
            found[:, step] = row["channel_mean"].cpu().numpy()
        return found

    def _table(self, name: str) -> Floats:
        found = np.zeros(self.shape)
        for step, lags, row in self._rows:
            found[step, lags] = row[name].cpu().numpy()
        return found


class LineErrors:
    """How far one feature of one branch is from lines through two of its earlier values.

    Fed like `Moments`.
    """

    def __init__(self, steps: int, lags: int) -> None:
        self.recent: deque[tuple[int, Tensor]] = deque(maxlen=lags)  # newest first
        self.shape = steps, lags + 1, lags + 1
        self._found: dict[tuple[int, int, int], Tensor] = {}

    def add(self, step: int, value: Tensor) -> None:
        value = value.detach().float()
        before = [(step - earlier, past) for earlier, past in self.recent]
        before = [(lag, past) for lag, past in before if lag < self.shape[1]]
        self._found[step, 0, 0] = value.abs().double().mean()
        for index, (lag, past) in enumerate(before):
            self._found[step, lag, 0] = (past - value).abs().double().mean()
            for older_lag, older in before[index + 1 :]:
                line = past + (past - older) * (lag / (older_lag - lag))
                self._found[step, lag, older_lag] = (line - value).abs().double().mean()
        self.recent.appendleft((step, value))

    @property
    def l1(self) -> Floats:
        """`[T, lags + 1, lags + 1]`: mean of `|F_t - L_t|`.

        `L` is the line through `F_{t-l}` and `F_{t-m}`, l < m; at m = 0 it is `F_{t-l}` itself,
        and at l = m = 0 it is 0.
        """
        found = np.zeros(self.shape)
        for place, value in self._found.items():
            found[place] = float(value)
        return found
