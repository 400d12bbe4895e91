"""Rows in any order, shuffled epochs that can go on at any step, and splits without leaks."""

import itertools
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from fmce_ops.errors import ShardError
from fmce_ops.shards import RandomBatches, ShardStore, split_by_image, split_paper
from fmce_ops.shards import store as store_module
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_shards import make_store, random_maps

MAPS = random_maps(3, 60, 8, 4, 4)


@pytest.fixture(scope="module", params=[None, "zstd"])
def store(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    make_store(folder, MAPS, parts=(20, 50), compression=request.param)
    with ShardStore.open(folder) as opened:
        yield opened


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 59)), max_size=80))
def test_a_batch_is_what_numpy_would_gather(store, rows):
    phases, positions = np.array(rows, int).reshape(-1, 2).T
    np.testing.assert_array_equal(store.batch(phases, positions), MAPS[phases - 1, positions])


@given(start=st.integers(0, 59), length=st.integers(1, 60))
@settings(deadline=None)
def test_consecutive_rows_across_shards(store, start, length):
    positions = np.arange(start, min(60, start + length))
    np.testing.assert_array_equal(store.batch(2, positions), MAPS[1, positions])


def test_a_batch_fills_the_array_it_is_given(store):
    out = np.empty((2, 8, 4, 4), np.float16)
    assert store.batch([3, 1], [5, 59], out) is out
    np.testing.assert_array_equal(out, MAPS[[2, 0], [5, 59]])
    for bad in (out[:1], out.astype(np.float32), np.empty((8, 4, 4, 2), np.float16).T):
        with pytest.raises(ValueError, match="out must be a contiguous float16 array"):
            store.batch([3, 1], [5, 59], bad)


@pytest.mark.parametrize("row", [(0, 0), (4, 0), (1, -1), (1, 60)])
def test_a_row_outside_the_store(store, row):
    with pytest.raises(ShardError, match=f"no row of phase {row[0]}, position {row[1]}"):
        store.batch([1, row[0]], [0, row[1]])


@pytest.mark.parametrize("rows_per_read", [1, 7, 256])
def test_scan(store, rows_per_read):
    pieces = list(store.scan(3, rows_per_read))
    assert max(map(len, pieces)) == min(60, rows_per_read)
    np.testing.assert_array_equal(np.concatenate(pieces), MAPS[2])


def test_numbers_of_the_images(store):
    np.testing.assert_array_equal(store.index, np.arange(60) + 100)
    np.testing.assert_array_equal(store.label, np.arange(60) % 10)


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_MOST_OPEN", 2)
    make_store(tmp_path, MAPS, parts=(20, 50))
    with ShardStore.open(tmp_path) as opened:
        phases, positions = np.divmod(np.random.default_rng(0).permutation(180), 60)
        np.testing.assert_array_equal(opened.batch(phases + 1, positions), MAPS[phases, positions])


def test_a_closed_store_opens_again(store):
    store.close()
    np.testing.assert_array_equal(store.batch(1, [0]), MAPS[0, :1])


def rows_of(batches):
    return [list(zip(b.phase.tolist(), b.position.tolist(), strict=True)) for b in batches]


def epoch(store, rows, seed=5, number=0, step=0, size=16):
    return rows_of(RandomBatches(store, rows, size, seed, number, step))


def test_an_epoch_has_each_row_once_with_its_map(store):
    rows = split_by_image(60, 3, 0.25, 0.1, seed=0).train
    seen = []
    for maps, phase, position in RandomBatches(store, rows, 16, seed=1, epoch=2):
        assert maps.dtype == torch.float16
        np.testing.assert_array_equal(maps.numpy(), MAPS[phase - 1, position])
        seen += zip(phase.tolist(), position.tolist(), strict=True)
    assert len(seen) == len(set(seen)) == len(rows)
    assert set(seen) == set(map(tuple, rows.tolist()))


def test_the_order_depends_on_seed_and_epoch_alone(store):
    rows = split_by_image(60, 3, 0, 0, seed=0).train
    assert epoch(store, rows) == epoch(store, rows)
    assert epoch(store, rows) != epoch(store, rows, number=1)
    assert epoch(store, rows) != epoch(store, rows, seed=6)


@pytest.mark.parametrize("step", [0, 1, 5, 11, 12, 40])
def test_an_epoch_goes_on_at_any_step(store, step):
    rows = split_by_image(60, 3, 0, 0, seed=0).train
    assert epoch(store, rows, step=step) == epoch(store, rows)[step:]
    assert len(RandomBatches(store, rows, 16, 5, 0, step)) == max(0, 12 - step)


