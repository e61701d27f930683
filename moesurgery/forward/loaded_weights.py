"""Which units' weights are loaded, how many bytes of them stay on each device, and what is read in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moesurgery.forward.layer_units import LayerUnit
from moesurgery.forward.meta_model import MetaModel

if TYPE_CHECKING:
    import torch


class LoadedWeights:
    """The loaded units of a model. `keep[i]` bytes of weights may stay on device `i` of the model."""

    def __init__(self, model: MetaModel, keep: int) -> None:
        self.model = model
        self.on_gpu = model.device.type == "cuda"
        self.keep = [keep] * len(model.devices)
        self.freed: list[Callable[[LayerUnit], None]] = []  # called when a unit's weights are freed
        self.resident: dict[str, LayerUnit] = {}  # least recently used first
        self._pinned: set[str] = set()
        self._ahead: dict[str, Future[dict[str, torch.Tensor]]] = {}  # weights that are being read in advance
        self._readers: dict[int, ThreadPoolExecutor] = {}  # by number of the device

    def held(self, stage: int) -> int:
        """Return the bytes of weights that are loaded on a device."""
        return sum(unit.nbytes for unit in self.resident.values() if unit.stage == stage)

    @contextmanager
    def loaded(self, unit: LayerUnit, *, pin: bool = False) -> Iterator[None]:
        """Keep a unit's weights loaded within the context. Weights over the budget are freed afterwards."""
        if unit.path not in self.resident:
            self._evict(unit.stage, self.keep[unit.stage] - unit.nbytes)
            ahead = self._ahead.pop(unit.path, None)
            if ahead is None:
                self.model.load(unit)
            else:
                self.model.put(unit, ahead.result())
        self.resident[unit.path] = self.resident.pop(unit.path, unit)
        if pin:
            self._pinned.add(unit.path)
        self._read_ahead(unit)
        yield
        self._evict(unit.stage, self.keep[unit.stage])

    def forget(self, unit: LayerUnit) -> None:
        """Free a unit's weights at once, discarding any change made to them."""
        self._pinned.discard(unit.path)
        if self.resident.pop(unit.path, None) is not None:
            self._free(unit)

    def make_room(self, stage: int, nbytes: int) -> None:
        """Free units of a device, so that another model has `nbytes` more of its memory."""
        self._evict(stage, max(0, self.held(stage) - nbytes))

    def unpin(self) -> None:
        self._pinned.clear()
        for stage, keep in enumerate(self.keep):
            self._evict(stage, keep)

    def _read_ahead(self, unit: LayerUnit) -> None:
        """Begin to read, on every device, the first layer after `unit` that it has not; only on GPUs, where host
        memory is not the bottleneck."""
        if not self.on_gpu or self.model.donor is not None or unit.layer is None:
            return
        count = len(self.model.layers)
        for stage in range(len(self.keep)):
            turn = (self.model.layers[(unit.layer + i) % count] for i in range(1, count))
            following = next((layer for layer in turn if layer.stage == stage), None)
            if following is None or following.path in self.resident or following.path in self._ahead:
                continue
            if stage not in self._readers:
                self._readers[stage] = ThreadPoolExecutor(1, "ahead")
            self._ahead[following.path] = self._readers[stage].submit(self.model.read, following)

    def _evict(self, stage: int, keep: int) -> None:
        """Free units of a device until those that are not pinned take no more than `keep`.

        On a GPU the most recently used first: each pass begins again at the first layer, so that is needed soonest.
        """
        free = [path for path, unit in self.resident.items() if unit.stage == stage and path not in self._pinned]
        held = sum(self.resident[path].nbytes for path in free)
        for path in reversed(free) if self.on_gpu else free:
            if held <= keep:
                return
            unit = self.resident.pop(path)
            held -= unit.nbytes
            self._free(unit)

    def _free(self, unit: LayerUnit) -> None:
        self.model.free(unit)
        for notify in self.freed:
            notify(unit)
