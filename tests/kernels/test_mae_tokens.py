import importlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from allocation import Allocated, NoSync, PeakMemory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from maect_fast.kernels import gather_patches, masked_patch_mse, patch_targets, restore_tokens
from maect_fast.kernels._common import gpu
from maect_fast.kernels.mae_tokens import op, reference
from maect_fast.testing import assert_within_budget

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(params=["auto", "reference", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def skip_unless_interpreted(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bf16 arithmetic")


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def shuffled(B: int, L: int, device: torch.device | str = "cpu") -> Tensor:
    """[B, L] int64, a permutation per row."""
    return torch.rand(B, L, generator=torch.Generator().manual_seed(3)).argsort(1).to(device)


def patchify(images: Tensor, ids: Tensor, K: int, *, channels_last: bool) -> Tensor:
    """Patches one by one."""
    num_columns = images.shape[3] // K
    rows = [
        image[:, i // num_columns * K :, i % num_columns * K :][:, :K, :K]
        for image, row in zip(images, ids.tolist(), strict=True)
        for i in row
    ]
    stacked = torch.stack(rows)
    if channels_last:
        stacked = stacked.permute(0, 2, 3, 1)
    return stacked.flatten(1).view(*ids.shape, -1)


def naive_restore(
    tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, ids_restore: Tensor
) -> Tensor:
    """facebookresearch/mae: models_mae.py, with positions of patches alone."""
    num_removed = ids_restore.shape[1] + 1 - tokens.shape[1]
    mask_tokens = mask_token.to(tokens.dtype).repeat(len(tokens), num_removed, 1)
    patches = torch.cat([tokens[:, 1:], mask_tokens], dim=1)
    index = ids_restore.long()[:, :, None].repeat(1, 1, tokens.shape[2])
    patches = patches.gather(1, index) + pos_embed
    return torch.cat([tokens[:, :1], patches], dim=1)


def naive_mse(predicted: Tensor, images: Tensor, ids: Tensor, K: int, normalize: bool) -> Tensor:
    """ml-jku/MAE-CT: losses/mae_vit_loss.py."""
    target = patchify(images, ids, K, channels_last=True)
    if normalize:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    return ((predicted - target) ** 2).mean()


# B, C, H, W, K, N: one patch, all of them; sides of 14 and 16 as in ViTs; a grid that is no square.
GATHERED = [
    (2, 3, 32, 48, 16, 3),
    (1, 3, 28, 14, 14, 1),
    (3, 1, 12, 20, 4, 15),
    (5, 1, 8, 8, 2, 9),
    (2, 2, 5, 3, 1, 7),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", GATHERED, ids=str)
def test_gathered_patches_are_exact(
    shape: tuple[int, ...], dtype: torch.dtype, backend: Any, device: torch.device
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    B, C, H, W, K, N = shape
    images = randn(B, C, H, W, device=device)
    ids = shuffled(B, H * W // K**2, device)[:, :N]
    expected = patchify(images, ids, K, channels_last=False).to(dtype)
    for cast in (torch.int32, torch.int64):
        found = gather_patches(images, ids.to(cast), K, dtype=dtype, backend=backend)
        assert found.dtype == dtype
        assert found.is_contiguous()
        assert torch.equal(found, expected)


def test_images_of_any_strides(backend: Any, device: torch.device) -> None:
    wide = randn(3, 8, 16, 24, device=device)
    ids = shuffled(3, 4, device)
    for images in (
        wide[:, 1:4, 2:10, 5:13],
        wide[:, :3, :16, :16].contiguous(memory_format=torch.channels_last)[..., ::2, ::2],
        wide.transpose(1, 3)[:, :2, :8, :],
        wide[:1, :1, :8, :8].expand(3, -1, -1, -1),
    ):
        found = gather_patches(images, ids, 4, backend=backend)
        assert torch.equal(found, patchify(images, ids, 4, channels_last=False))
        predicted = randn(3, 5, found.shape[2], device=device)[:, ::2][:, :2]
        found = masked_patch_mse(predicted, images, ids[:, 1:3], 4, normalize=True, backend=backend)
        expected = naive_mse(predicted.double(), images.double(), ids[:, 1:3], 4, True)
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_are_in_the_order_of_a_convolutions_weight(backend: Any) -> None:
    """As an embedding: the weight's rows in the same order."""
    images, weight = randn(2, 3, 8, 8), randn(5, 3, 4, 4, seed=1)
    ids = shuffled(2, 4)
    embedded = gather_patches(images, ids, 4, backend=backend) @ weight.flatten(1).T
    convolved = torch.nn.functional.conv2d(images, weight, stride=4).flatten(2).mT
    expected = convolved[torch.arange(2)[:, None], ids]
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-5)


def test_gradient_to_images_sums_what_was_gathered_twice(
    backend: Any, device: torch.device
) -> None:
    images = randn(2, 3, 4, 6, device=device).requires_grad_()
    ids = torch.tensor([[5, 0, 5, 5], [1, 1, 2, 0]], device=device)
    grad = randn(2, 4, 12, device=device, seed=1)
    rows = gather_patches(images, ids, 2, backend=backend)
    (found,) = torch.autograd.grad(rows, images, grad)
    (expected,) = torch.autograd.grad(patchify(images, ids, 2, channels_last=False), images, grad)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradcheck() -> None:
    images = randn(2, 2, 4, 4, dtype=torch.float64)
    ids = shuffled(2, 4)
    repeated = ids.clone()
    repeated[:, 0] = repeated[:, 1]
    assert torch.autograd.gradcheck(
        lambda x: gather_patches(x, repeated, 2), (images.clone().requires_grad_(),)
    )
    leaves = [
        randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, 5), (1, 1, 5), (1, 4, 5))
    ]
    assert torch.autograd.gradcheck(lambda a, b, c: restore_tokens(a, b, c, ids), leaves)
    predicted = randn(2, 3, 8, dtype=torch.float64, seed=2).requires_grad_()
    for normalize in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, n=normalize: masked_patch_mse(x, images, ids[:, 1:], 2, normalize=n),
            (predicted,),
        )


def restore_inputs(
    B: int,
    N: int,
    L: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device | str,
    wide: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens as autocast leaves them; mask token and positions as parameters."""
    tokens = randn(B, 1 + N, D, device=device, dtype=dtype)
    mask_token = randn(1, 1, D, device=device, dtype=wide, seed=1)
    return tokens, mask_token, randn(1, L, D, device=device, dtype=wide, seed=2)


def differentiate(
    function: Any, inputs: Sequence[Tensor], grad: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, *args, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


# B, N, L, D.
RESTORED = [(2, 1, 4, 24), (3, 5, 13, 80), (1, 4, 9, 512), (7, 0, 3, 16), (2, 6, 6, 520)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("shape", RESTORED, ids=str)
def test_restored_tokens_and_gradients(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    wide: torch.dtype,
    backend: Any,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    B, N, L, D = shape
    inputs = restore_inputs(B, N, L, D, dtype, device, wide)
    ids = shuffled(B, L, device)
    grad = randn(B, 1 + L, D, device=device, dtype=wide, seed=4)
    found = differentiate(restore_tokens, inputs, grad, ids, backend=backend)
    eager = differentiate(naive_restore, inputs, grad, ids)
    # Nothing is rounded but to the result's dtype: tokens and their gradient are the same bits.
    assert torch.equal(found[0], eager[0])
    assert torch.equal(found[1], eager[1])
    # The mask token of the truth is what the op reads.
    exact = [x.double() for x in inputs]
    ref64 = differentiate(naive_restore, exact, grad, ids)
    assert_within_budget(found[2], eager[2], ref64[2], name="gradient of the mask token")
    assert_within_budget(found[3], eager[3], ref64[3], name="gradient of the positions")
    narrow = differentiate(restore_tokens, inputs, grad, ids.int(), backend=backend)
    assert all(map(torch.equal, found, narrow))


@needs_triton
@pytest.mark.usefixtures("poison")
def test_a_program_with_many_tiles_of_tokens(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Where the device is small, each part of the mask token's sum has many rows."""
    kernel = importlib.import_module("maect_fast.kernels.mae_tokens.triton_kernel")
    monkeypatch.setattr(kernel, "num_multiprocessors", lambda _: 1)
    inputs = restore_inputs(5, 3, 10, 24, torch.float32, device)
    ids, grad = shuffled(5, 10, device), randn(5, 11, 24, device=device, seed=4)
    assert kernel.PROGRAMS * kernel.RESTORE_BACKWARD[0].blocks["BLOCK_R"] < 5 * 11
    found = differentiate(restore_tokens, inputs, grad, ids, backend="triton")
    eager = differentiate(naive_restore, inputs, grad, ids)
    ref64 = differentiate(naive_restore, [x.double() for x in inputs], grad, ids)
    assert torch.equal(found[1], eager[1])
    assert_within_budget(found[2], eager[2], ref64[2], name="gradient of the mask token")


def test_strided_tokens_and_gradients(backend: Any, device: torch.device) -> None:
    """The gradient of a sum has no strides at all; that of a transposition has other ones."""
    tokens = randn(4, 12, 40, device=device)[:, ::2, 8:32]
    pos_embed = randn(2, 9, 24, device=device, seed=2)[1:]
    ids = shuffled(8, 9, device)[::2]
    inputs = (tokens, randn(1, 1, 24, device=device, seed=1), pos_embed)
    a, b, c = leaves = [x.detach().requires_grad_() for x in inputs]
    found, expected = restore_tokens(a, b, c, ids, backend=backend), naive_restore(a, b, c, ids)
    assert torch.equal(found, expected)
    for grad in (
        torch.ones((), device=device).expand_as(found),
        randn(24, 10, 4, device=device).transpose(0, 2),
    ):
        ours, theirs = (
            torch.autograd.grad(out, leaves, grad, retain_graph=True) for out in (found, expected)
        )
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-5)


# B, C, H, W, K, M: patches of 588 and 768 numbers, of four, of two; the largest that a tile holds.
LOSSES = [
    (2, 3, 32, 48, 16, 4),
    (1, 3, 28, 28, 14, 3),
    (3, 3, 12, 20, 4, 11),
    (5, 1, 8, 8, 2, 1),
    (2, 2, 5, 3, 1, 7),
    (2, 1, 17, 17, 17, 1),
    (1, 4, 32, 64, 32, 2),
]


def loss_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor, int]:
    B, C, H, W, K, M = shape
    # Patches far from the mean, as bright ones are, beside small deviations.
    images = randn(B, C, H, W, device=device, seed=1) * 0.3 + 2
    ids = shuffled(B, H * W // K**2, device)
    return randn(B, M, C * K * K, device=device, dtype=dtype), images, ids[:, -M:], K


def loss_and_grad(
    function: Any, predicted: Tensor, *args: Any, scale: float = 1.0, **kwargs: Any
) -> list[Tensor]:
    leaf = predicted.detach().clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss * scale, leaf)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", LOSSES, ids=str)
def test_loss_and_gradient_against_fp64(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    normalize: bool,
    backend: Any,
    device: torch.device,
) -> None:
    skip_unless_interpreted(backend, dtype, device)
    predicted, images, ids, K = loss_inputs(shape, dtype, device)
    # A loss scale, without which gradients of fp16 vanish.
    scale = 1024.0
    found = loss_and_grad(
        masked_patch_mse,
        *(predicted, images, ids, K),
        scale=scale,
        normalize=normalize,
        backend=backend,
    )
    eager = loss_and_grad(naive_mse, predicted, images, ids, K, normalize, scale=scale)
    wide = (predicted.double(), images.double())
    ref64 = loss_and_grad(naive_mse, *wide, ids, K, normalize, scale=scale)
    assert_within_budget(found[0], eager[0], ref64[0], name="loss")
    assert_within_budget(found[1], eager[1], ref64[1], name="gradient")
    again = masked_patch_mse(predicted, images, ids.int(), K, normalize=normalize, backend=backend)
    assert torch.equal(again, found[0])


def test_loss_equals_the_masked_mean_over_all_patches(device: torch.device) -> None:
    """The official form: all patches predicted, the removed ones counted."""
    predicted, images, ids, K = loss_inputs((3, 3, 12, 20, 4, 15), torch.float64, device)
    images = images.double()
    mask = torch.zeros(3, 15, device=device, dtype=torch.float64).scatter_(1, ids[:, 4:], 1.0)
    in_order = torch.empty_like(predicted).scatter_(
        1, ids[..., None].expand_as(predicted), predicted
    )
    everything = torch.arange(15, device=device).expand(3, -1)
    target, _, _ = patch_targets(images, everything, K, normalize=True)
    expected = (((in_order - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    found = masked_patch_mse(predicted[:, 4:], images, ids[:, 4:], K, normalize=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_patches_of_one_colour_have_no_deviation(backend: Any, device: torch.device) -> None:
    """The mean of equal numbers is that number, not what rounding made of it."""
    images = torch.full((2, 3, 14, 28), 2.64, device=device)
    images[1] = -0.1
    ids = torch.tensor([[0, 1], [1, 0]], device=device)
    predicted = torch.zeros(2, 2, 588, device=device)
    found = loss_and_grad(
        masked_patch_mse, predicted, images, ids, 14, normalize=True, backend=backend
    )
    assert found[0].item() == 0
    assert not found[1].any()


def test_targets_by_hand(backend: Any, device: torch.device) -> None:
    images = torch.tensor([[[[0.0, 2.0, 9.0, 9.0], [4.0, 6.0, 9.0, 9.0]]]], device=device)
    ids = torch.tensor([[1, 0]], device=device)
    target, mean, std = patch_targets(images, ids, 2, normalize=True)
    assert mean.flatten().tolist() == [9, 3]
    # The unbiased variance of 0, 2, 4 and 6 is 20 / 3.
    sigma = (20 / 3) ** 0.5
    torch.testing.assert_close(std.flatten(), torch.tensor([1e-3, sigma], device=device))
    assert target[0, 0].tolist() == [0, 0, 0, 0]
    expected = torch.tensor([-3.0, -1.0, 1.0, 3.0], device=device) / sigma
    torch.testing.assert_close(target[0, 1], expected)
    target, mean, std = patch_targets(images, ids, 2, normalize=False)
    assert target[0].tolist() == [[9, 9, 9, 9], [0, 2, 4, 6]]
    assert (mean.flatten().tolist(), std.flatten().tolist()) == ([0, 0], [1, 1])
    zeros = torch.zeros(1, 2, 4, device=device)
    loss = masked_patch_mse(zeros, images, ids, 2, normalize=False, backend=backend)
    assert loss.item() == (4 * 81 + 4 + 16 + 36) / 8
    # Channels last: two channels of one patch of two pixels' side.
    two = torch.stack([images[0, 0, :, :2], 10 + images[0, 0, :, :2]])[None]
    right = torch.tensor([[[0.0, 10, 2, 12, 4, 14, 6, 16]]], device=device)
    loss = masked_patch_mse(right, two, ids[:, 1:], 2, normalize=False, backend=backend)
    assert loss.item() == 0


@needs_triton
@pytest.mark.parametrize("bad", [-1, 6, 2**20])
def test_what_is_no_patch_is_not_a_number(bad: int, device: torch.device) -> None:
    """The kernels read nothing outside of the image."""
    images = randn(2, 1, 4, 6, device=device)
    ids = torch.tensor([[0, bad], [5, 1]], device=device)
    rows = gather_patches(images, ids, 2, backend="triton")
    assert rows[0, 1].isnan().all()
    assert rows.isnan().sum() == 4
    predicted = torch.zeros(2, 2, 4, device=device)
    for normalize in (False, True):
        options: dict[str, Any] = {"normalize": normalize, "backend": "triton"}
        assert masked_patch_mse(predicted, images, ids, 2, **options).isnan()


def test_empty_batches(backend: Any, device: torch.device) -> None:
    ids = torch.zeros(0, 4, dtype=torch.int64, device=device)
    rows = gather_patches(torch.zeros(0, 3, 4, 4, device=device), ids, 2, backend=backend)
    assert rows.shape == (0, 4, 12)
    none = gather_patches(randn(2, 3, 4, 4, device=device), ids.view(2, 0), 2, backend=backend)
    assert none.shape == (2, 0, 12)
    inputs = restore_inputs(0, 2, 4, 8, torch.float32, device)
    grad = torch.zeros(0, 5, 8, device=device)
    out, *grads = differentiate(restore_tokens, inputs, grad, ids, backend=backend)
    assert out.shape == (0, 5, 8)
    assert grads[0].shape == (0, 3, 8)
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fp64_stays_fp64(backend: Any, device: torch.device) -> None:
    images = randn(2, 3, 4, 4, device=device, dtype=torch.float64)
    ids = shuffled(2, 4, device)
    assert gather_patches(images, ids, 2, backend=backend).dtype == torch.float64
    inputs = restore_inputs(2, 2, 4, 8, torch.float64, device, torch.float64)
    assert restore_tokens(*inputs, ids, backend=backend).dtype == torch.float64
    predicted = randn(2, 2, 12, device=device)
    loss = masked_patch_mse(predicted, images, ids[:, 2:], 2, normalize=True, backend=backend)
    assert loss.dtype == torch.float64


def test_two_runs_are_bitwise_equal(backend: Any, device: torch.device) -> None:
    inputs = restore_inputs(3, 5, 13, 80, torch.float32, device)
    ids, grad = shuffled(3, 13, device), randn(3, 14, 80, device=device, seed=4)
    first, second = (
        differentiate(restore_tokens, inputs, grad, ids, backend=backend) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    arguments = loss_inputs((3, 3, 12, 20, 4, 11), torch.float32, device)
    first, second = (
        loss_and_grad(masked_patch_mse, *arguments, normalize=True, backend=backend)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


# What runs, and what it allocates.


@pytest.mark.parametrize(
    ("arch", "dtype", "K", "is_triton", "loss_is_triton"),
    [
        (90, torch.float32, 16, True, True),
        (80, torch.bfloat16, 14, True, True),
        (90, torch.float32, 64, True, False),
        (75, torch.float32, 16, False, False),
        (90, torch.float64, 16, False, False),
    ],
)
def test_auto_on_cuda_is_triton(
    arch: int,
    dtype: torch.dtype,
    K: int,
    is_triton: bool,
    loss_is_triton: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "sm_arch", lambda device: arch)
    with FakeTensorMode():
        images = torch.empty(2, 3, 2 * K, 2 * K, device="cuda", dtype=dtype)
        predicted = torch.empty(2, 4, 3 * K**2, device="cuda", dtype=dtype)
        obstacle = op.triton_obstacle(images, dtype=dtype)
        assert op._is_triton("auto", images, obstacle) == is_triton
        obstacle = op.mse_obstacle(predicted, images)
        assert op._is_triton("auto", predicted, obstacle) == loss_is_triton
        ids = torch.empty(2, 4, device="cuda", dtype=torch.int64)
        _, error = op.masked_patch_mse_fwd(predicted, images, ids, K, True, "auto")
        assert error.shape == ((0,) if loss_is_triton else predicted.shape)


@needs_triton
def test_triton_launches_on_the_inputs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may not be the current one: five launchers, each once."""
    devices: list[torch.device] = []

    def current(x: Tensor) -> Any:
        devices.append(x.device)
        return nullcontext()

    monkeypatch.setattr(gpu, "current", current)
    predicted, images, ids, K = loss_inputs((2, 1, 4, 4, 2, 2), torch.float32, "cpu")
    gather_patches(images, ids, K, backend="triton")
    inputs = restore_inputs(2, 1, 4, 8, torch.float32, "cpu")
    differentiate(restore_tokens, inputs, torch.ones(2, 5, 8), shuffled(2, 4), backend="triton")
    loss_and_grad(masked_patch_mse, predicted, images, ids, K, normalize=True, backend="triton")
    assert devices == [torch.device("cpu")] * 5


class NoKernel:
    """Stands for a kernel where only what a launcher allocates counts."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@needs_triton
def test_triton_allocates_results_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the sizes of ViT-L/16 no target, no shuffled copy, no fp32 pixels: at most 2 MiB more."""
    kernel = importlib.import_module("maect_fast.kernels.mae_tokens.triton_kernel")
    for name in ("gather", "restore", "restore_backward", "mse", "mse_backward"):
        monkeypatch.setattr(kernel, f"{name}_kernel", NoKernel())
    B, N, L, D, F, half = 512, 49, 196, 512, 768, torch.bfloat16

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    images, ids = meta(B, 3, 224, 224), meta(B, L, dtype=torch.int64)
    tokens, predicted = meta(B, 1 + N, D, dtype=half), meta(B, L - N, F, dtype=half)
    restore = (tokens, meta(1, 1, D), meta(1, L, D), ids)
    mse = (predicted, images, ids[:, N:], 16, True)
    calls: dict[str, Any] = {
        "gather": (lambda: kernel.gather_patches(images, ids[:, :N], 16, half), 2 * B * N * F),
        "restore": (lambda: kernel.restore_tokens(*restore), 4 * B * (1 + L) * D),
        "its gradient": (
            lambda: kernel.restore_gradient(meta(B, 1 + L, D), ids, 1 + N, half),
            4 * B * (1 + L) * D + 2 * B * (1 + N) * D,
        ),
        "loss": (lambda: kernel.masked_patch_mse(*mse), 4),
        "its gradient to predictions": (
            lambda: kernel.mse_gradient(meta(1), *mse),
            4 + 2 * B * (L - N) * F,
        ),
    }
    for name, (call, num_bytes) in calls.items():
        with Allocated() as allocated:  # type: ignore[no-untyped-call]
            call()
        assert num_bytes <= allocated.num_bytes <= num_bytes + 2 * 2**20, name


def test_the_loss_has_no_gradient_to_images() -> None:
    predicted, images, ids, K = loss_inputs((2, 3, 8, 8, 4, 3), torch.float32, "cpu")
    images.requires_grad_()
    loss = masked_patch_mse(predicted.requires_grad_(), images, ids, K, normalize=True)
    found = torch.autograd.grad(loss, (predicted, images), allow_unused=True)
    assert found[0].any()
    assert found[1] is None


def test_no_second_derivative(backend: Any) -> None:
    predicted, images, ids, K = loss_inputs((2, 1, 4, 4, 2, 2), torch.float32, "cpu")
    loss = masked_patch_mse(
        predicted.requires_grad_(), images, ids, K, normalize=True, backend=backend
    )
    tokens, mask_token, pos_embed = restore_inputs(2, 1, 4, 8, torch.float32, "cpu")
    restored = restore_tokens(
        tokens.requires_grad_(), mask_token, pos_embed, shuffled(2, 4), backend=backend
    )
    for out, leaf in ((loss, predicted), (restored.square().sum(), tokens)):
        (grad,) = torch.autograd.grad(out, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(grad.square().sum(), leaf)


# What only a GPU shows.

HALVES = [torch.bfloat16, torch.float16]


def decode(leaves: list[Tensor], images: Tensor, ids: Tensor, K: int) -> list[Tensor]:
    """Kept patches, the decoder's input, the loss of it as a prediction, and all gradients."""
    tokens, mask_token, pos_embed = leaves
    N = tokens.shape[1] - 1
    kept = gather_patches(images, ids[:, :N], K, dtype=tokens.dtype)
    restored = restore_tokens(tokens, mask_token, pos_embed, ids)
    predicted = restored[:, 1:][:, N:].to(tokens.dtype)
    loss = masked_patch_mse(predicted, images, ids[:, N:], K, normalize=True)
    return [kept, restored, loss, *torch.autograd.grad(loss, leaves)]


def decode_inputs(
    B: int, K: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], tuple[Tensor, Tensor, int]]:
    """Images of 224 pixels, a quarter of their patches kept; tokens as wide as a patch."""
    L, D = (224 // K) ** 2, 3 * K**2
    shapes = ((B, 1 + L // 4, D), (1, 1, D), (1, L, D))
    leaves = [
        torch.randn(shape, device=device, dtype=x).requires_grad_()
        for shape, x in zip(shapes, (dtype, torch.float32, torch.float32), strict=True)
    ]
    images = torch.randn(B, 3, 224, 224, device=device)
    return leaves, (images, torch.rand(B, L, device=device).argsort(1), K)


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("K", [14, 16])
def test_a_captured_graph_takes_other_patches(
    K: int, dtype: torch.dtype, no_sync: NoSync, cuda: torch.device
) -> None:
    leaves, constants = decode_inputs(3, K, dtype, cuda)
    images, ids, _ = constants
    decode(leaves, *constants)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_sync():
        found = decode(leaves, *constants)
    images.copy_(images.flip(0))
    ids.copy_(ids.flip(1))
    graph.replay()
    assert all(map(torch.equal, found, decode(leaves, *constants)))


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("K", [14, 16])
def test_runs_on_a_full_device_are_bitwise_equal(
    K: int, dtype: torch.dtype, cuda: torch.device
) -> None:
    leaves, constants = decode_inputs(128, K, dtype, cuda)
    first = decode(leaves, *constants)
    for _ in range(3):
        assert all(map(torch.equal, first, decode(leaves, *constants)))


@needs_triton
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_device_holds_results_and_little_else(dtype: torch.dtype, cuda: torch.device) -> None:
    """What the allocator says: no target, no shuffled copy, no fp32 pixels."""
    (tokens, mask_token, pos_embed), (images, ids, K) = decode_inputs(64, 16, dtype, cuda)
    N = tokens.shape[1] - 1
    predicted = torch.randn(64, 196 - N, 768, device=cuda, dtype=dtype).requires_grad_()
    calls: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: gather_patches(images, ids[:, :N], K, dtype=dtype), 64 * N * 768 * 2),
        (lambda: restore_tokens(tokens, mask_token, pos_embed, ids), 64 * 197 * 768 * 4),
        (lambda: masked_patch_mse(predicted, images, ids[:, N:], K, normalize=True), 0),
    ]
    for call, num_bytes in calls:
        call()
        with PeakMemory(cuda) as peak:
            call()
        assert num_bytes <= peak.num_bytes <= num_bytes + 2 * 2**20
    loss = calls[2][0]()
    with PeakMemory(cuda) as peak:
        torch.autograd.grad(loss, predicted)
    assert 0 < peak.num_bytes <= predicted.numel() * 2 + 2 * 2**20


@needs_triton
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_more_numbers_than_32_bits_count(
    dtype: torch.dtype, needs_gib: Callable[[float], None], cuda: torch.device
) -> None:
    needs_gib(36)
    check_large(2**31 // (3 * 224 * 224) + 4, 16, dtype, cuda)


def check_large(B: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    """Samples at both ends of more than 2^31 numbers give what they give alone."""
    (tokens, mask_token, pos_embed), (images, ids, _) = decode_inputs(B, K, dtype, device)
    N = tokens.shape[1] - 1

    def gather(samples: slice) -> Tensor:
        return gather_patches(images[samples], ids[samples], K, dtype=dtype, backend="triton")

    def restore(samples: slice) -> tuple[Tensor, Tensor]:
        leaf = tokens.detach()[samples].requires_grad_()
        inputs = (leaf, mask_token.detach(), pos_embed.detach(), ids[samples])
        out = restore_tokens(*inputs, backend="triton")
        return out.detach(), torch.autograd.grad(out, leaf, out.detach())[0]

    def predict(rows: Tensor, samples: slice) -> Tensor:
        """The gradient of the loss's sum where the patches themselves are the predictions."""
        leaf = rows[samples].requires_grad_()
        constants = images[samples], ids[samples], K
        loss = masked_patch_mse(leaf, *constants, normalize=True, backend="triton")
        return torch.autograd.grad(loss, leaf, loss.new_tensor(float(leaf.numel())))[0]

    ends = (slice(2), slice(B // 2, B // 2 + 2), slice(B - 2, None))
    patches = gather(slice(None))
    for samples in ends:
        assert torch.equal(patches[samples], gather(samples))
    gradient = predict(patches, slice(None))
    for samples in ends:
        # The mean's factor is rounded, for every size otherwise, and with it the last digit.
        rtol, alone = 2 * torch.finfo(dtype).eps, predict(patches, samples)
        torch.testing.assert_close(gradient[samples], alone, rtol=rtol, atol=1e-6)
    del gradient, patches
    out, gradient = restore(slice(None))
    for samples in ends:
        one, other = restore(samples)
        assert torch.equal(out[samples], one)
        assert torch.equal(gradient[samples], other)
    assert gradient.shape[1] == 1 + N


# Errors.

IMAGES, IDS = torch.zeros(2, 3, 8, 12), torch.zeros(2, 3, dtype=torch.int64)
ROWS = torch.zeros(2, 3, 48)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gather_patches(IMAGES, IDS, 5), ValueError, r"images: .*multiples.* 5, got \[2"),
        (
            lambda: gather_patches(IMAGES, IDS, 0),
            ValueError,
            "patch_size: expected 1 or",
        ),
        (lambda: gather_patches(IMAGES[0], IDS, 4), ValueError, r"images: expected \[B, C, H, W\]"),
        (lambda: gather_patches(IMAGES.byte(), IDS, 4), TypeError, "images: expected floats"),
        (lambda: gather_patches(IMAGES, IDS[:1], 4), ValueError, r"ids: expected shape \[2, any\]"),
        (lambda: gather_patches(IMAGES, IDS.float(), 4), TypeError, "ids: expected torch.int32"),
        (lambda: gather_patches(IMAGES, IDS.to("meta"), 4), ValueError, "ids: expected cpu"),
        (
            lambda: gather_patches(IMAGES, IDS, 4, dtype=torch.int32),
            TypeError,
            "dtype: expected a float, got torch.int32",
        ),
        (
            lambda: masked_patch_mse(ROWS[:, :2], IMAGES, IDS, 4, normalize=True),
            ValueError,
            r"predicted: expected shape \[2, 3, 48\], got \[2, 2, 48\]",
        ),
        (
            lambda: masked_patch_mse(ROWS.mT.contiguous().mT, IMAGES, IDS, 4, normalize=True),
            ValueError,
            "predicted: expected a last stride of 1",
        ),
        (
            lambda: masked_patch_mse(ROWS[:, :0], IMAGES, IDS[:, :0], 4, normalize=True),
            ValueError,
            "ids_removed: expected at least one patch, got none",
        ),
        (
            lambda: masked_patch_mse(ROWS[..., :1], IMAGES[:, :1], IDS, 1, normalize=True),
            ValueError,
            "normalize: expected patches of more than one number, got 1",
        ),
    ],
)
def test_errors_of_patches(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


TOKENS, MASK, POS = torch.zeros(2, 3, 8), torch.zeros(1, 1, 8), torch.zeros(1, 5, 8)
RESTORE = torch.arange(5).expand(2, 5)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((TOKENS[0], MASK, POS, RESTORE), ValueError, "tokens: expected shape"),
        ((TOKENS.long(), MASK, POS, RESTORE), TypeError, "tokens: expected torch.float16"),
        ((TOKENS, MASK[0, 0], POS, RESTORE), ValueError, r"mask_token: expected shape \[1, 1, 8\]"),
        ((TOKENS, MASK, POS[:, :4], RESTORE), ValueError, r"pos_embed: expected shape \[1, 5, 8\]"),
        ((TOKENS, MASK, POS, RESTORE[:1]), ValueError, r"ids_restore: expected shape \[2, any\]"),
        ((TOKENS, MASK, POS, RESTORE.float()), TypeError, "ids_restore: expected torch.int32"),
        ((TOKENS.mT.contiguous().mT, MASK, POS, RESTORE), ValueError, "a last stride of 1"),
        ((TOKENS, MASK, POS[:, :1], RESTORE[:, :1]), ValueError, "tokens: expected 1 to 2 of an"),
        ((TOKENS[:, :0], MASK, POS, RESTORE), ValueError, "tokens: expected 1 to 6 .* got 0"),
    ],
)
def test_errors_of_tokens(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        restore_tokens(*inputs)


def test_backends_that_do_not_run_say_so() -> None:
    calls: dict[str, Any] = {
        "gather_patches": lambda x, b: gather_patches(IMAGES.to(x), IDS.to(x.device), 4, backend=b),
        "restore_tokens": lambda x, b: restore_tokens(
            TOKENS.to(x), MASK.to(x), POS.to(x), RESTORE.to(x.device), backend=b
        ),
        "masked_patch_mse": lambda x, b: masked_patch_mse(
            ROWS.to(x), IMAGES.to(x), IDS.to(x.device), 4, normalize=True, backend=b
        ),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: backend 'cpp' is not built here"):
            call(ROWS, "cpp")
        with pytest.raises(RuntimeError, match=f"{name}: backend 'triton' takes .*got float64"):
            call(ROWS.double(), "triton")
        with pytest.raises(RuntimeError, match="'triton' runs on CUDA, got a tensor on meta"):
            call(ROWS.to("meta"), "triton")
        with pytest.raises(ValueError, match=f"{name}: expected backend to be one of"):
            call(ROWS, "cuda")
    with pytest.raises(RuntimeError, match=r"'triton' makes float32, .*, got float64"):
        gather_patches(IMAGES, IDS, 4, dtype=torch.float64, backend="triton")
    large, ids = torch.zeros(1, 2, 50, 50), IDS[:1, :1]
    with pytest.raises(RuntimeError, match="takes patches of up to 4096 numbers, got 5000"):
        masked_patch_mse(large.view(1, 1, 5000), large, ids, 50, normalize=True, backend="triton")


# Registration.


def test_opcheck(backend: Any, device: torch.device) -> None:
    predicted, images, ids, K = loss_inputs((2, 1, 4, 6, 2, 4), torch.float32, device)
    torch.library.opcheck(op.gather_patches_fwd, (images, ids, K, torch.float16, backend))
    inputs = restore_inputs(2, 2, 6, 8, torch.float16, device)
    ids_restore = shuffled(2, 6, device)
    torch.library.opcheck(op.restore_tokens_fwd, (*inputs, ids_restore, backend))
    grad = randn(2, 7, 8, device=device)
    torch.library.opcheck(op.restore_gradient, (grad, ids_restore, 3, torch.float16, backend))
    arguments = (images, ids, K, True, backend)
    torch.library.opcheck(op.masked_patch_mse_fwd, (predicted, *arguments))
    loss, error = op.masked_patch_mse_fwd(predicted, *arguments)
    torch.library.opcheck(op.mse_gradient, (loss, predicted, images, ids, error, K, True, backend))


def test_compiles_without_graph_breaks(backend: Any, device: torch.device) -> None:
    """Gather, restore and loss in one graph, with a smaller last batch."""

    def step(tokens: Tensor, images: Tensor, ids: Tensor, pos_embed: Tensor) -> Tensor:
        patches = gather_patches(images, ids[:, :2], 2, backend=backend)
        restored = restore_tokens(
            torch.cat([tokens, patches], 1), tokens[:1], pos_embed, ids, backend=backend
        )
        return masked_patch_mse(
            restored[:, 3:], images, ids[:, 2:], 2, normalize=True, backend=backend
        )

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for B in (4, 4, 3):
        images, ids = randn(B, 2, 4, 6, device=device), shuffled(B, 6, device)
        inputs = [randn(B, 1, 8, device=device, seed=1)], randn(1, 6, 8, device=device, seed=2)
        one = torch.ones((), device=device)
        found = differentiate(compiled, inputs[0], one, images, ids, inputs[1])
        expected = differentiate(step, inputs[0], one, images, ids, inputs[1])
        assert all(map(torch.equal, found, expected))


def test_under_autocast_pixels_come_in_its_dtype_and_the_loss_in_fp32(device: torch.device) -> None:
    predicted, images, ids, K = loss_inputs((2, 3, 8, 8, 4, 3), torch.bfloat16, device)
    expected = masked_patch_mse(predicted, images, ids, K, normalize=True)
    with torch.autocast(device.type, torch.bfloat16):
        found = masked_patch_mse(predicted, images, ids, K, normalize=True)
        assert gather_patches(images, ids, K).dtype == torch.float32
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_definition_takes_every_kind_of_image_view() -> None:
    images = torch.arange(48.0).view(1, 2, 4, 6)
    view = reference.patch_view(images, 2)
    assert view.shape == (1, 2, 3, 2, 2, 2)
    assert view[0, 1, 2, 1].tolist() == [[40, 41], [46, 47]]
    view[0, 1, 2, 1] = 0
    assert images[0, 1, 2:, 4:].eq(0).all()
