"""Round trips to the bit, and what other programs compute of what was exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import maect_fast.convert.export as exporting
from maect_fast.checkpoint import fingerprint, save_checkpoint
from maect_fast.cli import main
from maect_fast.config import load_config, load_recipe
from maect_fast.convert import find_encoder
from maect_fast.convert.inspect import describe
from maect_fast.evaluation.encoders import open_encoder
from maect_fast.models.encoder import pooled_features, random_masking, sincos_pos_embed
from maect_fast.training.distributed import World
from maect_fast.training.stages import build_stage, last_checkpoint

State = dict[str, Tensor]
NAME = "vit_tiny_patch16_224"


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


def export(source: Path, target: str, out: Path, *settings: str) -> int:
    return convert("export", source, "--to", target, "--out", out, *settings)


def assert_equal(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def mae_state(img_size: int, width: int = 192) -> State:
    """Of an MAE: fixed positions, nothing for the class token."""
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, Any] = {"img_size": img_size, "embed_dim": width, "depth": 2}
    sizes["num_heads"] = width // 64
    vit = timm.create_model(NAME, num_classes=0, **sizes)
    state = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in vit.state_dict().items()
    }
    fixed = sincos_pos_embed(width, img_size // 16)
    return state | {"pos_embed": torch.cat([torch.zeros(1, 1, width), fixed], dim=1)}


def images(img_size: int, in_chans: int = 3) -> Tensor:
    shape = (3, in_chans, img_size, img_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def features(word: Path, *settings: str, pixels: Tensor) -> Tensor:
    """Ours, of pixels in [0, 1]."""
    opened = open_encoder(str(word), ["device=cpu", *settings])
    augment = opened.config.augment
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (augment.mean, augment.std))
    with torch.no_grad():
        return pooled_features(opened.encoder, (pixels - mean) / std, opened.config.head.pooling)


@pytest.fixture(scope="module")
def facebook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facebook") / "mae.pth"
    torch.save({"model": mae_state(224)}, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished pretrain run of random weights: 8 x 8 pixels, one channel, mean of patches."""
    config = load_config(
        load_recipe("digits", "pretrain"),
        overrides=["device=cpu", "encoder.embed_dim=32", "encoder.depth=1", "encoder.num_heads=4",
                   "decoder.embed_dim=16", "decoder.depth=1", "decoder.num_heads=2",
                   "head.pooling=mean_patch"],
    )  # fmt: skip
    world = World(rank=0, size=1, local_rank=0, group=None, device=torch.device("cpu"))
    state = build_stage(config, world, total=2)
    state.update = 2
    more = {"config": dataclasses.asdict(config), "random_states": [], "record": {}}
    path = tmp_path_factory.mktemp("run")
    save_checkpoint(last_checkpoint(path), state.state_dict() | more)
    return path


# ---- Round trips ----


