import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import ks_2samp, kstest
from torch import Tensor
from torchvision.transforms import v2

from maect_fast.config import AugmentConfig, DataConfig, EncoderConfig, ViewConfig
from maect_fast.data import TensorSource, augment, build_source

WHOLE: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
PLAIN: dict[str, Any] = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
GREY: dict[str, Any] = {"mean": [0.3], "std": [0.4]}


def waves(size: int, num: int = 32) -> TensorSource:
    source = build_source(
        DataConfig(source="synthetic", num_images=num),
        EncoderConfig(img_size=size),
        split="train",
    )
    assert isinstance(source, TensorSource)
    return source


def digits() -> TensorSource:
    source = build_source(
        DataConfig(source="digits"), EncoderConfig(img_size=8, in_chans=1), split="train"
    )
    assert isinstance(source, TensorSource)
    return source


def tensor_views(
    images: Tensor,
    config: AugmentConfig,
    *,
    ids: Tensor | None = None,
    img_size: int | None = None,
    num_views: int = 2,
    seed: int = 5,
    epoch: int = 0,
) -> Tensor:
    return augment.tensor_views(
        images,
        torch.arange(len(images), device=images.device) if ids is None else ids,
        augment=config,
        img_size=img_size or images.shape[-1],
        num_views=num_views,
        seed=seed,
        epoch=epoch,
    )


def draws_of(num: int, *, epoch: int = 0, num_views: int = 1) -> Any:
    """The choices of `num` images as nested lists [num][V][16][4]."""
    ids = torch.arange(num)
    numbers = augment.draw(5, ids, epoch=epoch, num_views=num_views, num=augment.NOISE)
    return numbers.transpose(0, 1).tolist()


def normalized(images: Tensor, config: AugmentConfig) -> Tensor:
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (config.mean, config.std))
    return (images.float().cpu() / 255 - mean) / std


def test_whole_crop_gives_the_image_back(device: torch.device) -> None:
    images = digits().images[:50].to(device)
    config = AugmentConfig(flip=0.0, **WHOLE, **GREY)
    views = tensor_views(images, config)
    assert views.shape == (2, 50, 1, 8, 8)
    assert views.dtype == torch.float32
    assert views.device.type == device.type
    for view in views.cpu():
        torch.testing.assert_close(view, normalized(images, config), atol=1e-5, rtol=0)


def test_digits_are_never_mirrored_without_flip(device: torch.device) -> None:
    images = digits().images.to(device)
    expected = normalized(images, AugmentConfig(**GREY))
    for flip, wanted in ((0.0, expected), (1.0, expected.flip(-1))):
        config = AugmentConfig(flip=flip, **WHOLE, **GREY)
        views = tensor_views(images, config, num_views=1, epoch=3)[0].cpu()
        torch.testing.assert_close(views, wanted, atol=1e-5, rtol=0)


def test_half_of_the_views_are_mirrored(device: torch.device) -> None:
    images = digits().images.to(device)
    config = AugmentConfig(flip=0.5, **WHOLE, **GREY)
    views = tensor_views(images, config).cpu()
    same = (views - normalized(images, config)).abs().amax(dim=(2, 3, 4)) < 1e-4
    assert 0.46 < same.double().mean() < 0.54
    # The views of one image choose independently.
    assert 0.46 < (same[0] == same[1]).double().mean() < 0.54


def test_a_view_is_a_function_of_seed_image_view_and_epoch_alone(device: torch.device) -> None:
    source = digits()
    ids = torch.tensor([3, 7, 900, 1000])
    config = AugmentConfig(rotation=0.2, contrast=0.3, noise=0.1, **GREY)

    def views(ids: Tensor, num_views: int = 2, **others: int) -> Tensor:
        return tensor_views(
            source.images[ids].to(device),
            config,
            ids=ids.to(device),
            num_views=num_views,
            **others,
        )

    batch = views(ids)
    assert torch.equal(batch, views(ids))
    assert torch.equal(views(ids[2:3]), batch[:, 2:3])
    assert torch.equal(views(ids.flip(0)), batch.flip(1))
    assert torch.equal(views(ids, num_views=1), batch[:1])
    for other in (views(ids, epoch=1), views(ids, seed=6), batch.flip(0)):
        # No view of any image stays.
        assert ((other - batch).abs().amax(dim=(2, 3, 4)) > 0.1).all()


