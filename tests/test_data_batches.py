"""Batches: resizing, augmentation, and that any step can be made again on its own."""

from itertools import product

import pytest
import torch
from fmce_ops.data import Augment, TrainBatches, augment, derive_seed, epoch_order, to_input
from fmce_ops.errors import ParamsError
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.transforms import functional


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    pixels = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    return pixels[:, None], torch.from_numpy(data.target)


def noise(n: int, channels: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, side, side)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def batches(n: int = 200, **changes) -> TrainBatches:
    images, labels = digits()
    settings = {
        "batch_size": 64,
        "size": 16,
        "mean": [0.3],
        "std": [0.4],
        "augment": Augment(pad=2, flip=True),
        "seed": 5,
    }
    return TrainBatches(images[:n], labels[:n], **(settings | changes))


class TestToInput:
    @pytest.mark.parametrize(("side", "size"), [(8, 32), (32, 32), (84, 56)])
    def test_colour_agrees_with_torchvision(self, side: int, size: int) -> None:
        images = noise(4, 3, side)
        mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
        resized = functional.resize(images.float() / 255, [size, size], antialias=True)
        expected = functional.normalize(resized, mean, std)
        result = to_input(images, size=size, mean=mean, std=std)
        assert result.dtype == torch.float32
        assert result.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, check_stride=False)

    def test_grey_is_copied_to_three_channels(self) -> None:
        result = to_input(noise(4, 1, 8), size=8, mean=[0.5], std=[0.5], channels_last=False)
        assert result.shape == (4, 3, 8, 8) and result.is_contiguous()
        expected = noise(4, 1, 8) / 127.5 - 1
        for channel in range(3):
            torch.testing.assert_close(result[:, channel : channel + 1], expected)


class TestAugment:
    def variants(self, image: Tensor, pad: int, flips: tuple[bool, ...]) -> list[bytes]:
        """Every crop of one image (c, s, s), made with loops."""
        channels, side, _ = image.shape
        padded = torch.zeros(channels, side + 2 * pad, side + 2 * pad, dtype=image.dtype)
        padded[:, pad : pad + side, pad : pad + side] = image
        found = []
        for top, left, flip in product(range(2 * pad + 1), range(2 * pad + 1), flips):
            crop = padded[:, top : top + side, left : left + side]
            found.append(bytes((crop.flip(2) if flip else crop).contiguous().numpy()))
        return found

    def test_each_crop_and_mirror_image_is_equally_likely(self) -> None:
        image = noise(1, 3, 6)
        known = self.variants(image[0], 1, (False, True))
        many = augment(
            image.expand(9000, -1, -1, -1), Augment(1, True), torch.Generator().manual_seed(1)
        )
        counts = [0] * len(known)
        for result in many:
            counts[known.index(bytes(result.numpy()))] += 1
        assert sum((count - 500) ** 2 / 500 for count in counts) < 40.8  # chi2, 17 degrees, .999

    def test_images_of_a_batch_change_independently(self) -> None:
        images = noise(50, 1, 6)
        result = augment(images, Augment(2, False), torch.Generator().manual_seed(0))
        places = []
        for before, after in zip(images, result, strict=True):
            places.append(self.variants(before, 2, (False,)).index(bytes(after.numpy())))
        assert len(set(places)) > 15

    def test_without_settings_nothing_changes(self) -> None:
        images = noise(9, 3, 6)
        assert torch.equal(augment(images, Augment(), torch.Generator()), images)

    def test_a_generator_repeats_itself(self) -> None:
        first, second = (
            augment(noise(9, 3, 6), Augment(2, True), torch.Generator().manual_seed(3))
            for _ in range(2)
        )
        assert torch.equal(first, second)


class TestSeeds:
    def test_an_epoch_visits_every_image_once_in_an_order_of_its_own(self) -> None:
        orders = [epoch_order(100, seed, epoch) for seed, epoch in product((0, 1), (0, 1))]
        assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
        assert len({tuple(order.tolist()) for order in orders}) == 4

    def test_the_global_generator_plays_no_part(self) -> None:
        state = torch.get_rng_state()
        first = epoch_order(50, 3, 4)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(9)
        assert torch.equal(epoch_order(50, 3, 4), first)

    def test_a_derived_seed_is_half_the_blake2_hash_of_its_parts(self) -> None:
        # printf 1,2,3 | b2sum -l 64
        assert derive_seed(1, 2, 3) == 0xE2353910701F1C2A // 2
        assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(1, 2, 3)}) == 3


class TestTrainBatches:
    def test_any_step_can_be_made_again_on_its_own(self) -> None:
        forward = {key: batches().batch(*key) for key in product((0, 1), (0, 1, 2))}
        again = batches()
        for key in reversed(forward):
            images, labels = again.batch(*key)
            assert torch.equal(images, forward[key][0]) and torch.equal(labels, forward[key][1])

    def test_without_augmentation_images_are_the_network_inputs_in_the_order_of_the_epoch(
        self,
    ) -> None:
        images, labels = digits()
        chosen = epoch_order(200, 5, 7)[64:128]
        x, y = batches(augment=Augment()).batch(7, 1)
        expected = to_input(images[chosen], size=16, mean=[0.3], std=[0.4])
        torch.testing.assert_close(x, expected)
        assert torch.equal(y, labels[chosen])

    def test_padding_is_black_as_the_network_sees_it(self) -> None:
        x, _ = batches(augment=Augment(pad=16)).batch(0, 0)
        assert x.amin() == pytest.approx(-0.3 / 0.4)

    @pytest.mark.parametrize("world", [2, 4])
    def test_processes_share_the_batch_of_one(self, world: int) -> None:
        alone = batches()
        shares = [batches(rank=rank, world=world) for rank in range(world)]
        assert {share.steps for share in shares} == {alone.steps}
        for step in range(alone.steps):
            images, labels = zip(*(share.batch(3, step) for share in shares), strict=True)
            assert torch.equal(torch.cat(images), alone.batch(3, step)[0])
            assert torch.equal(torch.cat(labels), alone.batch(3, step)[1])

    def test_a_partial_last_batch_is_left_out(self) -> None:
        assert batches(n=200).steps == 3
        assert batches(n=192).steps == 3

    def test_data_smaller_than_a_batch_makes_one_batch(self) -> None:
        assert batches(n=51).steps == 1
        assert len(batches(n=51).batch(0, 0)[1]) == 51
        assert len(batches(n=51, world=2).batch(0, 0)[1]) == 25

    def test_an_uneven_share_is_refused(self) -> None:
        with pytest.raises(ParamsError, match=r"64 images .* by 3 processes: choose a multiple"):
            batches(world=3)
        with pytest.raises(ParamsError, match="1 training images are too few"):
            batches(n=1, world=2)
