"""Descriptors, functional modules, intervals, the judge and scores."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fmce_ops.convergence import epoch_markers, maturity, smooth
from fmce_ops.errors import ModelError, ShardError
from fmce_ops.maturity import (
    CHANNELS,
    COUNT,
    DEPTHS,
    DESCRIPTORS,
    EACH,
    FEW,
    READ,
    VIEWED,
    VIEWS,
    VIEWS_OF_ONE,
    Judge,
    bags,
    cells,
    depths,
    describe,
    describe_bags,
    describe_each,
    describe_views,
    find_modules,
    kinds,
    load_judge,
    margin,
    module_maps,
    next_to_train,
    reading,
    restarted,
    score,
    start_of,
    views,
)
from fmce_ops.models import build, save_weights
from fmce_ops.training.maturity import (
    JudgePlan,
    LeftOut,
    StudiedRun,
    calibrate,
    certain_judge,
    fit_judge,
    judged,
    leave_out,
    summary,
)
from fmce_ops.training.reporter import Reporters
from fmce_ops.training.study import Checkpoint, bag_sizes, choose_points, describe_run, read_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models

PLAN = JudgePlan(steps=300, batch_size=128, width=16, members=2)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()


class TestDescriptors:
    @settings(max_examples=60, deadline=None)
    @given(
        n=st.integers(1, 9),
        channels=st.integers(1, 40),
        side=st.integers(1, 12),
        scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
        seed=st.integers(0, 99),
    )
    def test_any_count_of_channels_and_any_size_gives_the_same_finite_numbers(
        self, n: int, channels: int, side: int, scale: float, seed: int
    ) -> None:
        found = describe(scale * maps(n, channels, side, side, seed=seed))
        assert found.shape == (DESCRIPTORS,)
        assert torch.isfinite(found).all()
        assert found.abs().max() < 1e3

    def test_the_order_of_channels_and_of_images_does_not_matter(self) -> None:
        made = maps(12, 30, 5, 5)
        generator = torch.Generator().manual_seed(1)
        other = made[torch.randperm(12, generator=generator)]
        other = other[:, torch.randperm(30, generator=generator)]
        torch.testing.assert_close(describe(made), describe(other), rtol=1e-4, atol=1e-5)

    def test_the_scale_of_the_weights_moves_the_log_scale_alone(self) -> None:
        made = maps(12, 30, 5, 5)
        differs = (describe(made) - describe(8 * made)).abs() > 1e-3
        assert differs.sum() == 1

    def test_bags_are_described_as_if_alone(self) -> None:
        made = maps(40, 6, 9, 9)
        bags = describe_bags(made, [1, 1, 16, 16, 40])
        for row, part in zip(
            bags, (made[:1], made[1:2], made[2:18], made[18:34], made), strict=True
        ):
            torch.testing.assert_close(row, describe(part), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(describe_each(made)[:2], bags[:2], rtol=1e-4, atol=1e-5)

    def test_views_of_images_are_described_one_image_after_the_other(self) -> None:
        made = maps(3, 8, 6, 5, 5)
        found = describe_views(made)
        expected = torch.stack([describe(part) for part in made])
        torch.testing.assert_close(found[:, :COUNT], expected[:, :COUNT])
        assert found[:, COUNT:].tolist() == [[0, 1]] * 3
        assert describe(made[0])[VIEWED] == 0

    def test_what_remains_about_the_centres_of_groups(self) -> None:
        generator = torch.Generator().manual_seed(0)
        centres = 10 * torch.randn(4, 12, generator=generator).repeat(16, 1)
        near = describe(centres + 0.1 * torch.randn(64, 12, generator=generator) + 50)
        apart = (near - describe(50 + 5 * torch.randn(64, 12, generator=generator))).abs()
        assert apart[EACH:CHANNELS].max() > 3  # the log share that four groups leave

    def test_channels_and_images_are_counted(self) -> None:
        made = maps(4, 8, 3, 3)
        assert describe(made)[CHANNELS:].tolist() == [3, 2, 0]
        assert describe_each(made)[:, CHANNELS:].tolist() == [[3, 0, 0]] * 4
        assert describe_bags(made, [1, 2])[:, CHANNELS:].tolist() == [[3, 0, 0], [3, 1, 0]]
        assert describe_views(made[None])[:, CHANNELS:].tolist() == [[3, 0, 1]]

    def test_vectors_are_maps_of_one_position(self) -> None:
        made = maps(4, 7)
        torch.testing.assert_close(describe(made), describe(made[:, :, None, None]))

    @pytest.mark.parametrize(
        "wrong", [torch.zeros(3), torch.zeros(0, 2, 3, 3), torch.full((1, 2, 3, 3), torch.nan)]
    )
    def test_what_is_no_map_is_refused(self, wrong: torch.Tensor) -> None:
        with pytest.raises(ModelError, match="feature maps"):
            describe(wrong)

    def test_more_maps_than_can_be_compared_are_refused(self) -> None:
        assert torch.isfinite(describe(maps(4096, 2, 1, 1))).all()
        with pytest.raises(ModelError, match="give 4096 at most"):
            describe(maps(4097, 2, 1, 1))


class TestModules:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
            ("shufflenet_v2_x0_5", ["conv1", "stage2", "stage3", "stage4", "conv5"]),
            ("alexnet", [f"features.{i}" for i in (0, 3, 6, 8, 10)]),
            ("mobilenet_v3_small", [f"features.{i}" for i in range(13)]),
        ],
    )
    def test_families(self, name: str, expected: list[str]) -> None:
        network = models.get_model(name, weights=None)
        found = find_modules(network, torch.zeros(1, 3, 64, 64))
        assert [module.name for module in found] == expected

    def test_norm_activation_and_pooling_belong_to_the_module_before_them(self) -> None:
        network = models.resnet18(weights=None)
        images = torch.rand(2, 3, 64, 64)
        found = find_modules(network, images)
        assert found[0].parts[-1] == "maxpool"
        assert module_maps(network, images, found)[0].shape == (2, 64, 16, 16)

    def test_a_classifier_of_this_project_shows_its_backbone(self) -> None:
        classifier = build("shufflenet_v2_x0_5", 4, stem="small", in_size=16)
        names = [module.name for module in find_modules(classifier, torch.zeros(1, 3, 16, 16))]
        assert names == [f"backbone.{m}" for m in ("conv1", "stage2", "stage3", "stage4", "conv5")]

    def test_the_network_is_left_as_it_was(self) -> None:
        network = models.resnet18(weights=None).train()
        network.layer1.eval()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        images = torch.rand(2, 3, 64, 64)
        module_maps(network, images, find_modules(network, images))
        assert network.training and not network.layer1.training
        assert not any(module._forward_hooks for module in network.modules())
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, before[name])

    def test_named_modules_are_taken_as_they_are(self) -> None:
        network = models.resnet18(weights=None)
        images = torch.zeros(1, 3, 64, 64)
        (found,) = find_modules(network, images, ["layer2.0.conv1"])
        assert found.parts == ("layer2.0.conv1",)
        with pytest.raises(ModelError, match=r"no submodule 'layr2'.*layer2"):
            find_modules(network, images, ["layr2"])

    def test_a_shared_activation_and_pool_belong_to_each_module_in_turn(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
                self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.pool(self.relu(self.first(x)))
                return self.pool(self.relu(self.second(x))).flatten(1)

        network, images = Shared(), torch.rand(2, 3, 16, 16)
        found = find_modules(network, images)
        assert [m.parts for m in found] == [(n, "relu", "pool") for n in ("first", "second")]
        made = module_maps(network, images, found)
        with torch.no_grad():
            first = network.pool(network.first(images).relu())
            second = network.pool(network.second(first).relu())
        assert torch.equal(made[0], first) and torch.equal(made[1], second)

    def test_of_a_module_that_runs_again_the_last_map_is_taken(self) -> None:
        class Again(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.body, self.relu = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.stem(x)
                for _ in range(2):
                    x = self.relu(self.body(x))
                return x.mean((2, 3))

        network, images = Again(), torch.rand(2, 3, 8, 8)
        found = find_modules(network, images)
        assert [module.parts for module in found] == [("stem",), ("body", "relu")]
        last = module_maps(network, images, found)[1]
        assert torch.equal(last.mean((2, 3)), network(images))

    def test_blocks_in_a_list_are_modules_like_those_beside_it(self) -> None:
        class Blocks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
                self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1)) for _ in range(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.stem(x)
                for block in self.blocks:
                    x = x + block(x)
                return x.mean((2, 3))

        found = find_modules(Blocks(), torch.zeros(1, 3, 8, 8))
        assert [module.name for module in found] == ["stem", "blocks.0", "blocks.1", "blocks.2"]

    def test_what_comes_behind_the_last_pooling_belongs_to_no_module(self) -> None:
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Dropout()]
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2))
        (found,) = find_modules(network, torch.zeros(1, 3, 8, 8))
        assert found.parts == ("0", "1")

    def test_images_that_the_network_cannot_take_are_refused(self) -> None:
        with pytest.raises(ModelError, match=r"cannot take images \(1, 3, 8, 8\).*channels"):
            find_modules(nn.Conv2d(1, 4, 3), torch.zeros(2, 3, 8, 8))

    def test_a_network_without_maps_is_refused(self) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        with pytest.raises(ModelError, match="no submodule with weights"):
            find_modules(network, torch.zeros(1, 3, 2, 2))


class TestIntervals:
    def test_each_run_counts_the_same_and_one_worse_is_added(self) -> None:
        errors = [torch.full((5,), 0.01 * k) for k in range(1, 20)]
        errors[0] = torch.full((5000,), 0.01)
        assert margin(errors, 0.9) == pytest.approx(0.18)

    def test_few_runs_bear_the_whole_scale_alone(self) -> None:
        assert margin([torch.zeros(100)] * 8, 0.9) == torch.inf
        assert margin([torch.zeros(100)] * 9, 0.9) == 0.0

    def test_a_new_run_is_covered_as_promised(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def errors() -> torch.Tensor:
            of_run = torch.rand(1, generator=generator)  # errors of a run hang together
            return of_run * torch.rand(30, generator=generator)

        inside = [
            (errors() <= margin([errors() for _ in range(12)], 0.8)).float().mean()
            for _ in range(400)
        ]
        assert 0.8 <= torch.stack(inside).mean() < 0.9

    def test_a_size_without_examples_has_the_margin_of_fewer_images(self) -> None:
        judge = Judge(4, 1)
        size = torch.tensor([1.0, 3.0]).repeat(30)  # neither a map alone, nor 16, nor 256 images
        where = [torch.zeros_like(size), size, torch.full_like(size, DEPTHS - 1)]
        calibrate(judge, [torch.stack([size, *where], dim=1)] * 12)
        known, alone = judge.margins
        assert known[:, -1].tolist() == [torch.inf, 1.0, 1.0, 3.0, 3.0]
        assert known[:, 0].isinf().all()  # nothing is known of early modules
        assert alone.isinf().all()  # nor of any without its network

    def test_without_a_known_margin_the_interval_is_the_whole_scale(self) -> None:
        rows, depth, _ = synthetic("x", 0).rows()
        for found in Judge(4, 1).scores(rows, depth):
            assert (found.low, found.high) == (0.0, 1.0)

    def test_the_more_votes_differ_the_wider_the_interval(self) -> None:
        judge = certain_judge([synthetic(str(k), k) for k in range(9)], PLAN, folds=3)
        rows, depth, _ = synthetic("new", 99).rows()
        rows[:, DESCRIPTORS : 2 * DESCRIPTORS] += torch.randn(DESCRIPTORS)  # a strange start
        usual, _, _ = synthetic("new", 99).rows()

        def widths(rows: torch.Tensor) -> float:
            return sum(s.high - s.low for s in judge.scores(rows, depth))

        assert widths(rows) > widths(usual)

    def test_a_count_between_two_sizes_has_the_interval_of_the_smaller(self) -> None:
        descriptors = torch.zeros(5, 1, DESCRIPTORS)
        descriptors[:, 0, COUNT] = torch.tensor([1.0, 15.0, 3.0, 100.0, 1000.0]).log2()
        descriptors[2, 0, VIEWED] = 1.0
        known = {"start": descriptors, "network": descriptors}
        depth = torch.tensor([0.0, 0.5, 0.9, 0.9, 1.0])
        for told, unknown in ((known, 0), ({}, 1), ({"start": descriptors}, 1)):
            alone, size, part = cells(reading(descriptors, **told)[:, 0], depth)
            assert alone.tolist() == [unknown] * 5
            assert size.tolist() == [0, 0, 1, 3, 4]
            assert part.tolist() == [0, 1, 1, 1, 2]


def synthetic(name: str, seed: int, modules: int = 2) -> StudiedRun:
    """A run whose descriptors grow with its maturity, in units of its own."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.linspace(0, 1, 6)[:, None].expand(6, modules)
    sizes = torch.tensor(bag_sizes(64))
    rows = torch.randn(7, len(sizes), modules, DESCRIPTORS, generator=generator)
    rows /= sizes[:, None, None].sqrt()
    own = 0.2 * torch.randn(1, generator=generator)
    level = torch.cat([torch.zeros(1, modules), truth])[:, None, :, None] * 4 + own
    rows[..., :4] += level
    rows[..., EACH : EACH + 4] += level
    rows[..., CHANNELS] = 5.0
    rows[..., COUNT] = sizes.log2()[:, None]
    rows[..., VIEWED] = 0.0
    rows[:, 32:64, :, VIEWED] = 1.0
    return StudiedRun(name, tuple("ab"[:modules]), rows[1:], rows[0], truth)


