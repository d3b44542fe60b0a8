"""Random views of images, as a pure function of (seed, image, view, epoch).

Every choice is read from Philox numbers at the counter (image id, view, epoch, draw), so batch
composition, workers, ranks and a resumed run do not change a pixel. Two paths share the draws: one
affine sampling for a whole batch that is held in memory, and Pillow for one decoded image at a
time, which is what the recipes of arXiv 2304.10520 were made with (ml-jku/MAE-CT: yamls, transforms
of KappaData 1.0.99).

Legend: V views, n images, C channels, H and W pixels of the source, S pixels of a view's side, T
draws of four numbers.
"""

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from maect_fast.config import AugmentConfig, ViewConfig
from maect_fast.data.sources import original_size
from maect_fast.kernels._common.philox import philox_uniform

__all__ = [
    "bytes_to_normalized",
    "draw",
    "eval_pixels",
    "eval_reduction",
    "finish_views",
    "image_views",
    "num_draws",
    "reduction_to",
    "tensor_views",
    "to_normalized",
    "view_reduction",
]

Draws: TypeAlias = Sequence[Sequence[float]]

# The stream of augmentation among those of one run's seed.
STREAM = 2 << 32

# What each draw of four numbers in [0, 1) decides; the positions are part of what makes a run
# reproducible.
CROP_TRIES = 10  # draws 0..9: area, aspect ratio, vertical position, horizontal position
GEOMETRY = 10  # flip?, rotation, contrast, -
CHOICES = 11  # jitter?, blur?, grey?, solarize?
JITTER = 12  # brightness, contrast, saturation, hue
ORDER = 13  # order of the four jitters, blur radius, -, -
NOISE = 16  # 16 + i: pixels 4 i .. 4 i + 3

JITTER_STRENGTH = (0.4, 0.4, 0.2)  # brightness, contrast, saturation: factors 1 +- strength
JITTER_HUE = 0.1
BLUR_RADIUS = (0.1, 2.0)
SOLARIZE_FROM = 128
EVAL_RESIZE = 256 / 224
BICUBIC = InterpolationMode.BICUBIC


def num_draws(augment: AugmentConfig, pixels: int) -> int:
    """Draws per view, T: the choices and, for noise, one for every four of its `pixels` (C S S)."""
    return NOISE + math.ceil(pixels / 4) if augment.noise else NOISE


def draw(seed: int, sample_id: Tensor, *, epoch: int, num_views: int, num: int) -> Tensor:
    """Uniform numbers in [0, 1) for a batch: [V, n, num, 4] fp32.

    Args:
        seed: the run's seed.
        sample_id: [n] int64; its device is the result's.
        epoch: passes over the images so far.
        num_views: V.
        num: draws per view.
    """
    device = sample_id.device
    view = torch.arange(num_views, device=device)[:, None, None]
    index = torch.arange(num, device=device)
    return philox_uniform(seed + STREAM, (sample_id[:, None], view, epoch, index))


