"""How good the encoder's features are, measured while it trains.

One process measures, the others wait; nothing of the run draws from what it draws from.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from maect_fast.config import Config
from maect_fast.data import Source, build_source
from maect_fast.training.log import progress
from maect_fast.training.stages import StageState

__all__ = ["FeatureCheck"]

T = TypeVar("T")

MAX_GALLERY = 50_000
MAX_QUERIES = 10_000
# Of the training images, those that are asked about where there are no others.
SHARE = 0.1
NEIGHBOURS = 10


class FeatureCheck:
    """Measures features after every `knn_every` epochs, and after the last.

    With classes `knn` is what `evaluate` has under this name, of the same weights, unless there are
    more images than are taken or none for the test; without classes there is its `view_agreement`.

    Args:
        config: of the run.
        train: its images.
        updates_per_epoch: of the run.
    """

    def __init__(self, config: Config, train: Source, *, updates_per_epoch: int) -> None:
        self.config, self.train = config, train
        self.interval = config.knn_every * updates_per_epoch
        self.has_classes = False

    def prepare(self) -> list[str]:
        """Find the images. Returns lines that say what will be measured.

        Raises:
            ConfigError: there are none where `data.test_root` says.
        """
        if not self.interval:
            return []
        from maect_fast.evaluation import no_labels

        data, number = self.config.data, len(self.train)
        self.test = self.train
        if data.source == "dataset" or (data.source == "folder" and data.test_root is None):
            order = self._order(number)
            asked = min(MAX_QUERIES, max(1, int(SHARE * number)))
            self.query_ids, self.gallery_ids = order[:asked], order[asked:][:MAX_GALLERY]
        else:
            self.test = build_source(data, self.config.encoder, split="test")
            self.gallery_ids = self._some(number, MAX_GALLERY)
            self.query_ids = self._some(len(self.test), MAX_QUERIES)
        labels = self.train.labels[self.gallery_ids], self.test.labels[self.query_ids]
        reason = no_labels(*labels)
        self.has_classes = reason is None
        if reason is not None:
            return [f"knn_every: {reason} (view_agreement)"]
        which, others = (
            ("training", "others") if self.test is self.train else ("test", "for training")
        )
        return [
            f"knn_every: k-NN accuracy of {len(self.query_ids)} {which} images among "
            f"{len(self.gallery_ids)} {others}"
        ]

    def is_due(self, state: StageState) -> bool:
        """After this update."""
        if not self.interval:
            return False
        return state.update % self.interval == 0 or state.update == state.total

    def measure(self, state: StageState, *, stopped: Callable[[], bool]) -> dict[str, float]:
        """Of the encoder that evaluation would take.

        Args:
            state: of the run.
            stopped: whether the run is to end, and the measurement with it, without a result.
        """
        # These load libraries that training does not need.
        from maect_fast.evaluation.knn import knn_accuracy
        from maect_fast.evaluation.runs import source_features, source_views
        from maect_fast.evaluation.unlabelled import score_views

        def show(items: Iterable[T], title: str, *, total: int) -> Iterator[T]:
            for item in progress(items, title, total=total):
                if stopped():
                    raise _StoppedError
                yield item

        config, ema = self.config, state.encoder_ema
        encoder = state.model.encoder if ema is None else ema.encoder
        try:
            if not self.has_classes:
                views = source_views(
                    self.test,
                    config,
                    encoder,
                    config.augment,
                    seed=config.seed,
                    title="views",
                    limit=MAX_QUERIES,
                    show=show,
                )
                agreement = score_views(views, seed=config.seed).get("view_agreement")
                return {} if agreement is None else {"view_agreement": agreement}
            gallery, queries = (
                source_features(
                    source, config, encoder, title=title, indices=ids.tolist(), show=show
                ).features.labelled()
                for source, ids, title in (
                    (self.train, self.gallery_ids, "k-NN gallery"),
                    (self.test, self.query_ids, "k-NN queries"),
                )
            )
        except _StoppedError:
            return {}
        k = min(NEIGHBOURS, len(gallery))
        device = next(encoder.parameters()).device
        return {"knn": knn_accuracy(gallery, queries, k=k, device=device)}

    def _some(self, number: int, limit: int) -> Tensor:
        """Indices of all of them, in their order, or of a seeded choice."""
        return torch.arange(number) if number <= limit else self._order(number)[:limit]

    def _order(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randperm(number, generator=generator)


class _StoppedError(Exception):
    """The run is to end."""