def test_facebook_to_ours_to_timm_to_ours(facebook: Path, tmp_path: Path) -> None:
    assert convert("import", facebook, "--out", tmp_path / "one.safetensors") == 0
    assert export(tmp_path / "one.safetensors", "timm", tmp_path / "t") == 0
    assert convert("import", tmp_path / "t", "--out", tmp_path / "two.safetensors") == 0
    assert export(tmp_path / "two.safetensors", "facebook", tmp_path / "f.pth") == 0
    assert_equal(load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors"))
    start = torch.load(facebook)["model"]
    assert_equal(start, load_file(tmp_path / "t" / "model.safetensors"))
    assert_equal(start, torch.load(tmp_path / "f.pth")["model"])


def test_mae_ct_to_ours_to_mae_ct(facebook: Path, tmp_path: Path) -> None:
    state = torch.load(facebook)["model"]
    state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    settings = {"patch_size": 16, "embedding_dim": 192, "depth": 2, "attention_heads": 3}
    torch.save({"state_dict": state, "ctor_kwargs": settings}, tmp_path / "encoder.th")
    assert convert("import", tmp_path / "encoder.th", "--out", tmp_path / "x.safetensors") == 0
    assert export(tmp_path / "x.safetensors", "mae-ct", tmp_path / "y.th") == 0
    back = torch.load(tmp_path / "y.th")
    assert_equal(state, back["state_dict"])
    assert settings.items() <= back["ctor_kwargs"].items()


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTModel"])
def test_huggingface_to_ours_to_huggingface(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    is_mae = kind == "ViTMAEForPreTraining"
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 128, "image_size": 32, "patch_size": 8}
    config = (
        transformers.ViTMAEConfig(**sizes, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                                  decoder_num_attention_heads=2, decoder_intermediate_size=64)
        if is_mae
        else transformers.ViTConfig(**sizes)
    )  # fmt: skip
    model: Any = getattr(transformers, kind)(config).eval()
    for name, value in model.named_parameters():
        if "pos_embed" not in name and "position" not in name:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(tmp_path / "there")
    assert convert("import", tmp_path / "there", "--out", tmp_path / "x.safetensors") == 0
    assert export(tmp_path / "x.safetensors", "huggingface", tmp_path / "back") == 0
    back: Any = getattr(transformers, kind).from_pretrained(tmp_path / "back").eval()
    noise = {"noise": torch.rand(3, 16)} if is_mae else {}
    with torch.no_grad():
        there, here = (m(pixel_values=images(32), **noise) for m in (model, back))
    assert back.config.layer_norm_eps == model.config.layer_norm_eps == 1e-12
    # Of MAE its reconstruction, of the other all tokens.
    assert torch.equal(there[1], here[1]) if is_mae else torch.equal(there[0], here[0])
    start, end = ({k: v.clone() for k, v in m.state_dict().items()} for m in (model, back))
    if not is_mae:
        # Its class token has a learned position, which is a part of our class token, and its
        # pooler is not taken.
        row = start["embeddings.position_embeddings"][:, :1]
        start["embeddings.cls_token"] += row
        row.zero_()
        for state in (start, end):
            del state["pooler.dense.weight"], state["pooler.dense.bias"]
    assert_equal(start, end)


@pytest.fixture(scope="module")
def narrow(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of `run` as one of another eps, with a class token near zero."""
    state = torch.load(last_checkpoint(run))
    state["config"]["encoder"]["norm_eps"] = 1e-12
    state["model"]["encoder.cls_token"] *= 1e-2
    path = tmp_path_factory.mktemp("narrow")
    save_checkpoint(last_checkpoint(path), state)
    return path


def test_eps_goes_where_it_can_be_said(
    narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(narrow, "timm", tmp_path / "t") == 2
    assert "--to timm: its folders cannot say eps 1e-12 of the norms" in capsys.readouterr().err
    for target in ("facebook", "mae-ct"):
        assert export(narrow, target, tmp_path / target) == 0
        assert "norms have eps 1e-12, which the file cannot say" in capsys.readouterr().out
        assert find_encoder(tmp_path / target).norm_eps == 1e-6
    pixels = images(8, in_chans=1)
    assert export(narrow, "huggingface", tmp_path / "h") == 0
    words = ("augment.mean=[0.5]", "augment.std=[0.5]", "head.pooling=class_token")
    assert convert("import", tmp_path / "h", "--out", tmp_path / "x.safetensors", *words) == 0
    assert convert("import", narrow, "--out", tmp_path / "y.safetensors") == 0
    expected = features(narrow, *words, pixels=pixels)
    for name in ("h", "x.safetensors", "y.safetensors"):
        assert torch.equal(features(tmp_path / name, *words, pixels=pixels), expected)
    other = features(tmp_path / "facebook", "encoder.num_heads=4", *words, pixels=pixels)
    assert float((other - expected).abs().max()) > 1e-4
    # Of one channel, where ImageNet has three.
    grey = tmp_path / "grey.safetensors"
    assert convert("import", tmp_path / "facebook", "encoder.num_heads=4", "--out", grey) == 0
    assert (open_encoder(str(grey), []).config.augment.mean) == [0.449]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch-export", "onnx"])
def test_programs_have_our_eps(
    narrow: Path, tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are compared with ours by their class token, in which another eps would show."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export(narrow, target, tmp_path / "program", "head.pooling=class_token") == 0
    assert "features within " in capsys.readouterr().out


def test_a_second_trip_through_huggingface_changes_nothing(facebook: Path, tmp_path: Path) -> None:
    assert export(facebook, "huggingface", tmp_path / "h") == 0
    assert export(tmp_path / "h", "facebook", tmp_path / "f.pth") == 0
    assert_equal(torch.load(facebook)["model"], torch.load(tmp_path / "f.pth")["model"])


# ---- Exports beside ours ----


@pytest.mark.parametrize("img_size", [224, 96])
def test_timm_computes_our_features(facebook: Path, tmp_path: Path, img_size: int) -> None:
    size = f"encoder.img_size={img_size}"
    assert export(facebook, "timm", tmp_path / "t", size) == 0
    model: Any = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    pixels = images(img_size)
    with torch.no_grad():
        found = model((pixels - mean) / std)
    assert float((found - features(facebook, size, pixels=pixels)).abs().max()) <= 1e-5
    card = (tmp_path / "t" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert f"images of {img_size} x" in card
    assert "the class token, after the final norm" in card
    assert "Weights: width 192, 2 blocks of 3 heads" in card
    assert str(tmp_path) not in card
    assert "tag" not in json.loads((tmp_path / "t" / "config.json").read_text())["pretrained_cfg"]


def test_a_run_keeps_heads_normalisation_and_pooling(run: Path, tmp_path: Path) -> None:
    """On the way to timm and to one file; four heads of width 32 are nobody's default."""
    assert export(run, "timm", tmp_path / "t") == 0
    assert convert("import", run, "--out", tmp_path / "x.safetensors") == 0
    pixels = images(8, in_chans=1)
    expected = features(run, pixels=pixels)
    for word in (tmp_path / "t", tmp_path / "x.safetensors", last_checkpoint(run)):
        assert torch.equal(features(word, pixels=pixels), expected)
    model: Any = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        found = model((pixels - mean) / std)
    assert float((found - expected).abs().max()) <= 1e-5
    assert describe(run)["format"] == "maect-fast checkpoint"
    told = describe(tmp_path / "x.safetensors")
    assert (told["format"], told["architecture"]["heads"]) == ("maect-fast weights", 4)


def test_the_weights_of_a_run(run: Path, tmp_path: Path) -> None:
    """Its EMA, or the encoder as trained; the decoder is that of the training."""
    state = torch.load(last_checkpoint(run))
    own = {k.removeprefix("encoder."): v for k, v in state["model"].items() if "encoder." in k}
    state["encoder_ema"] = {name: value + 1 for name, value in own.items()}
    save_checkpoint(last_checkpoint(tmp_path / "run"), state)
    for name, added in (("ema", 1), ("model", 0)):
        words = ("--to", "mae-ct", "--out", tmp_path / name, "--weights", name)
        assert convert("export", tmp_path / "run", *words) == 0
        expected = {key: value + added for key, value in own.items()}
        assert_equal(torch.load(tmp_path / name)["state_dict"], expected)
    told = describe(tmp_path / "run")
    assert (told["encoder"], told["others"]) == ("encoder_ema", ["model.encoder"])


def test_an_imported_file_says_where_it_is_from(facebook: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert convert("import", facebook, "--out", path) == 0
    with safe_open(path, "pt") as file:
        said = file.metadata()
    sizes: dict[str, float] = {"in_chans": 3, "patch_size": 16, "embed_dim": 192, "depth": 2}
    sizes |= {"img_size": 224, "num_heads": 3, "norm_eps": 1e-6}
    assert json.loads(said["architecture"]) == sizes
    assert said["source"] == "facebook MAE, encoder model"
    assert said["source_digest"] == fingerprint(facebook)


def test_a_runs_decoder_goes_along(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    assert export(run, "huggingface", tmp_path / "h") == 0
    assert export(run, "facebook", tmp_path / "f.pth") == 0
    model, info = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path / "h", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = torch.load(last_checkpoint(run))["model"]
    decoder = {k.removeprefix("decoder."): v for k, v in own.items() if k.startswith("decoder.")}
    for path in (tmp_path / "h", tmp_path / "f.pth"):
        found = find_encoder(path).decoder
        assert torch.equal(found["pos_embed"][:, 1:], decoder["pos_embed"])
        without = {"pos_embed": decoder["pos_embed"]}
        assert_equal(found | without, decoder)
    # Its reconstruction is ours, of the same mask.
    noise, pixels = torch.rand(3, 16), images(8, in_chans=1)
    config = load_config(torch.load(last_checkpoint(run))["config"])
    world = World(rank=0, size=1, local_rank=0, group=None, device=torch.device("cpu"))
    ours: Any = build_stage(config, world, total=2).model
    ours.load_state_dict(own)
    masking = random_masking(noise, model.config.mask_ratio)
    with torch.no_grad():
        tokens = ours.encoder(pixels, masking.ids_keep)
        expected = ours.decoder(tokens, masking)
        logits = model.eval()(pixels, noise=noise).logits
    rows = torch.arange(3)[:, None]
    found_pixels = logits[rows, masking.ids_removed]
    torch.testing.assert_close(found_pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "img_size"),
    [
        ("torch-export", 8),
        # PyTorch's exporters take seconds for the smallest of models.
        *(
            pytest.param(target, img_size, marks=pytest.mark.slow)
            for target, img_size in (("torch-export", 12), ("onnx", 8), ("onnx", 12))
        ),
    ],
)
def test_programs_compute_our_features(
    run: Path, tmp_path: Path, target: str, img_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    size, out = f"encoder.img_size={img_size}", tmp_path / "program"
    if img_size != 8:
        # Of a run the size is fixed, of a file it is not.
        assert convert("import", run, "--out", tmp_path / "x.safetensors") == 0
        run = tmp_path / "x.safetensors"
    if target == "onnx":
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    assert export(run, target, out, size) == 0
    assert "features within " in capsys.readouterr().out
    pixels = images(img_size, in_chans=1)[:1].repeat(5, 1, 1, 1)
    expected = features(run, size, pixels=pixels)
    if target == "onnx":
        session = onnxruntime.InferenceSession(str(out))
        found = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        said = session.get_modelmeta().custom_metadata_map
        assert said["pooling"] == "mean_patch"
    else:
        files = {"maect_fast.json": ""}
        found = torch.export.load(out, extra_files=files).module()(pixels).detach()
        assert json.loads(files["maect_fast.json"])["img_size"] == str(img_size)
    assert float((found - expected).abs().max()) <= 1e-5


# ---- Nothing is half written, nothing is lost ----


def test_nothing_is_overwritten(facebook: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    (tmp_path / "t").mkdir()
    assert convert("import", facebook, "--out", tmp_path / "x.safetensors") == 2
    assert export(facebook, "timm", tmp_path / "t") == 2
    assert export(facebook, "timm", tmp_path / "no" / "t") == 2
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "x.safetensors"]
    assert not list((tmp_path / "t").iterdir())


@pytest.mark.parametrize("target", ["timm", "huggingface", "facebook"])
def test_a_failure_leaves_nothing(
    facebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    def full(*_: object, **__: object) -> None:
        (tmp_path / "seen").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(exporting, "save_for_hf", full)
    monkeypatch.setattr(exporting, "_save_safetensors", full)
    assert export(facebook, target, tmp_path / "out") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]


def test_a_program_that_computes_something_else_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting.PixelFeatures, "forward", lambda self, pixels: self.vit(pixels))
    assert export(run, "torch-export", tmp_path / "out") == 2
    assert "its features differ from ours by " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("import", "FILE", "--out", "x.pth"), "--out: expected a name that ends in .safetensors"),
        (("export", "timm:vit_tiny_patch16_224", "--to", "timm", "--out", "t"), "timm has it"),
        (("export", "FILE", "--to", "timm", "--out", "t", "--opset", "18"), "--opset: expected"),
        (("export", "nowhere", "--to", "timm", "--out", "t"), "nowhere"),
        (("inspect", "FILE", "--json", "epochs=3"), "convert inspect takes no settings"),
        (("inspect", "nowhere.pth"), "nowhere.pth: No such file"),
    ],
)
def test_mistakes_are_told_in_a_line(
    facebook: Path,
    words: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(*(str(facebook) if word == "FILE" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_says_too_much_is_not_believed(tmp_path: Path, facebook: Path) -> None:
    """Settings within a safetensors file, or beside it, are whatever somebody wrote there."""
    state = torch.load(facebook)["model"]
    lies = {"num_heads": "many", "mean": [None], "std": 3, "pooling": "all", "eps": "small"}
    path = tmp_path / "model.safetensors"
    save_file(state, path, {"format": "maect-fast", "settings": json.dumps(lies)})
    assert find_encoder(path).num_heads == 3
    save_file(state, path, {"format": "maect-fast", "settings": "[" * 9999})
    (tmp_path / "config.json").write_text("{]")
    assert find_encoder(tmp_path).num_heads == 3