def tensor_views(
    images: Tensor,
    sample_id: Tensor,
    *,
    augment: AugmentConfig,
    img_size: int,
    num_views: int,
    seed: int,
    epoch: int,
) -> Tensor:
    """Views of images in memory by one bicubic sampling, then contrast, noise and normalisation.

    Crop, rotation and flip are one affine map. The crop is torchvision's RandomResizedCrop with one
    change: boxes are not rounded to whole pixels, of which small images have few. The rotation is
    about the middle of the crop; what lies outside the image is black. The photometric changes of
    `augment.views` are not made here but in `image_views`.

    Args:
        images: [n, C, H, W] uint8; its device is where the views are made.
        sample_id: [n] int64, on that device.
        augment: the augmentation.
        img_size: S.
        num_views: V.
        seed: the run's seed.
        epoch: passes over the images so far.

    Returns:
        [V, n, C, S, S] fp32, normalised.
    """
    n, C, H, W = images.shape
    num = num_draws(augment, C * img_size * img_size)
    draws = draw(seed, sample_id, epoch=epoch, num_views=num_views, num=num)
    top, left, height, width = crop_boxes(draws[..., :CROP_TRIES, :], H, W, augment)
    choice = draws[..., GEOMETRY, :]
    mirror = torch.where(choice[..., 0] < augment.flip, -1.0, 1.0)
    angle = (2 * choice[..., 1] - 1) * augment.rotation
    cos, sin = angle.cos(), angle.sin()
    # From view to image coordinates, both in [-1, 1]; the rotation is one of pixels, hence height
    # over W.
    theta = torch.stack(
        (
            mirror * cos * width / W,
            -sin * height / W,
            (2 * left + width) / W - 1,
            mirror * sin * width / H,
            cos * height / H,
            (2 * top + height) / H - 1,
        ),
        dim=-1,
    )
    grid = functional.affine_grid(
        theta.view(-1, 2, 3), [num_views * n, C, img_size, img_size], align_corners=False
    )
    pixels = (images.float() / 255).expand(num_views, -1, -1, -1, -1).reshape(-1, C, H, W)
    views = functional.grid_sample(pixels, grid, mode="bicubic", align_corners=False)
    return finish_views(views.view(num_views, n, C, img_size, img_size), draws, augment)