def test_views_do_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    tensor_views(digits().images[:4], AugmentConfig(noise=0.1, **GREY))
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_standard_normal_and_independent(device: torch.device) -> None:
    images = torch.full((300, 1, 8, 8), 51, dtype=torch.uint8, device=device)
    config = AugmentConfig(noise=0.1, mean=[0.2], std=[0.5], **WHOLE)
    noise = tensor_views(images, config).cpu().double() / (0.1 / 0.5)
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    # Neighbouring pixels, images and views are uncorrelated: 0.04 is above 5 standard errors.
    columns = noise.reshape(600, 64)
    correlation = torch.corrcoef(columns.T) - torch.eye(64)
    assert correlation.abs().max() < 5 / math.sqrt(600)
    assert abs(torch.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.04
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.04


@pytest.mark.parametrize("size", [3, 5])
def test_noise_covers_sizes_that_four_does_not_divide(size: int) -> None:
    images = torch.zeros(50, 3, size, size, dtype=torch.uint8)
    views = tensor_views(images, AugmentConfig(noise=1.0, **WHOLE, **PLAIN))
    assert (views.std(dim=(0, 1)) > 0.7).all()


def test_contrast_keeps_the_mean_and_scales_by_at_most_c() -> None:
    images = waves(16).images
    config = AugmentConfig(flip=0.0, contrast=0.3, **WHOLE, **PLAIN)
    views = tensor_views(images, config, num_views=8)
    plain = images.float() / 255
    torch.testing.assert_close(
        views.mean(dim=(2, 3, 4)), plain.mean(dim=(1, 2, 3)).expand(8, -1), atol=1e-4, rtol=0
    )
    factor = views.std(dim=(2, 3, 4)) / plain.std(dim=(1, 2, 3))
    # The image's mean is over all channels, so that colours fade as well.
    torch.testing.assert_close(
        (views - views.mean(dim=(2, 3, 4), keepdim=True)) / factor[..., None, None, None],
        (plain - plain.mean(dim=(1, 2, 3), keepdim=True)).expand(8, -1, -1, -1, -1),
        atol=1e-3,
        rtol=0,
    )
    spread = (factor.flatten().double().numpy() - 0.7) / 0.6
    assert kstest(spread, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(1000, 1400), (300, 2000)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0)])
def test_crops_are_distributed_like_those_of_torchvision(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    num = 3000
    config = AugmentConfig(scale=scale)
    numbers = augment.draw(5, torch.arange(num), epoch=0, num_views=1, num=augment.CROP_TRIES)[0]
    whole = np.array([augment.crop_box(d, height, width, config) for d in numbers.tolist()])
    fractional = torch.stack(augment.crop_boxes(numbers, height, width, config), dim=-1)

    torchvision = v2.RandomResizedCrop(224, scale=scale)
    image = torch.empty(1, height, width)
    theirs = np.array(
        [
            [box[key] for key in ("top", "left", "height", "width")]
            for box in (torchvision.make_params([image]) for _ in range(num))
        ]
    )

    def facts(boxes: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        top, left, h, w = boxes.astype(np.float64).T
        return {"area": h * w, "ratio": np.log(w / h), "top": top, "left": left}

    for ours in (whole, fractional.numpy()):
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, 0] + ours[:, 2] <= height + 1e-3).all()
        assert (ours[:, 1] + ours[:, 3] <= width + 1e-3).all()
        for name, values in facts(ours).items():
            # Whole pixels against fractions of them: ties broken by less than a pixel.
            assert ks_2samp(values, facts(theirs)[name]).pvalue > 1e-3, name


def test_crop_ratio_is_log_uniform_and_area_uniform_where_every_try_fits() -> None:
    config = AugmentConfig(scale=(0.1, 0.5))
    numbers = augment.draw(5, torch.arange(4000), epoch=0, num_views=1, num=augment.CROP_TRIES)[0]
    _, _, h, w = (x.double().numpy() for x in augment.crop_boxes(numbers, 100, 100, config))
    ratio = (np.log(w / h) - math.log(3 / 4)) / (math.log(4 / 3) - math.log(3 / 4))
    assert kstest(ratio, "uniform").pvalue > 1e-3
    assert kstest((h * w / 1e4 - 0.1) / 0.4, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), [(100, 10), (10, 100), (57, 61), (1, 1)])
def test_crop_falls_back_to_the_middle_like_torchvision(height: int, width: int) -> None:
    # The whole area at a ratio that the image does not have: no try fits.
    ratio = (0.75, 0.76) if height < width else (1.32, 1.33)
    config = AugmentConfig(scale=(1.0, 1.0), ratio=ratio)
    numbers = augment.draw(5, torch.arange(1), epoch=0, num_views=1, num=augment.CROP_TRIES)[0, 0]
    torchvision = v2.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=ratio)
    box = torchvision.make_params([torch.empty(1, height, width)])
    expected = (box["top"], box["left"], box["height"], box["width"])
    assert augment.crop_box(numbers.tolist(), height, width, config) == expected
    for ours, theirs in zip(
        augment.crop_boxes(numbers, height, width, config), expected, strict=True
    ):
        assert abs(ours.item() - theirs) <= 1


