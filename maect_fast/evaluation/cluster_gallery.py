"""The gallery: clusters as one page to look at, without any other file or a network.

Each cluster shows its most central images first and those farthest from its centre; a click, or
Enter on the keyboard, shows an image's nearest neighbours. At most 6,000 images are on the page,
shared equally by the clusters, and the page says where it shows fewer than there are.
"""

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maect_fast.checkpoint import write_atomically
from maect_fast.config import AugmentConfig, Config
from maect_fast.data import FolderSource, Source, eval_batches
from maect_fast.evaluation.report import template
from maect_fast.evaluation.runs import Extracted
from maect_fast.kernels import queue_topk
from maect_fast.names import printable
from maect_fast.training.log import progress

__all__ = ["Shown", "choose_shown", "write_gallery"]

# A thumbnail is 2 to 4 KB, as base64 a third more, so that a page stays below 35 MB.
MAX_SHOWN = 6000
MAX_CLUSTERS = 500
NEIGHBOURS = 12
# Of each cluster, and of all images.
FARTHEST, OUTLIERS = 8, 24
SIDE, QUALITY = 96, 80
BATCH = 64


class Shown(NamedTuple):
    """The images on the page, as rows of the features."""

    central: list[list[int]]
    """Of each cluster on the page, the nearest to its centre first."""
    farthest: list[list[int]]
    """Of the same clusters, those of the others that are farthest, the farthest first."""
    outliers: list[int]
    """The farthest from their centres of all, the farthest first."""

    @property
    def rows(self) -> list[int]:
        """All of them once, in the order of the page."""
        parts = zip(self.central, self.farthest, strict=True)
        first = (row for near, far in parts for row in (*near, *far))
        return list(dict.fromkeys([*first, *self.outliers]))


def choose_shown(cluster: Tensor, distance: Tensor) -> Shown:
    """Choose images for the page: all, or as many of each cluster.

    Args:
        cluster: [N] int64, 0 the largest; of the largest 500 clusters images are shown.
        distance: [N] float32, to the centre of the cluster.
    """
    number = int(cluster.max()) + 1
    most = MAX_SHOWN // min(number, MAX_CLUSTERS)
    central, farthest = [], []
    for i in range(min(number, MAX_CLUSTERS)):
        rows = torch.nonzero(cluster == i).squeeze(1)
        ranked = rows[torch.argsort(distance[rows], stable=True)].tolist()
        # Of a small cluster at most a quarter is called far.
        far = min(FARTHEST, most // 4, len(ranked) // 4)
        central.append(ranked[: min(most, len(ranked)) - far])
        farthest.append(ranked[len(ranked) - far :][::-1])
    order = torch.argsort(distance, descending=True, stable=True)
    return Shown(central, farthest, order[:OUTLIERS].tolist())


def write_gallery(
    path: Path,
    extracted: Extracted,
    cluster: Tensor,
    distance: Tensor,
    *,
    config: Config,
    notes: Sequence[str],
    about: Mapping[str, str],
) -> None:
    """Write the page, as a whole or not at all.

    A thumbnail is the middle of the image, which is what the encoder sees, at 96 pixels; images
    that can no longer be read have none. Neighbours are by cosine among the images on the page.

    Measured with 100,000 images in 30 clusters and features of dimension 768, k-means included: a
    page of 22 MB, and a process of at most 2.1 GB, of which 0.9 are its libraries.

    Args:
        path: of the HTML file.
        extracted: features [N, D] and their source.
        cluster: [N] int64, 0 the largest.
        distance: [N] float32, to the centre of the cluster.
        config: says by how many workers images are read, and of how many may fail.
        notes: paragraphs of plain text.
        about: by name, what the page says of itself.
    """
    features, source = extracted.features, extracted.source
    shown = choose_shown(cluster, distance)
    rows = torch.tensor(shown.rows)
    place = {row: i for i, row in enumerate(shown.rows)}
    ids = extracted.sample_id[rows].tolist()
    x = F.normalize(features.x[rows], dim=1)
    own = torch.arange(len(rows))
    k = min(NEIGHBOURS, len(rows) - 1)
    similarity, neighbours = x.new_zeros(len(rows), 0), own.new_zeros(len(rows), 0)
    if k > 0:
        found = queue_topk(x, x, k=k, query_id=own, queue_id=own)
        similarity, neighbours = found.values, found.indices
    names = [source.name(i) for i in ids]
    folder = config.data.root if config.data.source == "folder" else None
    if folder is not None:
        names = [os.path.relpath(name, folder) for name in names]
    sizes = torch.bincount(cluster).tolist()
    thumbnails = _thumbnails(source, ids, config)
    page = {
        "images": {
            "name": [printable(name) for name in names],
            "class": features.label[rows].tolist(),
            "cluster": cluster[rows].tolist(),
            "distance": _rounded(distance[rows]),
            "neighbours": neighbours.tolist(),
            "similarity": _rounded(similarity),
            "thumbnail": [thumbnails.get(i) for i in ids],
        },
        "classes": [printable(name) for name in source.class_names],
        "clusters": [
            {
                "size": sizes[i],
                "central": [place[row] for row in near],
                "farthest": [place[row] for row in far],
                "classes": _class_counts(features.label[cluster == i]),
            }
            for i, (near, far) in enumerate(zip(shown.central, shown.farthest, strict=True))
        ],
        "outliers": [place[row] for row in shown.outliers],
        "numClusters": len(sizes),
        "numImages": len(features),
        "numMissing": len(extracted.missing),
    }
    text = template("gallery.html.jinja").render(page=page, notes=notes, about=about)
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def _rounded(numbers: Tensor) -> Any:
    """Four decimals: what a reader can see, in a third of the bytes."""
    return np.round(numbers.double().numpy(), 4).tolist()


def _class_counts(label: Tensor) -> list[list[int]]:
    """Pairs of a class and how often it occurs, the most frequent first."""
    number, counts = torch.unique(label[label >= 0], return_counts=True)
    order = torch.argsort(counts, descending=True, stable=True)
    return torch.stack((number[order], counts[order]), dim=1).tolist()


def _thumbnails(source: Source, ids: Sequence[int], config: Config) -> dict[int, str]:
    """By the image's id, a JPEG in base64; those that cannot be read are left out."""
    if isinstance(source, FolderSource):
        # In colour, whatever the encoder sees.
        source = replace(source, channels=3)
    channels = source.in_chans
    plain = AugmentConfig(mean=[0.0] * channels, std=[1.0] * channels)
    batches = eval_batches(
        source,
        plain,
        img_size=SIDE,
        batch_size=BATCH,
        workers=config.data.workers,
        max_broken=config.data.max_broken,
        indices=ids,
    )
    found: list[str] = []
    for images, _ in progress(batches, "thumbnails", total=len(batches)):
        found.extend(map(_jpeg, images))
    left = [i for i in ids if i not in batches.skipped]
    return dict(zip(left, found, strict=True))


def _jpeg(pixels: Tensor) -> str:
    """[C, S, S] in [0, 1] as a JPEG in base64; images of few pixels are enlarged."""
    array = pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).squeeze(2).numpy()
    image = Image.fromarray(array)
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
