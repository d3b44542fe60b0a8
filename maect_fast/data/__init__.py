"""Images in, augmented batches out."""

from maect_fast.data.broken import DataError, told_once
from maect_fast.data.build import build_source
from maect_fast.data.dataset import DatasetSource, from_dataset
from maect_fast.data.feed import Feed
from maect_fast.data.folder import FolderSource
from maect_fast.data.loader import Batch, EvalBatches, Loader, eval_batches
from maect_fast.data.pack import PackSource, write_pack
from maect_fast.data.sources import Source, TensorSource

__all__ = [
    "Batch",
    "DataError",
    "DatasetSource",
    "EvalBatches",
    "Feed",
    "FolderSource",
    "Loader",
    "PackSource",
    "Source",
    "TensorSource",
    "build_source",
    "eval_batches",
    "from_dataset",
    "told_once",
    "write_pack",
]
