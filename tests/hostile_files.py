"""Files that mean harm, by kind; what is said of each, in which time and memory.

`python -m tests.hostile_files` prints the table.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import pickle
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

SECONDS = 5.0
MIB = 500.0
# After which a process hangs, on a machine that does other things as well.
PATIENCE = 120.0
# Of the largest square image that is decoded.
SIDE = 5477

Make = Callable[[Path], object]
ENCODER, RUN, IMAGES = "encoder file", "run directory", "image folder"


class Kind(NamedTuple):
    """One way to do harm."""

    where: str
    make: Make
    """Writes it to the path it is given, or below."""
    outcome: str
    """Expression for the line that is printed."""
    slow: bool = False


class Measured(NamedTuple):
    """What a process that met the file said and took."""

    lines: list[str]
    seconds: float
    """Of the CPU."""
    mib: float
    """Most resident memory beyond that of the imported program."""


class _Tensor:
    """Pickled as a tensor with any claims."""

    def __init__(self, size: Any, stride: Any, numel: int, key: str = "0") -> None:
        self.size, self.stride, self.numel, self.key = size, stride, numel, key

    def __reduce__(self) -> Any:
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (_Storage(self), 0, self.size, self.stride, False, OrderedDict())


class _Storage:
    def __init__(self, tensor: _Tensor) -> None:
        self.id = ("storage", torch.FloatStorage, tensor.key, "cpu", tensor.numel)


class _Call:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class _Pickler(pickle.Pickler):
    is_legacy = False

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return (*value.id, None) if self.is_legacy else value.id
        return None


def pickled(value: object, *, is_legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=2)
    pickler.is_legacy = is_legacy
    pickler.dump(value)
    return buffer.getvalue()


def archive(
    path: Path, content: bytes, records: dict[str, bytes] | None = None, method: int = 0
) -> None:
    """A zip archive as torch.save writes it."""
    with zipfile.ZipFile(path, "w", compression=method) as file:
        all_records = {"data.pkl": content, "version": b"3\n", "byteorder": b"little"}
        for name, record in (all_records | (records or {})).items():
            file.writestr(f"archive/{name}", record)


def saved(value: object) -> Make:
    return lambda path: archive(path, pickled(value), {"data/0": bytes(64)})


def raw(content: bytes) -> Make:
    """An archive around the instructions of a pickle."""
    return lambda path: archive(path, b"\x80\x02" + content + b".")


def key(name: str) -> bytes:
    encoded = name.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def legacy(path: Path) -> None:
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    tensor = _Tensor((10**12,), (1,), 10**12)
    with path.open("wb") as file:
        for part in parts:
            pickle.dump(part, file, protocol=2)
        file.write(pickled({"x": tensor}, is_legacy=True))
        pickle.dump(["0"], file, protocol=2)
        file.write(struct.pack("<q", 10**12))


def torch_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def lattice() -> dict[str, Any]:
    """Two ways to each of 60 dicts, so 2**60 ways in all."""
    level: dict[str, Any] = {}
    for _ in range(60):
        level = {"x": level, "y": level}
    return level


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    """An encoder of the recipe `digits`, changed."""

    def make(path: Path) -> None:
        from maect_fast.config import EncoderConfig
        from maect_fast.models.encoder import Encoder

        sizes: dict[str, Any] = {"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
        config = EncoderConfig(name="vit_tiny_patch16_224", img_size=8, in_chans=1, **sizes)
        state = dict(Encoder(config).state_dict())
        change(state)
        torch.save(state, path)

    return make


def damaged(change: Callable[[bytes], bytes]) -> Make:
    def make(path: Path) -> None:
        weights(lambda state: None)(path)
        path.write_bytes(change(path.read_bytes()))

    return make


def safetensors(header: object, length: int | None = None, content: bytes = b"") -> Make:
    def make(path: Path) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        target = path.with_suffix(".safetensors")
        size = len(text) if length is None else length
        target.write_bytes(struct.pack("<Q", size) + text + content)
        return target

    return make


def cut_safetensors(path: Path) -> Path:
    target = path.with_suffix(".safetensors")
    save_file({"x": torch.zeros(1000)}, target)
    target.write_bytes(target.read_bytes()[:-1])
    return target


def run(change: Callable[[dict[str, Any]], object]) -> Make:
    """A run directory of stage 1 with a small model, its checkpoint changed."""

    def make(path: Path) -> None:
        from maect_fast.checkpoint import random_states, save_checkpoint
        from maect_fast.config import load_config, load_recipe
        from maect_fast.training.distributed import init_world
        from maect_fast.training.stages import build_stage, last_checkpoint

        config = load_config(load_recipe("digits", "pretrain"))
        state = build_stage(config, init_world("cpu"), total=4)
        content = {
            **state.state_dict(),
            "update": 4,
            "config": dataclasses.asdict(config),
            "random_states": [random_states()],
        }
        change(content)
        save_checkpoint(last_checkpoint(path), content)

    return make


def as_checkpoint(make_file: Make) -> Make:
    def make(path: Path) -> None:
        (path / "checkpoints").mkdir(parents=True)
        make_file(path / "checkpoints" / "last.pt")

    return make


def png(width: int, height: int, rows: int = 0, more: bytes = b"") -> bytes:
    """A grey PNG, of which `rows` are there."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    packer = zlib.compressobj(1)
    line = bytes(1 + width)
    content = b"".join(packer.compress(line) for _ in range(rows)) + packer.flush()
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
    return (
        header
        + (chunk(*more.split(b"|", 1)) if more else b"")
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


def image(width: int, height: int, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(buffer, kind, **options)
    return buffer.getvalue()


def resized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header states another size."""
    content = bytearray(image(64, 64, "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is there 3,000 times."""
    content = image(4096, 4096, "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 3000 + content[-2:]


def netpbm(kind: bytes, width: int, height: int, size: int, value: bytes = b"\0\7") -> bytes:
    """A picture of one value, `size` bytes a pixel, of which 1023 is white."""
    return kind + f"\n{width} {height}\n1023\n".encode() + value * (width * height * size // 2)


def tiff(fields: dict[int, int]) -> bytes:
    base = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: 256}
    entries = sorted((base | fields).items())
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4 + 256)


def picture(name: str, content: Callable[[], bytes]) -> Make:
    return lambda folder: (folder / name).write_bytes(content())


def socket_file(folder: Path) -> None:
    # A socket's path has at most 108 bytes.
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")


def link_loop(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "deep" / "again").symlink_to(folder / "deep")


def deep_grey(folder: Path) -> None:
    Image.fromarray(np.ones((64, 64), np.float32)).save(folder / "x.tif")


NOT_READABLE = "not a readable safetensors file: "
TOO_LARGE = r"skipped 1 \(too large\): .*more than data.max_pixels = 30000000\)"
DAMAGED = r"skipped 1 \(damaged\): "

KINDS: dict[str, Kind] = {
    # Encoder files.
    "safetensors cut off": Kind(ENCODER, cut_safetensors, NOT_READABLE),
    "safetensors of 7 bytes": Kind(ENCODER, safetensors(b"", 0), NOT_READABLE),
    "safetensors header beyond the file": Kind(
        ENCODER, safetensors({}, 1 << 62), NOT_READABLE + "cut off"
    ),
    "safetensors header of 99 MB": Kind(
        ENCODER, safetensors(b"{" + b" " * (99 << 20) + b"}"), "103809026 bytes to describe"
    ),
    "safetensors header that is no JSON": Kind(ENCODER, safetensors(b"{]"), NOT_READABLE),
    "safetensors header nested a million times": Kind(
        ENCODER, safetensors(b'{"x":' + b"[" * 10**6 + b"]" * 10**6 + b"}"), NOT_READABLE
    ),
    "safetensors of 10^10 rows": Kind(
        ENCODER,
        safetensors({"x": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}),
        NOT_READABLE,
    ),
    "TorchScript archive": Kind(ENCODER, torch_script, "a TorchScript archive"),
    "pickle that runs a command": Kind(
        ENCODER, saved({"x": _Call(os.system, "touch harm")}), "holds posix.system, more than"
    ),
    "pickle of a module": Kind(
        ENCODER, lambda path: torch.save(torch.nn.Linear(2, 2), path), "holds torch.nn.modules"
    ),
    "pickle of another program": Kind(
        ENCODER, lambda path: path.write_bytes(pickle.dumps({"x": 1}, 2)), "none of torch.save"
    ),
    "pickle that asks for 100 GB": Kind(
        ENCODER, saved({"x": _Call(bytearray, 10**11)}), "holds __builtin__.bytearray"
    ),
    "pickle with a memo of 2^31": Kind(
        ENCODER, raw(b"}r" + struct.pack("<I", 1 << 31)), "found nothing named patch_embed"
    ),
    "pickle nested 3,000 times": Kind(
        ENCODER, raw((b"}" + key("x")) * 3000 + b"}" + b"s" * 3000), "found nothing named"
    ),
    "pickle nested a million times": Kind(
        ENCODER,
        raw((b"}" + key("x")) * 10**6 + b"}" + b"s" * 10**6),
        "8000004 bytes to describe its tensors",
    ),
    "pickle nested 250,000 times": Kind(
        ENCODER, raw((b"}" + key("x")) * 250_000 + b"}" + b"s" * 250_000), "found nothing named"
    ),
    "archive of 50,000 records": Kind(
        ENCODER,
        lambda path: archive(path, pickled({}), {f"data/{i}": b"" for i in range(50_000)}),
        "bytes to describe its tensors, at most 2097152",
    ),
    "key of a million tuples": Kind(
        ENCODER, raw(b"})" + b"\x85" * 10**6 + b"Ns"), "keys are no plain values"
    ),
    "dict with 2^60 ways through it": Kind(ENCODER, saved(lattice()), "found nothing named"),
    "stride-0 tensor of 10^10 rows": Kind(
        ENCODER, saved({"x": _Tensor((10**10, 16), (0, 1), 16)}), r"a tensor \[10000000000, 16\]"
    ),
    "tensor beyond its storage": Kind(
        ENCODER, saved({"x": _Tensor((4,), (8,), 16)}), "beyond its 16 elements"
    ),
    "storage beyond its record": Kind(
        ENCODER, saved({"x": _Tensor((32,), (1,), 32)}), "storage 0 has 64 bytes, 128 stated"
    ),
    "storage beyond the file": Kind(
        ENCODER, saved({"x": _Tensor((10**10,), (1,), 10**10)}), "its tensors take 40000000000 b"
    ),
    "storage beyond an old file": Kind(ENCODER, legacy, "its tensors take 4000000000000 bytes"),
    "compressed record": Kind(
        ENCODER,
        lambda path: archive(path, pickled({}), {"data/0": bytes(1 << 28)}, zipfile.ZIP_DEFLATED),
        "its records state 268435",
    ),
    "encoder cut off": Kind(ENCODER, damaged(lambda x: x[:-3000]), "cut off or damaged"),
    "encoder with a byte changed": Kind(
        ENCODER,
        damaged(lambda x: x[: len(x) // 2] + bytes([x[len(x) // 2] ^ 1]) + x[len(x) // 2 + 1 :]),
        "cut off or damaged",
    ),
    "empty encoder": Kind(ENCODER, lambda path: path.write_bytes(b""), "neither a file of torch"),
    "pipe for an encoder": Kind(ENCODER, os.mkfifo, "not a regular file"),
    "encoder that lacks a block": Kind(
        ENCODER, weights(lambda w: [w.pop(k) for k in list(w) if "blocks.3" in k]), "lacks blocks.3"
    ),
    "encoder of NaN": Kind(
        ENCODER, weights(lambda w: w["norm.bias"].fill_(torch.nan)), "norm.bias holds NaN"
    ),
    "names with line ends and colours": Kind(
        ENCODER,
        weights(lambda w: w.update({"blocks.\n\x1b[31m": w["norm.bias"]})),
        r"has, beyond this encoder, blocks.\\n\\x1b\[31m",
    ),
    "20,000 encoders in a file": Kind(
        ENCODER,
        saved({f"{i}.patch_embed.proj.weight": _Tensor((4,), (1,), 16) for i in range(20_000)}),
        "expected one ViT encoder, found 20000: .* and 19996 more",
    ),
    # Run directories.
    "checkpoint of another program": Kind(
        RUN, as_checkpoint(saved({"x": 1})), "not a checkpoint of maect-fast"
    ),
    "checkpoint that runs a command": Kind(
        RUN, as_checkpoint(saved({"x": _Call(os.system, "touch harm")})), "holds posix.system"
    ),
    "pipe for a checkpoint": Kind(RUN, as_checkpoint(os.mkfifo), "not a regular file"),
    "checkpoint without a key": Kind(RUN, run(lambda s: s.pop("model")), "without model"),
    "checkpoint with a number for a model": Kind(
        RUN, run(lambda s: s.update(model=7)), "model is a int, expected dict"
    ),
    "update 10^9 of 4": Kind(
        RUN, run(lambda s: s.update(update=10**9)), "update 1000000000 of 4 cannot be"
    ),
    "depth 3000": Kind(
        RUN,
        run(lambda s: s["config"]["encoder"].update(depth=3000)),
        "encoder.depth: expected a number in .1, 1024., got 3000",
    ),
    "width 10^6": Kind(
        RUN, run(lambda s: s["config"]["encoder"].update(embed_dim=10**6)), "embed_dim"
    ),
    "positions of an image of 10^6 pixels": Kind(
        RUN, run(lambda s: s["config"]["encoder"].update(img_size=10**6)), "img_size"
    ),
    "decoder of 3000 blocks": Kind(
        RUN, run(lambda s: s["config"]["decoder"].update(depth=3000)), "decoder.depth"
    ),
    "name of a model of 1.8 billion": Kind(
        RUN,
        run(lambda s: s["config"]["encoder"].update(name="vit_gigantic_patch14_224")),
        "encoder",
    ),
    "weights of another shape": Kind(
        RUN,
        run(lambda s: s["model"].update({"encoder.norm.bias": torch.zeros(3)})),
        r"encoder.norm.bias has shape \[3\]",
    ),
    # Image folders; two images in each are good.
    "pipe": Kind(IMAGES, lambda f: os.mkfifo(f / "x.png"), r"left out 1 \(pipes, "),
    "socket": Kind(IMAGES, socket_file, r"left out 1 \(pipes, "),
    "device": Kind(
        IMAGES, lambda f: (f / "x.png").symlink_to("/dev/zero"), r"left out 1 \(pipes, "
    ),
    "links in a loop": Kind(IMAGES, link_loop, r"left out 2 \(links to a folder"),
    "PNG of 169 megapixels": Kind(IMAGES, picture("x.png", lambda: png(13000, 13000)), TOO_LARGE),
    "PNG that states 2^62 pixels": Kind(
        IMAGES, picture("x.png", lambda: png(2**31 - 1, 2**31 - 1)), r"skipped 1 \(too large\)"
    ),
    "PNG with a profile of 256 MB": Kind(
        IMAGES,
        picture(
            "x.png",
            lambda: png(64, 64, 64, b"iCCP|x\0\0" + zlib.compress(bytes(1 << 28), 1)),
        ),
        DAMAGED + ".*MAX_TEXT_CHUNK",
    ),
    "PNG cut off": Kind(IMAGES, picture("x.png", lambda: png(4000, 4000, 4000)[:9000]), DAMAGED),
    "JPEG of 3,000 scans": Kind(
        IMAGES, picture("x.jpg", many_scans), "a JPEG of .* scans, at most 100"
    ),
    "JPEG that states 65,500 x 65,500": Kind(
        IMAGES, picture("x.jpg", lambda: resized_jpeg(65500, 65500)), r"skipped 1 \(too large\)"
    ),
    "JPEG that states 13,000 x 13,000": Kind(
        IMAGES, picture("x.jpg", lambda: resized_jpeg(13000, 13000)), "^$"
    ),
    "TIFF with a tile of 2^32 pixels": Kind(
        IMAGES,
        picture("x.tif", lambda: tiff({322: 1 << 16, 323: 1 << 16, 324: 8, 325: 256, 259: 8})),
        r"skipped 1 \(too large\): .*a tile of 65536 x 65536 pixels",
    ),
    "TIFF of 2^31 strips": Kind(
        IMAGES, picture("x.tif", lambda: tiff({257: 1 << 31, 278: 1})), r"skipped 1 \(too large\)"
    ),
    "BMP that states 40,000 x 40,000": Kind(
        IMAGES,
        picture(
            "x.bmp",
            lambda: (content := image(64, 64, "BMP"))[:18]
            + struct.pack("<ii", 40000, 40000)
            + content[26:],
        ),
        r"skipped 1 \(too large\)",
    ),
    "GIF that states 13,000 x 13,000": Kind(
        IMAGES,
        picture(
            "x.gif",
            lambda: b"GIF89a" + struct.pack("<HH", 13000, 13000) + image(64, 64, "GIF")[10:],
        ),
        TOO_LARGE,
    ),
    "PostScript under the name of a PNG": Kind(
        IMAGES, picture("x.png", lambda: image(64, 64, "EPS")), r"skipped 1 \(no image\)"
    ),
    "text under the name of a JPEG": Kind(
        IMAGES, picture("x.jpg", lambda: b"no image" * 1000), r"skipped 1 \(no image\)"
    ),
    "text PGM of 25 megapixels": Kind(
        IMAGES, picture("x.pgm", lambda: b"P2\n5000 5000\n255\n1 2 3"), r"in letters \(16 times"
    ),
    "text PGM that states 1,000 x 1,000": Kind(
        IMAGES, picture("x.pgm", lambda: b"P2\n1000 1000\n255\n1 2 3"), DAMAGED
    ),
    "JPEG 2000 of 25 megapixels": Kind(
        IMAGES,
        picture("x.jp2", lambda: image(5000, 5000, "JPEG2000")),
        r"JPEG 2000 \(2 times",
        slow=True,
    ),
    "grey values without a range": Kind(IMAGES, deep_grey, r"skipped 1 \(too deep\)"),
    "name with line ends and colours": Kind(
        IMAGES, picture("\x1b[31m\n.png", lambda: b""), r"skipped 1 \(no image\): .*\\x1b\[31m\\n"
    ),
    # Nearly as large as is taken.
    **{
        f"{label} of 30 megapixels": Kind(IMAGES, picture(name, make), "^$", slow=True)
        for label, name, make in (
            ("PNG", "x.png", lambda: png(SIDE, SIDE, SIDE)),
            ("progressive JPEG", "x.jpg", lambda: image(SIDE, SIDE, "JPEG", progressive=True)),
            ("WebP", "x.webp", lambda: image(SIDE, SIDE, "WEBP", lossless=True, method=0)),
            ("AVIF", "x.avif", lambda: image(SIDE, SIDE, "AVIF", speed=10)),
            ("JPEG 2000, 1/4", "x.jp2", lambda: image(SIDE // 2, SIDE // 2, "JPEG2000")),
            ("GIF", "x.gif", lambda: image(SIDE, SIDE, "GIF")),
            ("TIFF", "x.tif", lambda: image(SIDE, SIDE, "TIFF", compression="tiff_lzw")),
            ("PGM of 10 bits", "x.pgm", lambda: netpbm(b"P5", SIDE, SIDE, 2)),
            ("PPM of 10 bits", "x.ppm", lambda: netpbm(b"P6", SIDE, SIDE, 6)),
            ("text PGM, 1/16", "x.pgm", lambda: netpbm(b"P2", SIDE // 4, SIDE // 4, 2, b"7 ")),
        )
    },
    "JPEG of 169 megapixels": Kind(
        IMAGES, picture("x.jpg", lambda: image(13000, 13000, "JPEG")), "^$", slow=True
    ),
}  # fmt: skip


def made(kind: Kind, folder: Path) -> Path:
    """Write the kind's file below an empty folder; returns what the program is given."""
    path = folder / "given"
    if kind.where == IMAGES:
        path.mkdir()
        for i in range(2):
            Image.new("RGB", (64, 64), (100 * i, 90, 80)).save(path / f"good {i}.png")
    changed = kind.make(path)
    return changed if isinstance(changed, Path) else path


def meet(where: str, path: Path) -> list[str]:
    """Let the program meet the file; the lines that it prints."""
    from maect_fast.cli import main

    if where == IMAGES:
        return _train(path)
    out = path.parent / "out"
    if where == ENCODER:
        command = ["prepare-head", "--recipe", "digits", "--init", str(path), "--out", str(out)]
        command += ["threads=1", "device=cpu"]
    else:
        command = ["extract", str(path), "--out", f"{out}.npy", "device=cpu"]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(command)
    assert code == 2
    return said.getvalue().splitlines()


def _train(folder: Path) -> list[str]:
    """One epoch over the folder's images."""
    from maect_fast.config import AugmentConfig, DataConfig, EncoderConfig
    from maect_fast.data import Loader, build_source

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.extend(record.getMessage().split("\n"))  # type: ignore[method-assign]
    logging.getLogger("maect_fast").addHandler(handler)
    source = build_source(DataConfig(root=str(folder)), EncoderConfig(), split="train")
    assert len(source) in (2, 3)
    loader = Loader(
        source, AugmentConfig(), num_views=2, batch_size=len(source), img_size=224, seed=5
    )
    (batch,) = loader.batches(0)
    assert batch.views.shape == (2, len(source), 3, 224, 224)
    return lines


def serve() -> None:
    """Answer each line `where<tab>path` with what a fork of this process measured."""
    import sklearn.datasets
    import sklearn.utils  # noqa: F401
    import torch.utils.tensorboard

    import maect_fast.evaluation.runs
    import maect_fast.training.engine  # noqa: F401

    torch.set_num_threads(1)
    Image.init()
    for line in sys.stdin:
        where, path = line.rstrip("\n").split("\t")
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(readable)
            with os.fdopen(writable, "w") as pipe:
                pipe.write(json.dumps(_measure(where, Path(path))))
            os._exit(0)
        os.close(writable)
        with os.fdopen(readable) as pipe:
            if not select.select([pipe], [], [], PATIENCE)[0]:
                os.kill(child, signal.SIGKILL)
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        lost = Measured([f"ended with status {status}"], PATIENCE, 0.0)
        sys.stdout.write(f"{answer or json.dumps(lost)}\n")
        sys.stdout.flush()


def _measure(where: str, path: Path) -> Measured:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _status("VmRSS")
    os.chdir(path.parent)
    try:
        lines = meet(where, path)
    except BaseException as error:
        lines = [f"{type(error).__name__}: {error}", "which nobody caught"]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Measured(lines, usage.ru_utime + usage.ru_stime, (_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    """A field of this process's status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@contextlib.contextmanager
def measuring() -> Iterator[Callable[[Kind, Path], Measured]]:
    """A process that has imported the program, and measures what is shown to it."""
    command = [sys.executable, "-c", "from tests.hostile_files import serve; serve()"]
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with subprocess.Popen(
        command, cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def measure(kind: Kind, folder: Path) -> Measured:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(f"{kind.where}\t{made(kind, folder)}\n")
            server.stdin.flush()
            return Measured(*json.loads(server.stdout.readline()))

        yield measure
        server.stdin.close()


def table() -> None:
    """Print what every kind comes to."""
    with measuring() as measure:
        sys.stdout.write("| kind | said | CPU s | MiB |\n|---|---|---:|---:|\n")
        for name, kind in KINDS.items():
            with tempfile.TemporaryDirectory() as folder:
                found = measure(kind, Path(folder))
                said = "<br>".join(found.lines).replace(f"{folder}/", "").replace("|", r"\|")
            sys.stdout.write(f"| {name} | {said} | {found.seconds:.2f} | {found.mib:.0f} |\n")


if __name__ == "__main__":
    table()
