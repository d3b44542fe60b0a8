import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from maect_fast.config import Config, DecoderConfig, EncoderConfig, HeadConfig
from maect_fast.models.encoder import masking_noise, pool, random_masking
from maect_fast.models.maect import (
    ContrastiveModel,
    PretrainModel,
    build_contrastive,
    build_pretrain,
)
from maect_fast.training.distributed import World, close_world, init_world

N, RANKS = 3, 2
ALONE = World(rank=0, size=1, local_rank=0, group=None, device=torch.device("cpu"))


def make_config(**changes: Any) -> Config:
    return Config(
        encoder=EncoderConfig(
            name="vit_tiny_patch16_224",
            img_size=8,
            in_chans=1,
            patch_size=2,
            embed_dim=32,
            depth=3,
            num_heads=2,
        ),
        decoder=DecoderConfig(embed_dim=16, depth=1, num_heads=2),
        head=HeadConfig(
            pooling="mean_patch",
            projector_hidden=12,
            predictor_hidden=16,
            output_dim=8,
            queue_size=20,
            topk=4,
            target_ema=0.9,
        ),
        **changes,
    )


def make_batch(num_rows: int = RANKS * N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "views": torch.randn(2, num_rows, 1, 8, 8, generator=generator),
        "sample_id": torch.arange(num_rows) + 50,
        "label": torch.arange(num_rows) % 2,
    }


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_pretrain_masks_every_view_by_the_stream() -> None:
    model = build_pretrain(make_config(seed=7), ALONE)
    batch = make_batch()
    outputs = model(**batch, step=4)
    assert list(outputs) == ["loss"]
    images = batch["views"].flatten(0, 1)
    masking = random_masking(masking_noise(2, RANKS * N, 16, seed=7, step=4), 0.75)
    assert masking.ids_keep.shape == (2 * RANKS * N, 4)
    predicted = model.decoder(model.encoder(images, masking.ids_keep), masking)
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(images), 16, 4)
    std, mean = torch.std_mean(patches, dim=2, keepdim=True)
    target = (patches - mean) / (std**2 + 1e-6).sqrt()
    rows = torch.arange(len(images))[:, None]
    expected = (predicted - target[rows, masking.ids_removed]).square().mean()
    torch.testing.assert_close(outputs["loss"], expected)
    assert model(**batch, step=torch.tensor(4))["loss"].equal(outputs["loss"])
    assert not model(**batch, step=5)["loss"].equal(outputs["loss"])


def test_pretrain_trains_everything() -> None:
    model = build_pretrain(make_config(), ALONE)
    torch.autograd.backward(model(**make_batch(), step=0)["loss"])
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("mask_ratio", [0.0, 0.99])
def test_mask_ratio_must_keep_and_remove_patches(mask_ratio: float) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio: expected .* of 16 patches"):
        build_pretrain(make_config(mask_ratio=mask_ratio), ALONE)


def test_reconstruction_pictures() -> None:
    model = build_pretrain(make_config(mask_ratio=0.5), ALONE).eval()
    images = torch.randn(3, 1, 8, 8) * 0.1 + 4
    drawn = model.reconstruct(images)
    hidden = drawn.masked == 0
    assert hidden.flatten(1).sum(dim=1).tolist() == [32] * 3
    assert torch.equal(drawn.masked[~hidden], images[~hidden])
    assert torch.equal(drawn.filled[~hidden], images[~hidden])
    assert not drawn.filled[hidden].eq(images[hidden]).any()
    # the prediction is in normalised pixels: with each patch's mean it is near the image
    assert (drawn.filled - images).abs().max() < 2


def test_contrastive_pools_both_views_of_one_pass() -> None:
    model = build_contrastive(make_config(), ALONE).eval()
    batch = make_batch()
    calls: list[int] = []
    model.encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    outputs = model(**batch, step=2)
    assert calls == [2 * RANKS * N]
    assert list(outputs) == ["loss", "nn_accuracy", "searched_again"]
    pooled = torch.stack([pool(model.encoder(view), "mean_patch") for view in batch["views"]])
    expected = model.head(pooled, step=2, sample_id=batch["sample_id"], label=batch["label"])
    torch.testing.assert_close(outputs["loss"], expected.loss)
    assert outputs["nn_accuracy"].equal(expected.nn_accuracy)