def test_both_paths_show_the_same_view() -> None:
    source = waves(256, num=12)
    config = AugmentConfig(scale=(0.5, 1.0), rotation=0.4, contrast=0.2, noise=0.05, **PLAIN)
    tensor = tensor_views(source.images, config, img_size=64)
    ids = torch.arange(len(source))
    num = augment.num_draws(config, 3 * 64 * 64)
    numbers = augment.draw(5, ids, epoch=0, num_views=2, num=num)
    rows = numbers[:, :, : augment.NOISE].transpose(0, 1).tolist()
    pixels = np.stack(
        [augment.image_views(source.decode(i), row, config, 64) for i, row in enumerate(rows)], 1
    )
    views = torch.from_numpy(pixels).movedim(-1, 2).float() / 255
    pillow = augment.finish_views(views, numbers, config)
    difference = (pillow - tensor).abs()
    # A box that fits only when rounded to whole pixels is another try in one of the paths.
    same = difference.mean(dim=(2, 3, 4)) < 0.02
    assert same.double().mean() > 0.9
    # A view of another image, or a wrong direction of rotation, is this far away.
    assert (pillow.flip(0) - tensor).abs().mean() > 0.1


def test_whole_crop_of_a_file_gives_the_image_back() -> None:
    source = waves(24, num=3)
    config = AugmentConfig(flip=0.0, **WHOLE)
    for index, rows in enumerate(draws_of(3, num_views=2)):
        views = augment.image_views(source.decode(index), rows, config, 24)
        assert views.dtype == np.uint8
        for view in views:
            assert np.array_equal(view, np.asarray(source.decode(index)))


def photometric(change: ViewConfig, num: int = 400, size: int = 16) -> tuple[Any, Any]:
    """The views of `num` copies of one image, without and with the change, [num, S, S, 3]."""
    image = waves(size, num=1).decode(0)
    plain = AugmentConfig(flip=0.0, **WHOLE)
    changed = AugmentConfig(flip=0.0, views=[change], **WHOLE)
    before = [augment.image_views(image, rows, plain, size)[0] for rows in draws_of(num)]
    after = [augment.image_views(image, rows, changed, size)[0] for rows in draws_of(num)]
    return np.stack(before), np.stack(after)


@pytest.mark.parametrize("name", ["jitter", "blur", "grayscale", "solarize"])
def test_changes_happen_as_often_as_asked(name: str) -> None:
    before, after = photometric(ViewConfig(**{name: 0.2}))
    share = (before != after).any(axis=(1, 2, 3)).mean()
    # 0.2 +- 4 standard errors of 400 draws.
    assert 0.12 < share < 0.28
    before, after = photometric(ViewConfig(**{name: 1.0}), num=20)
    # The smallest radii blur less than a grey level.
    assert (before != after).any(axis=(1, 2, 3)).mean() > 0.9


def test_grey_solarize_and_blur_are_those_of_pillow() -> None:
    before, after = photometric(ViewConfig(grayscale=1.0), num=1)
    image = Image.fromarray(before[0])
    assert np.array_equal(after[0], np.asarray(image.convert("L").convert("RGB")))
    _, after = photometric(ViewConfig(solarize=1.0), num=1)
    assert np.array_equal(after[0], np.asarray(ImageOps.solarize(image, 128)))
    assert np.array_equal(after[0], np.where(before[0] >= 128, 255 - before[0], before[0]))
    _, after = photometric(ViewConfig(blur=1.0), num=30)
    radii = [0.1 + 1.9 * rows[0][augment.ORDER][1] for rows in draws_of(30)]
    for radius, view in zip(radii, after, strict=True):
        blurred = image.filter(ImageFilter.GaussianBlur(radius))
        assert np.array_equal(view, np.asarray(blurred))
    assert min(radii) < 0.3
    assert 1.8 < max(radii) < 2.0


def test_changes_come_in_the_official_order() -> None:
    everything = ViewConfig(jitter=1.0, blur=1.0, grayscale=1.0, solarize=1.0)
    _, after = photometric(everything, num=5)
    _, jittered = photometric(ViewConfig(jitter=1.0), num=5)
    for rows, view, image in zip(draws_of(5), after, map(Image.fromarray, jittered), strict=True):
        radius = 0.1 + 1.9 * rows[0][augment.ORDER][1]
        expected = image.filter(ImageFilter.GaussianBlur(radius)).convert("L").convert("RGB")
        assert np.array_equal(view, np.asarray(ImageOps.solarize(expected, 128)))


