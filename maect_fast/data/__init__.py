"""Images in, augmented batches out."""

from maect_fast.data.feed import Feed
from maect_fast.data.loader import Batch, DataError, EvalBatches, Loader, eval_batches, told_once
from maect_fast.data.sources import FolderSource, Source, TensorSource, build_source

__all__ = [
    "Batch",
    "DataError",
    "EvalBatches",
    "Feed",
    "FolderSource",
    "Loader",
    "Source",
    "TensorSource",
    "build_source",
    "eval_batches",
    "told_once",
]
