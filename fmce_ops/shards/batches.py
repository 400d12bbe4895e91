"""Shuffled batches of a store, read ahead by one thread."""

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from fmce_ops.shards.store import ShardStore
from fmce_ops.shards.vouch import Integers

_AHEAD = 3  # batches in memory or being read, besides the one that the consumer works on


class Batch(NamedTuple):
    """Maps of a batch and the rows they come from.

    Attributes
    ----------
    maps : tensor of shape (n, C, H, W)
        In the store's type; the consumer's to keep and to change.
    phase : int64 tensor of shape (n,)
        Phase of each map, 1 to K: its score.
    position : int64 tensor of shape (n,)
        Position of its image, for ``store.index[position]`` and ``store.label[position]``.
    """

    maps: torch.Tensor
    phase: torch.Tensor
    position: torch.Tensor


class RandomBatches:
    """One epoch over ``rows``, each row once, in an order drawn uniformly from all orders.

    The order depends on ``seed`` and ``epoch`` alone, so an epoch that was cut off goes on with
    ``step`` as if it had never stopped. One thread reads ahead while the consumer works; it ends
    with the iteration, also when that is left early. An error in it reaches the consumer.

    Parameters
    ----------
    store : ShardStore
    rows : int64 array of shape (R, 2)
        Phase and position of each row, as `split_by_image` returns them.
    batch_size : int
        The last batch may be smaller.
    seed, epoch : int
    step : int
        Batches to leave out at the beginning.

    Attributes
    ----------
    waited : float
        Seconds that the consumer has waited for data so far.
    """

    def __init__(
        self,
        store: ShardStore,
        rows: Integers,
        batch_size: int,
        seed: int,
        epoch: int,
        step: int = 0,
    ) -> None:
        self.waited = 0.0
        self._store = store
        self._rows = rows
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        self._batches = [
            order[first : first + batch_size]
            for first in range(step * batch_size, len(order), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(1, thread_name_prefix="shards")
        try:
            jobs = iter(self._batches)
            ahead = deque(pool.submit(self._load, job) for job in islice(jobs, _AHEAD))
            while ahead:
                asked = time.perf_counter()
                batch = ahead.popleft().result()
                self.waited += time.perf_counter() - asked
                ahead.extend(pool.submit(self._load, job) for job in islice(jobs, 1))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, chosen: Integers) -> Batch:
        phase, position = self._rows[chosen].T.copy()
        maps = self._store.batch(phase, position)
        return Batch(*(torch.from_numpy(array) for array in (maps, phase, position)))