def test_jitter_is_that_of_torchvision_in_every_order() -> None:
    image = waves(16, num=1).decode(0)
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    factors = [0.9, 0.05, 0.3, 0.8]
    params = {
        "brightness_factor": 1 + 0.8 * 0.4,
        "contrast_factor": 1 - 0.9 * 0.4,
        "saturation_factor": 1 - 0.4 * 0.2,
        "hue_factor": 0.6 * 0.1,
    }
    expected = {
        order: np.asarray(jitter.transform(image, {"fn_idx": torch.tensor(order), **params}))
        for order in itertools.permutations(range(4))
    }
    for rank, theirs in enumerate(expected.values()):
        ours = augment._color_jitter(image, factors, (rank + 0.5) / 24)
        assert np.abs(np.asarray(ours).astype(int) - theirs).max() <= 1


def test_views_of_one_image_change_by_their_own_entries() -> None:
    image = waves(16, num=1).decode(0)
    config = AugmentConfig(flip=0.0, views=[ViewConfig(), ViewConfig(grayscale=1.0)], **WHOLE)
    first, second = augment.image_views(image, draws_of(1, num_views=2)[0], config, 16)
    assert np.array_equal(first, np.asarray(image))
    assert (second[..., 0] == second[..., 1]).all()


def test_every_change_takes_grey_images() -> None:
    image = waves(16, num=1).decode(0).convert("L")
    everything = ViewConfig(jitter=1.0, blur=1.0, grayscale=1.0, solarize=1.0)
    config = AugmentConfig(views=[everything], rotation=0.2, **GREY)
    views = augment.image_views(image, draws_of(1)[0], config, 12)
    assert views.shape == (1, 12, 12, 1)
    assert views.std() > 1


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (500, 300), (5, 9)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_evaluation_view_is_that_of_torchvision(size: tuple[int, int], mode: str) -> None:
    image = waves(64, num=1).decode(0).resize(size).convert(mode)
    official = v2.Compose(
        [v2.Resize(36, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)]
    )
    ours = augment.eval_pixels(image, 32)
    assert ours.shape == (32, 32, len(mode))
    assert np.array_equal(ours, np.asarray(official(image)).reshape(ours.shape))


def test_all_bytes_are_normalised_to_the_same_bits(device: torch.device) -> None:
    """As a float divided by 255 is on the CPU; CUDA would multiply with 1 / 255."""
    config = AugmentConfig()
    images = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(3, -1, -1)
    expected = augment.to_normalized(images.float() / 255, config)
    assert torch.equal(augment.bytes_to_normalized(images.to(device), config).cpu(), expected)
    odd = images[None, :, :, 1:].expand(5, -1, -1, -1).to(device)
    assert torch.equal(augment.bytes_to_normalized(odd, config).cpu()[4], expected[:, :, 1:])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1828, 1828), 1),
        ((1830, 1830), 2),
        ((3660, 3660), 4),
        ((9000, 9000), 8),
        ((9004, 9000), 4),
        ((9001, 9000), 1),
    ],
)
def test_reduced_images_are_large_enough_for_the_smallest_crop(
    size: tuple[int, int], expected: int
) -> None:
    # sqrt(0.08 * 3 / 4) of the side is the smallest crop's, which needs 224 pixels.
    assert augment.view_reduction(*size, AugmentConfig(), 224) == expected


@pytest.mark.parametrize(
    "size", [(5000, 3000), (8000, 1000), (1000, 9000), (700, 500), (6000, 4000)]
)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (1.0, 1.0)])
def test_no_crop_of_a_reduced_image_is_enlarged_for_it(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    config = AugmentConfig(scale=scale)
    factor = augment.view_reduction(*size, config, 96)
    width, height = (-(-side // factor) for side in size)
    draws = augment.draw(5, torch.arange(500), epoch=0, num_views=1, num=10)[0].tolist()
    sides = [min(augment.crop_box(numbers, height, width, config)[2:]) for numbers in draws]
    assert factor == 1 or min(sides) >= 96


def test_evaluation_needs_the_short_side() -> None:
    assert [augment.eval_reduction(w, 600, 224) for w in (600, 9000)] == [2, 2]
    assert [augment.eval_reduction(3000, h, 224) for h in (511, 512, 1024, 2048)] == [1, 2, 4, 8]