class TestJudge:
    def test_runs_left_out_are_put_in_order(self) -> None:
        runs = [synthetic(str(k), k) for k in range(4)]
        found = leave_out(runs, PLAN, Reporters(), lambda: 0)
        figures = summary(list(found.values()))
        assert figures["spearman"] > 0.9
        assert figures["error"] < 0.15
        assert figures["coverage"] == 1.0 and figures["width"] == 1.0  # four runs bear no interval

    def test_a_summary_is_of_the_last_module_alone(self) -> None:
        truth = torch.linspace(0, 1, 10)
        both, depth = truth.repeat(2), torch.tensor([0.75, 1.0]).repeat_interleave(10)
        value = torch.cat([1 - truth, truth])
        found = LeftOut(value, value, value, both, torch.zeros(20, dtype=torch.long), depth)
        assert summary([found])["spearman"] == pytest.approx(1)
        assert summary([found])["error"] == pytest.approx(0)
        assert summary([found], depth=0.75)["spearman"] == pytest.approx(-1)

    def test_nine_runs_bear_an_interval_that_is_narrower_for_more_images(self) -> None:
        judge = certain_judge([synthetic(str(k), k) for k in range(9)], PLAN, folds=3)
        found = judged(judge, synthetic("new", 99))
        one, many = summary([found], VIEWS_OF_ONE), summary([found])
        assert many["width"] < one["width"]
        assert many["coverage"] >= 0.5

    def test_the_same_seed_gives_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            judge = fit_judge([synthetic("x", 0), synthetic("y", 1)], PLAN)
            save_weights(tmp_path / name, judge.state_dict(), {})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_a_judge_comes_back_from_its_file(self, tmp_path: Path) -> None:
        judge = fit_judge([synthetic("x", 0), synthetic("y", 1)], PLAN)
        save_weights(tmp_path / "judge.safetensors", judge.state_dict(), {})
        again = load_judge(tmp_path / "judge.safetensors")
        rows, depth, _ = synthetic("z", 2).rows()
        torch.testing.assert_close(again(rows, depth)[0], judge(rows, depth)[0])

    @pytest.mark.parametrize("content", [None, b"", b"not a judge"])
    def test_what_is_no_judge_is_refused(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "judge.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ModelError, match="no judge of maturity"):
            load_judge(path)

    def test_what_lies_far_from_all_that_was_seen_is_still_judged(self) -> None:
        judge = fit_judge([synthetic("x", 0), synthetic("y", 1)], PLAN)
        for far in torch.tensor([1e6, 1e30])[:, None, None].expand(2, 1, DESCRIPTORS):
            for known in ({}, {"start": -far, "network": far}):
                assert 0 <= judge(reading(far, **known), torch.ones(1))[0].item() <= 1

    def test_a_module_is_judged_with_its_network_and_with_less_certainty_alone(self) -> None:
        plan = replace(PLAN, steps=600)
        judge = certain_judge([synthetic(str(k), k) for k in range(9)], plan, folds=3)
        widths = []
        for alone in (False, True):
            rows, depth, truth = synthetic("new", 99).rows(alone=alone)
            found = judge.scores(rows, depth)
            assert max(abs(s.value - t) for s, t in zip(found, truth.tolist(), strict=True)) < 0.5
            widths.append(sum(s.high - s.low for s in found) / len(found))
        assert widths[0] < widths[1]

    def test_the_score_is_the_mean_log_odds_of_those_who_know_what_they_read(self) -> None:
        judge = fit_judge([synthetic("x", 0), synthetic("y", 1)], PLAN)
        rows, depth, _ = synthetic("z", 2).rows()
        rows, depth = rows[-1:], depth[-1:]
        without_network, without_start = rows.clone(), rows.clone()
        without_network[:, 2 * DESCRIPTORS :] = torch.nan
        without_start[:, DESCRIPTORS : 2 * DESCRIPTORS] = torch.nan
        voters = judge.electorate(int(kinds(rows)))
        known = (rows, [0, 1, 2, 3]), (without_network, [1, 2, 3]), (without_start, [0, 3])
        for read, able in known:
            with torch.no_grad():
                votes = voters.votes(voters.standardised(read, depth))[able].flatten()
                value, doubt = judge(read, depth)
            odds = torch.log(votes / (1 - votes)).clamp(-math.log(999), math.log(999))
            torch.testing.assert_close(value[0], odds.mean().sigmoid())
            torch.testing.assert_close(doubt[0], 0.02 + votes.std(correction=0))

    def test_members_read_what_they_are_meant_to(self) -> None:
        one, views_of_one, several = map(Judge(8, 1).electorate, range(3))
        for voters, counts in ((one, (70, 70, 70)), (views_of_one, (112, 112, 42))):
            every, _, part = counts
            read = [set(members.columns.tolist()) for members in voters.patterns]
            assert list(map(len, read)) == [2 * every + 3, 2 * every + 3, 2 * part + 3, part + 3]
            assert all({CHANNELS, COUNT, READ} <= columns for columns in read)
        read = [set(members.columns.tolist()) for members in several.patterns]
        start, network = range(DESCRIPTORS, 2 * DESCRIPTORS), range(2 * DESCRIPTORS, READ)
        assert [bool(columns & set(start)) for columns in read] == [False, True, True, False]
        assert [bool(columns & set(network)) for columns in read] == [True, False, False, False]
        assert not any(columns & set(range(EACH)) for columns in read[2:])
        assert not any(VIEWED in columns for columns in read)

    def test_the_last_module_of_one_lies_at_the_end(self) -> None:
        assert depths(1).tolist() == [1.0]
        assert depths(3).tolist() == [0.0, 0.5, 1.0]


class TestScore:
    judge = fit_judge([synthetic("x", 0), synthetic("y", 1)], PLAN)

    def test_every_functional_module_gets_a_score_with_an_interval(self) -> None:
        network = models.resnet18(weights=None)
        found = score(network, torch.rand(20, 3, 32, 32), judge=self.judge)
        assert list(found) == ["conv1", "layer1", "layer2", "layer3", "layer4"]
        assert all(0 <= s.low <= s.value <= s.high <= 1 for s in found.values())
        assert found[next_to_train(found)].value == min(s.value for s in found.values())

    def test_of_many_images_the_mean_over_parts_is_taken(self) -> None:
        network = build("shufflenet_v2_x0_5", 4, stem="small", in_size=16)
        images = torch.rand(512, 3, 16, 16)
        start = start_of(network, images)
        whole, first, second = (
            score(network, part, judge=self.judge, start=start)["backbone.conv5"].value
            for part in (images, images[:256], images[256:])
        )
        assert whole == pytest.approx((first + second) / 2, abs=1e-6)

    def test_what_is_left_over_behind_whole_parts_is_not_read(self) -> None:
        assert list(map(len, bags(torch.zeros(600, 2)))) == [256, 256]
        assert list(map(len, bags(torch.zeros(20, 2)))) == [20]

    def test_few_images_are_read_as_one_is(self) -> None:
        network = build("shufflenet_v2_x0_5", 4, stem="small", in_size=16)
        image = torch.rand(1, 3, 16, 16)
        one, eight = (
            score(network, image.expand(n, -1, -1, -1), judge=self.judge)["backbone.conv5"]
            for n in (1, 8)
        )
        assert eight.value == pytest.approx(one.value, abs=1e-4)
        assert eight.high - eight.low == pytest.approx(one.high - one.low, abs=1e-3)

    def test_a_network_that_works_on_tokens_is_refused(self) -> None:
        vit = models.VisionTransformer(16, 8, 1, 2, 16, 32)
        with pytest.raises(ModelError, match="VisionTransformer works on tokens"):
            score(vit, torch.rand(2, 3, 16, 16), judge=self.judge)

    def test_without_images_there_is_no_score(self) -> None:
        network = build("shufflenet_v2_x0_5", 4, stem="small", in_size=16)
        with pytest.raises(ModelError, match="give at least one"):
            score(network, torch.zeros(0, 3, 16, 16), judge=self.judge)

    def test_the_random_numbers_of_the_user_are_left_alone(self) -> None:
        network = build("shufflenet_v2_x0_5", 4, stem="small", in_size=16)
        images = torch.rand(16, 3, 16, 16)
        load_judge.__globals__["_loaded"].cache_clear()
        before = torch.get_rng_state()
        score(network, images)
        assert torch.equal(before, torch.get_rng_state())

    def test_few_images_are_shown_altered_and_score_the_same_in_any_company(self) -> None:
        network = build("shufflenet_v2_x0_5", 4, stem="small", in_size=16)
        images = torch.rand(FEW - 1, 3, 16, 16)
        start = start_of(network, images[:1])
        one = score(network, images[:1], judge=self.judge, start=start)["backbone.conv5"].value
        first = [
            score(network, part, judge=self.judge)["backbone.conv5"].value
            for part in (images[:1], images[:1].clone())
        ]
        assert first == [one, one]
        seen = views(images)
        assert seen.shape == (FEW - 1, VIEWS, 3, 16, 16)
        torch.testing.assert_close(seen[:, 0], images)
        torch.testing.assert_close(seen[3], views(images[3:4])[0])
        assert (seen[:, 1:] - images[:, None]).abs().mean(dim=(0, 2, 3, 4)).min() > 0.05

    def test_a_network_that_cannot_be_made_anew_is_judged_without_its_start(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 8, 3)
                self.scale = nn.Parameter(torch.ones(1))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                made: torch.Tensor = self.conv(x) * self.scale
                return made

        network, images = Scaled(), torch.rand(20, 3, 8, 8)
        assert start_of(network, images).isnan().all()
        assert 0 <= score(network, images, judge=self.judge)["conv"].value <= 1

    def test_a_named_module_keeps_its_place_in_the_network(self) -> None:
        network = models.resnet18(weights=None)
        images = torch.rand(20, 3, 32, 32)
        every = score(network, images, judge=self.judge)
        (one,) = score(network, images, ["layer2"], judge=self.judge).values()
        assert one.value == pytest.approx(every["layer2"].value, abs=1e-6)

    def test_the_judge_that_comes_with_the_package_knows_a_random_network(self) -> None:
        network = build("shufflenet_v2_x0_5", 4, stem="small", in_size=32)
        found = score(network, torch.rand(64, 3, 32, 32))
        assert max(s.value for s in found.values()) < 0.5


class TestStudy:
    def test_maturity_is_the_share_of_the_fall_in_log_loss(self) -> None:
        losses = [2.0, 2.5, 1.9, 1.2, 0.8, 0.5, 0.31, 0.3, 0.3, 0.3]
        markers = epoch_markers(losses, 3, 1e-9, method="ema")
        found = maturity(losses, markers, method="ema")
        logs = np.log(smooth(losses, method="ema"))
        expected = (logs[1] - logs) / (logs[1] - logs[-1])
        np.testing.assert_allclose(found, np.clip(expected, 0, 1) * (np.arange(10) > 1), atol=1e-12)
        for k, point in enumerate(markers.points, start=1):
            assert found[point - 1] >= k / 3 - 1e-9
            assert found[point - 2] < k / 3

    def test_points_are_spread_evenly_over_maturity(self) -> None:
        assert choose_points([0.0, 0.1, 0.2, 0.6, 0.9, 1.0, 1.0], 3) == [1, 4, 6]
        assert choose_points([0.0, 1.0], 12) == [1, 2]

    def test_bags_are_of_all_sizes_that_fit(self) -> None:
        assert bag_sizes(20) == [1] * 40 + [16]
        assert bag_sizes(256).count(64) == 4 and bag_sizes(256)[-1] == 256

    def test_a_run_is_described_read_back_and_refused_when_it_is_something_else(
        self, tmp_path: Path
    ) -> None:
        from fmce_ops.training.devices import launch

        classifier = build("shufflenet_v2_x0_5", 4, stem="small", in_size=16)
        save_weights(tmp_path / "w.safetensors", classifier.state_dict(), {})
        checkpoints = [Checkpoint(tmp_path / "w.safetensors", k, k / 2) for k in range(3)]
        inputs = torch.rand(18, 3, 16, 16)
        store = tmp_path / "store"
        for _ in range(2):  # the second time all shards are there
            manifest = describe_run(
                launch(), classifier, checkpoints, inputs, store, Reporters(), {"run": "x"}
            )
        manifest.save(store)
        run = read_run(store, "x")
        assert run.descriptors.shape == (3, 37, 5, DESCRIPTORS)
        assert run.start.shape == (37, 5, DESCRIPTORS)
        with restarted(classifier) as possible:
            made = module_maps(classifier, inputs[:16], find_modules(classifier, inputs))
        assert possible
        torch.testing.assert_close(run.start[-1, -1], describe(made[-1]))
        assert run.maturity[:, 0].tolist() == [0.0, 0.5, 1.0]
        found = find_modules(classifier, inputs)
        expected = describe(module_maps(classifier, inputs[:16], found)[-1])
        torch.testing.assert_close(run.descriptors[0, 36, 4], expected)
        assert run.descriptors[0, 36, 4, COUNT] == 4.0  # log2 of 16 images
        seen = module_maps(classifier, views(inputs[5:6])[0], found)[-1]
        torch.testing.assert_close(
            run.descriptors[0, 18 + 5, 4], describe_views(seen[None])[0], rtol=1e-3, atol=1e-4
        )
        replace(manifest, provenance={"run": "x"}).save(store)
        with pytest.raises(ShardError, match="dvc repro study"):
            read_run(store, "x")