@pytest.mark.parametrize("frozen", [0, 2, None])
def test_contrastive_runs_the_last_block_for_the_class_token(frozen: int | None) -> None:
    """Loss and gradients are those of all tokens; with the reconstruction loss the masked pass
    has all of its own."""
    config = make_config(stage="tune", reconstruction_weight=0.5)
    config.head.pooling = "class_token"
    model = build_contrastive(config, ALONE).double().eval()
    model.encoder.freeze(frozen)
    batch = make_batch() | {"views": make_batch()["views"].double()}
    rows: list[int] = []
    last: Any = model.encoder.blocks[-1]
    last.mlp.fc1.register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))

    def update() -> dict[str, Tensor]:
        outputs = model(**batch, step=2)
        grads = torch.autograd.grad(outputs["loss"], list(trained(model).values()))
        return {"loss": outputs["loss"].detach(), **dict(zip(trained(model), grads, strict=True))}

    result = update()
    assert rows == [1, 5]
    run = model.encoder._run_blocks
    model.encoder._run_blocks = lambda blocks, stream, _: run(blocks, stream, False)  # type: ignore[assignment, method-assign]
    torch.testing.assert_close(result, update(), rtol=1e-9, atol=1e-12)
    assert rows == [1, 5, 17, 5]


def test_tuning_trains_the_upper_blocks_and_the_head() -> None:
    model = build_contrastive(make_config(stage="tune"), ALONE)
    model.encoder.freeze(2)
    torch.autograd.backward(model(**make_batch(), step=0)["loss"])
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_grad == set(trained(model))
    layers = {tuple(name.split(".")[:3]) for name in with_grad if name.startswith("encoder.")}
    assert layers == {
        ("encoder", "blocks", "2"),
        ("encoder", "norm", "weight"),
        ("encoder", "norm", "bias"),
    }


def test_preparing_the_head_leaves_the_encoder_alone() -> None:
    model = build_contrastive(make_config(stage="prepare-head"), ALONE).train()
    model.encoder.freeze(None)
    outputs = model(**make_batch(), step=0)
    torch.autograd.backward(outputs["loss"])
    assert all(name.startswith("head.") for name in trained(model))
    assert all(p.grad is None for p in model.encoder.parameters())


def test_added_reconstruction_loss() -> None:
    config = make_config(stage="tune", reconstruction_weight=0.5)
    model = build_contrastive(config, ALONE).eval()
    pretrain = build_pretrain(config, ALONE)
    pretrain.encoder.load_state_dict(model.encoder.state_dict())
    assert model.decoder is not None
    pretrain.decoder.load_state_dict(model.decoder.state_dict())
    outputs = model(**make_batch(), step=3)
    assert list(outputs) == [
        *("loss", "nn_accuracy", "searched_again", "contrastive", "reconstruction")
    ]
    alone = build_contrastive(make_config(stage="tune"), ALONE).eval()
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if "decoder." not in k})
    torch.testing.assert_close(outputs["contrastive"], alone(**make_batch(), step=3)["loss"])
    torch.testing.assert_close(outputs["reconstruction"], pretrain(**make_batch(), step=3)["loss"])
    torch.testing.assert_close(
        outputs["loss"], outputs["contrastive"] + 0.5 * outputs["reconstruction"]
    )
    assert not outputs["contrastive"].requires_grad


def test_decoder_and_weight_come_together() -> None:
    model = build_contrastive(make_config(), ALONE)
    with pytest.raises(ValueError, match=r"reconstruction_weight: .* 0\.5 with no decoder"):
        ContrastiveModel(
            model.encoder, model.head, pooling="class_token", reconstruction_weight=0.5
        )
    decoder = build_pretrain(make_config(), ALONE).decoder
    with pytest.raises(ValueError, match=r"0\.0 with a decoder"):
        ContrastiveModel(model.encoder, model.head, pooling="class_token", decoder=decoder)