def test_every_order_is_equally_likely(store):
    """All 24 orders of four rows; chi-square with 23 degrees of freedom is below 49.7, p = .001."""
    rows = np.array([[1, 0], [1, 1], [2, 0], [3, 9]])
    batches = (RandomBatches(store, rows, 4, seed=0, epoch=n) for n in range(2400))
    counts = Counter(tuple(b._batches[0].tolist()) for b in batches)
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 49.7


def readers() -> int:
    return sum(thread.name.startswith("shards") for thread in threading.enumerate())


def test_the_thread_ends_when_the_iteration_is_left_early(store):
    rows = split_by_image(60, 3, 0, 0, seed=0).train
    iterator = iter(RandomBatches(store, rows, 4, seed=0, epoch=0))
    next(iterator)
    assert readers() == 1
    iterator.close()
    assert readers() == 0
    for _ in RandomBatches(store, rows, 4, seed=0, epoch=0):
        break
    assert readers() == 0


def test_the_thread_reads_a_bounded_number_of_batches_ahead(store):
    rows = split_by_image(60, 3, 0, 0, seed=0).train
    batches, loaded = RandomBatches(store, rows, 4, seed=0, epoch=0), []
    load = batches._load
    batches._load = lambda chosen: loaded.append(1) or load(chosen)
    iterator = iter(batches)
    next(iterator)
    time.sleep(0.3)
    assert len(loaded) == 4  # the one in use and three ahead
    iterator.close()


def test_an_error_of_the_thread_reaches_the_consumer(store):
    rows = np.array([[1, 0], [1, 1], [1, 99]])
    batches = RandomBatches(store, rows, 1, seed=0, epoch=0)
    with pytest.raises(ShardError, match="position 99"):
        list(batches)
    assert readers() == 0


def test_waited_is_the_time_without_data(store):
    rows = split_by_image(60, 3, 0, 0, seed=0).train
    batches = RandomBatches(store, rows, 60, seed=0, epoch=0)
    load = batches._load
    batches._load = lambda chosen: time.sleep(0.2) or load(chosen)
    for _ in batches:
        pass
    assert batches.waited > 0.5  # three batches, and a consumer that does nothing itself
    batches = RandomBatches(store, rows, 60, seed=0, epoch=0)
    iterator = iter(batches)
    next(iterator)
    time.sleep(0.5)
    before = batches.waited
    assert len(list(iterator)) == 2
    assert batches.waited - before < 0.1


@given(
    images=st.integers(4, 60),
    phases=st.integers(1, 5),
    test=st.sampled_from([0, 0.1, 0.25, 0.4]),
    validation=st.sampled_from([0, 0.1, 0.25]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("split", [split_by_image, split_paper])
def test_splits_divide_all_rows_with_equal_counts_per_score(
    split, images, phases, test, validation, seed
):
    parts = split(images, phases, test, validation, seed)
    together = sorted(map(tuple, np.concatenate(parts).tolist()))
    assert together == list(itertools.product(range(1, phases + 1), range(images)))
    for part, share in zip(parts, (None, validation, test), strict=True):
        assert part.dtype == np.int64
        assert part.tolist() == sorted(part.tolist())
        counts = np.bincount(part[:, 0], minlength=phases + 1)[1:]
        assert len(set(counts.tolist())) == 1
        assert share is None or abs(counts[0] - images * share) <= 1
    again = split(images, phases, test, validation, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_split_by_image_keeps_an_image_on_one_side_and_split_paper_does_not():
    def images(rows):
        return set(rows[:, 1].tolist())

    by_image = split_by_image(100, 10, 0.25, 0.1, seed=3)
    assert [len(images(part)) for part in by_image] == [65, 10, 25]
    assert not images(by_image.train) & images(by_image.test)
    assert not images(by_image.train) & images(by_image.validation)
    paper = split_paper(100, 10, 0.25, 0.1, seed=3)
    assert len(images(paper.train) & images(paper.test)) > 80


@pytest.mark.parametrize("shares", [(0.5, 0.5), (1.0, 0), (-0.1, 0), (0.2, float("nan"))])
@pytest.mark.parametrize("split", [split_by_image, split_paper])
def test_shares_that_leave_nothing_to_train_on(split, shares):
    with pytest.raises(ShardError, match="leave nothing of 10 images"):
        split(10, 2, *shares, seed=0)
