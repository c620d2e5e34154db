"""How Lightning comes to its batches: which loader, whether it is made anew, and what is fetched of it, when."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities import CombinedLoader


def reloads(trainer: Trainer) -> bool:
    """Whether the training loaders are about to be made anew."""
    return bool(trainer.fit_loop._should_reload_train_dl)


def first_batch(trainer: Trainer) -> Any:
    """The first batch of a training loader that is made for this alone; generators of its own stay as they are."""
    loader = trainer.fit_loop._data_source.dataloader()
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "max_size_cycle")
    parts = [part for one in combined.flattened for part in (one, getattr(one, "sampler", None))]
    found = [getattr(part, "generator", None) for part in parts]
    own = [generator for generator in found if isinstance(generator, torch.Generator)]
    states = [generator.get_state() for generator in own]
    batch, *_ = next(iter(combined))
    for generator, state in zip(own, states, strict=True):
        generator.set_state(state)
    return trainer.precision_plugin.convert_input(batch)


def set_sampler_epoch(trainer: Trainer, loader: object) -> None:
    """As Lightning does behind its first `iter`: where a run goes on, workers have drawn an order by then."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    _set_sampler_epoch(loader, progress.processed)


def fetch_late(trainer: Trainer) -> None:
    """Let the batch ahead be fetched by `look_ahead` alone: Lightning fetches it before anybody knows whether the epoch
    ends here, and what it fetched in vain is lost to a stream. A loader of known length is never fetched ahead."""
    fetcher = trainer.fit_loop._data_fetcher
    if type(fetcher) is _PrefetchDataFetcher:
        fetcher.__class__ = _FetchesLate


def look_ahead(trainer: Trainer) -> None:
    """The epoch goes on behind the batch under way, if its stream does: fetch what comes next, or say that it ended."""
    fetcher = trainer.fit_loop._data_fetcher
    if isinstance(fetcher, _FetchesLate):
        fetcher.look_ahead()
        trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = fetcher.done


class _FetchesLate(_PrefetchDataFetcher):
    """What is fetched ahead is fetched when a batch begins, not before it is handed out."""

    def __next__(self) -> Any:
        if self.batches:
            return self.batches.pop(0)
        if self.done:
            raise StopIteration
        return _DataFetcher.__next__(self)

    def look_ahead(self) -> None:
        if self.length is None and not self.batches and not self.done:
            with suppress(StopIteration):  # `done` from here on
                self.batches.append(_DataFetcher.__next__(self))


def skip_batch(fetcher: Any) -> None:
    """Fetch a batch in vain; what was fetched ahead is the next one. Lightning counts those before where it resumes."""
    ahead, fetched = getattr(fetcher, "batches", []), fetcher.fetched
    with suppress(StopIteration):
        ahead.append(_DataFetcher.__next__(fetcher))
    del ahead[:1]
    fetcher.fetched = fetched