def crop_boxes(
    draws: Tensor, height: int, width: int, augment: AugmentConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width of random crops, in fractional pixels, each [...].

    Area uniform in `augment.scale`, ratio log-uniform in `augment.ratio`; of ten tries the first
    that fits the image is taken, else the largest centred box of an allowed ratio. Source:
    torchvision RandomResizedCrop.

    Args:
        draws: [..., 10, 4] uniform numbers: area, ratio, vertical, horizontal position of a try.
        height: H.
        width: W.
        augment: gives scale and ratio.
    """
    low, high = augment.scale
    log_low, log_high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    area = height * width * (low + (high - low) * draws[..., 0])
    ratio = (log_low + (log_high - log_low) * draws[..., 1]).exp()
    w, h = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (w <= width) & (h <= height)
    fitting = fits.any(dim=-1)
    first = fits.float().argmax(dim=-1, keepdim=True)
    tries = torch.stack((w, h, draws[..., 2], draws[..., 3]))
    w, h, down, right = tries.gather(-1, first.expand(4, *first.shape))[..., 0]
    top, left = (height - h) * down, (width - w) * right

    centre_top, centre_left, centre_h, centre_w = _centre_box(height, width, augment)
    return (
        torch.where(fitting, top, centre_top),
        torch.where(fitting, left, centre_left),
        torch.where(fitting, h, centre_h),
        torch.where(fitting, w, centre_w),
    )


def crop_box(
    draws: Draws, height: int, width: int, augment: AugmentConfig
) -> tuple[int, int, int, int]:
    """Top, left, height and width of one random crop in whole pixels: torchvision's algorithm.

    Args:
        draws: ten tries of four uniform numbers, as in `crop_boxes`.
        height: H.
        width: W.
        augment: gives scale and ratio.
    """
    low, high = augment.scale
    log_low, log_high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for area_draw, ratio_draw, down, right in draws[:CROP_TRIES]:
        area = height * width * (low + (high - low) * area_draw)
        ratio = math.exp(log_low + (log_high - log_low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    _, _, fallback_h, fallback_w = _centre_box(height, width, augment)
    h, w = round(fallback_h), round(fallback_w)
    return (height - h) // 2, (width - w) // 2, h, w


def _centre_box(
    height: int, width: int, augment: AugmentConfig
) -> tuple[float, float, float, float]:
    """The largest centred box whose aspect ratio is allowed: top, left, height, width."""
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = min(width, height * ratio), min(height, width / ratio)
    return (height - h) / 2, (width - w) / 2, h, w


def view_reduction(width: int, height: int, augment: AugmentConfig, img_size: int) -> int:
    """1, 2, 4 or 8: by how much an image may be smaller before a view has less detail.

    That is as long as the smallest crop still has S pixels a side, so that no view is enlarged
    which would not have been. A function of the image's size and the settings alone: what a batch
    holds depends on nothing else.
    """
    low, high = augment.ratio
    smallest = math.sqrt(augment.scale[0] * width * height * min(low, 1 / high))
    return reduction_to(width, height, min(smallest, width, height) / img_size)


def eval_reduction(width: int, height: int, img_size: int) -> int:
    """The same for `eval_pixels`, which takes the whole image at a short side of S * 256 / 224."""
    return reduction_to(width, height, min(width, height) / int(img_size * EVAL_RESIZE))


def reduction_to(width: int, height: int, most: float) -> int:
    """The largest factor up to `most` that divides both sides: else the picture would shift."""
    factors = (f for f in (8, 4, 2) if f <= most and width % f == height % f == 0)
    return next(factors, 1)


def image_views(
    image: Image.Image, draws: Sequence[Draws], augment: AugmentConfig, img_size: int
) -> NDArray[np.uint8]:
    """Views of one decoded image: rotation, crop, flip, photometric changes.

    Boxes are those of the original image, also where the given one is smaller, so that how an image
    is stored changes a view by no more than its resampling. Order and meaning are the official
    ones: RandomResizedCrop (bicubic), flip, colour jitter in
    random order, Gaussian blur with Pillow's radius, grey, solarize from 128. Contrast, noise and
    normalisation are left to `finish_views`.

    Args:
        image: mode RGB or L, any size.
        draws: for each of the V views, at least 16 draws of four uniform numbers.
        augment: the augmentation.
        img_size: S.

    Returns:
        [V, S, S, C] uint8.
    """
    changes = augment.views or [ViewConfig()] * len(draws)
    width, height = original_size(image)
    views = []
    for numbers, change in zip(draws, changes, strict=True):
        box = _scaled(crop_box(numbers, height, width, augment), (width, height), image.size)
        flip, rotation = numbers[GEOMETRY][:2]
        view = image
        if augment.rotation:
            view = transforms.rotate(
                image,
                math.degrees((2 * rotation - 1) * augment.rotation),
                interpolation=BICUBIC,
                center=[(box[0] + box[2]) / 2, (box[1] + box[3]) / 2],
            )
        view = _resized_crop(view, box, img_size)
        if flip < augment.flip:
            view = transforms.horizontal_flip(view)
        view = _photometric(view, numbers, change)
        views.append(np.asarray(view).reshape(img_size, img_size, -1))
    return np.stack(views)


def _scaled(
    box: tuple[int, int, int, int], size: tuple[int, int], stored: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in the pixels of the stored image.

    Args:
        box: top, left, height and width in the original image.
        size: width and height of that.
        stored: width and height of the stored image.
    """
    top, left, height, width = box
    x, y = stored[0] / size[0], stored[1] / size[1]
    return left * x, top * y, (left + width) * x, (top + height) * y


def _resized_crop(
    image: Image.Image, box: tuple[float, float, float, float], img_size: int
) -> Image.Image:
    """The box at S x S pixels (bicubic), from no more pixels than it touches."""
    left, top = math.floor(box[0]), math.floor(box[1])
    right, bottom = min(math.ceil(box[2]), image.width), min(math.ceil(box[3]), image.height)
    inner = (box[0] - left, box[1] - top, min(box[2], right) - left, min(box[3], bottom) - top)
    part = image.crop((left, top, right, bottom))
    return part.resize((img_size, img_size), Image.Resampling.BICUBIC, box=inner)


def _photometric(view: Image.Image, numbers: Draws, change: ViewConfig) -> Image.Image:
    """Colour jitter, blur, grey and solarize, each with its probability."""
    jitter, blur, grey, solarize = (
        number < probability
        for number, probability in zip(
            numbers[CHOICES],
            (change.jitter, change.blur, change.grayscale, change.solarize),
            strict=True,
        )
    )
    if jitter:
        view = _color_jitter(view, numbers[JITTER], numbers[ORDER][0])
    if blur:
        low, high = BLUR_RADIUS
        view = view.filter(ImageFilter.GaussianBlur(low + (high - low) * numbers[ORDER][1]))
    if grey:
        view = transforms.rgb_to_grayscale(view, num_output_channels=len(view.getbands()))
    if solarize:
        view = transforms.solarize(view, threshold=SOLARIZE_FROM)
    return view


def _color_jitter(view: Image.Image, factors: Sequence[float], order: float) -> Image.Image:
    """Brightness, contrast, saturation and hue in one of 24 orders (torchvision's ColorJitter)."""
    adjusts = (
        transforms.adjust_brightness,
        transforms.adjust_contrast,
        transforms.adjust_saturation,
    )
    steps = [
        (adjust, 1 + (2 * number - 1) * strength)
        for adjust, number, strength in zip(adjusts, factors, JITTER_STRENGTH, strict=False)
    ]
    steps.append((transforms.adjust_hue, (2 * factors[3] - 1) * JITTER_HUE))
    rank = int(order * math.factorial(len(steps)))
    while steps:
        position, rank = divmod(rank, math.factorial(len(steps) - 1))
        adjust, factor = steps.pop(position)
        view = adjust(view, factor)
    return view


def finish_views(views: Tensor, draws: Tensor, augment: AugmentConfig) -> Tensor:
    """Contrast, noise and normalisation.

    Contrast moves pixels away from or towards the view's mean by a factor from U(1 - c, 1 + c);
    noise is Gaussian. Neither clips: values slightly outside [0, 1] stay.

    Args:
        views: [V, n, C, S, S] fp32 in [0, 1].
        draws: [V, n, T, 4] uniform numbers.
        augment: gives contrast, noise, mean and std.

    Returns:
        [V, n, C, S, S] fp32.
    """
    if augment.contrast:
        mean = views.mean(dim=(2, 3, 4), keepdim=True)
        factor = 1 + (2 * draws[..., GEOMETRY, 2] - 1) * augment.contrast
        views = mean + (views - mean) * factor[..., None, None, None]
    if augment.noise:
        noise = _normal(draws[..., NOISE:, :]).flatten(2)[..., : views[0, 0].numel()]
        views = views + augment.noise * noise.reshape(views.shape)
    return to_normalized(views, augment)


def _normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers from as many uniform ones (Box-Muller), [..., 4]."""
    # 1 - u lies in (0, 1], where the logarithm is finite.
    radius = (-2 * (1 - uniform[..., :2]).log()).sqrt()
    angle = uniform[..., 2:] * (2 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)


def to_normalized(images: Tensor, augment: AugmentConfig) -> Tensor:
    """(x - mean) / std per channel; `images` [..., C, S, S] fp32 in [0, 1]."""
    _, mean, std = _constants(tuple(augment.mean), tuple(augment.std), images.device)
    return (images - mean).div_(std)


def bytes_to_normalized(images: Tensor, augment: AugmentConfig) -> Tensor:
    """The same of x / 255; `images` [..., C, S, S] uint8. Every device gives the same bits."""
    white, mean, std = _constants(tuple(augment.mean), tuple(augment.std), images.device)
    return images.float().div_(white).sub_(mean).div_(std)


@functools.cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and std [C, 1, 1], which are copied to the device once.

    CUDA divides by a tensor; a number's reciprocal it would multiply with, and round twice.
    """
    white = torch.full((), 255.0, device=device)
    per_channel = [torch.tensor(x, device=device)[:, None, None] for x in (mean, std)]
    return white, per_channel[0], per_channel[1]


def eval_pixels(image: Image.Image, img_size: int) -> NDArray[np.uint8]:
    """The middle S x S, [S, S, C], of the image at a short side of S * 256 / 224 (bicubic)."""
    resized = transforms.resize(image, [int(img_size * EVAL_RESIZE)], interpolation=BICUBIC)
    middle = transforms.center_crop(resized, [img_size, img_size])
    return np.array(middle).reshape(img_size, img_size, -1)