@pytest.mark.parametrize("build", [build_pretrain, build_contrastive])
def test_initial_weights_are_a_function_of_the_seed(build: Any) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = build(make_config(seed=1), ALONE).state_dict()
    assert torch.random.get_rng_state().equal(before)
    torch.manual_seed(9)
    again = build(make_config(seed=1), ALONE).state_dict()
    other = build(make_config(seed=2), ALONE).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["encoder.cls_token"], other["encoder.cls_token"])


def test_bf16_autocast_trains() -> None:
    config = make_config(reconstruction_weight=1.0)
    model = build_contrastive(config, ALONE)
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch, step=0)
    torch.autograd.backward(outputs["loss"])
    assert {value.dtype for value in outputs.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())
    full = build_contrastive(config, ALONE)(**batch, step=0)
    assert outputs["loss"].item() == pytest.approx(full["loss"].item(), rel=0.05)


def run_updates(config: Config, world: World) -> dict[str, Tensor]:
    """Two updates on this rank's rows; losses, gradients and state afterwards."""
    build = build_pretrain if config.stage == "pretrain" else build_contrastive
    model: PretrainModel | ContrastiveModel = build(config, world)
    model.encoder.freeze(config.frozen_blocks)
    model.double()
    wrapped: nn.Module = model
    if world.size > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    num_rows = RANKS * N // world.size
    rows = slice(world.rank * num_rows, (world.rank + 1) * num_rows)
    batch = make_batch()
    result: dict[str, Tensor] = {}
    for step in range(2):
        optimizer.zero_grad()
        outputs = wrapped(
            batch["views"][:, rows].double(),
            sample_id=batch["sample_id"][rows],
            label=batch["label"][rows],
            step=step,
        )
        torch.autograd.backward(outputs["loss"])
        optimizer.step()
        if isinstance(model, ContrastiveModel):
            model.head.update_target()
        result |= {f"{step}.{name}": value.detach() for name, value in outputs.items()}
    result |= {f"grad.{name}": p.grad for name, p in trained(model).items() if p.grad is not None}
    return result | {f"state.{name}": value for name, value in model.state_dict().items()}


CONFIGS = {
    "pretrain": make_config(stage="pretrain"),
    "tune": make_config(stage="tune", frozen_blocks=1, reconstruction_weight=0.5),
}


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The parent's, whose port nobody can take before they meet.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    world = init_world("cpu")
    result = {name: run_updates(config, world) for name, config in CONFIGS.items()}
    torch.save(result, Path(folder) / f"{rank}.pt")
    close_world()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two gloo processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    start: Any = start_processes
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start(rank_main, args=(store.port, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("stage", CONFIGS)
def test_two_processes_take_the_step_of_one(
    ranks: list[dict[str, dict[str, Tensor]]], stage: str
) -> None:
    alone = run_updates(CONFIGS[stage], ALONE)
    first, second = (rank[stage] for rank in ranks)
    assert set(first) == set(alone)
    for name, value in first.items():
        if name[0] in "01":
            value = (value + second[name]) / 2  # metrics are means over a rank's rows
        else:
            assert torch.equal(value, second[name]), f"{name} differs between the ranks"
        torch.testing.assert_close(value, alone[name], rtol=1e-6, atol=1e-8, msg=name)
    if stage == "tune":
        assert alone["state.head.loss.queue.queue_ptr"] == 2 * RANKS * N
        assert alone["state.head.loss.queue.queue_id"][: RANKS * N].tolist() == [
            *range(50, 50 + RANKS * N)
        ]


def test_fresh_weights_are_fp32_whatever_the_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        models = build_pretrain(make_config(), ALONE), build_contrastive(make_config(), ALONE)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    plain = build_pretrain(make_config(), ALONE), build_contrastive(make_config(), ALONE)
    for model, other in zip(models, plain, strict=True):
        for name, value in model.state_dict().items():
            assert value.dtype == other.state_dict()[name].dtype, name
            assert torch.equal(value, other.state_dict()[name]), name
