"""The forward pass of a model that does not fit in memory: all windows go through one layer, then the next.

The model's own code runs, unchanged, once per batch of windows. Each of these forward passes is a coroutine that is
suspended before every unit (`layer_units.LayerUnit`) until all batches have reached it; then the unit's weights are
loaded from the plan, all batches are computed, and the weights are freed. So each layer gets the arguments (positions,
masks, sliding windows, values kept by earlier layers) that the model's own code passes to it.

    engine = Engine(plan)
    engine.run(tokens, Hooks(experts=see_experts), logits=take_logits)

Memory: one unit's weights, the hidden states of all windows twice (a model keeps its embeddings), one batch's
activations. Units stay loaded as far as `keep` bytes go. On a GPU that is what its memory leaves, and the next unit is
read while one computes. With several devices layer i of L is on device floor(i G / L) of G, activations move from one
to the next, and each device reads its own next layer in advance.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moesurgery.forward import memory_budget
from moesurgery.forward.batch_passes import BatchPasses, Progress
from moesurgery.forward.hooks import NO_HOOKS, Hooks
from moesurgery.forward.tokens import Tokens
from moesurgery.forward.unit_runner import Resume, UnitRunner
from moesurgery.plan.plan import Plan

if TYPE_CHECKING:
    import torch

# On the processor; on a GPU its memory decides (`memory_budget`).
KEEP_BYTES = 256 << 20
BATCH_TOKENS = 4096  # at most, on the processor: more make no expert's matmul faster
BATCH_BYTES = 256 << 20  # of a batch's activations there, but not fewer tokens for it than
LEAST_TOKENS = 1024
LOGITS_BYTES = 512 << 20

_on_gpus: weakref.WeakSet[Any] = weakref.WeakSet()  # engines that share the memory of their devices


class Engine(UnitRunner):
    """Runs a plan's model, written or not, on a device or on several. `dtype` is that of weights and activations.

    `keep` bytes of weights stay loaded on each device. Without it, `memory` bounds all that a run takes of each; by
    default that is what is free on a GPU, and little on the processor. Raises RefusedError where transformers has no
    code for the model, CheckpointError where tensors are missing.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: str | Sequence[str] = "cpu",
        dtype: str = "float32",
        keep: int | None = None,
        memory: int = 0,
    ) -> None:
        devices = [device] if isinstance(device, str) else list(device)
        super().__init__(plan, devices, dtype, keep if keep is not None else KEEP_BYTES)
        self.on_gpu = self.device.type == "cuda"
        self.memory = memory
        self._keeps_what_fits = keep is None
        text = self.meta_model.model.config.get_text_config()
        self._shape = memory_budget.shape_of(text, plan.anatomy.settings.top_k or 1, self.meta_model.dtype.itemsize)
        if self.on_gpu and self._keeps_what_fits:
            _on_gpus.add(self)

    def sharing(self, plan: Plan) -> Engine:
        """Return the engine of another plan on the same devices, which keeps nothing loaded.

        Where both have the same tensors it uses the weights that this one has loaded. Raises as the class does.
        """
        model = self.meta_model
        devices, dtype = [str(device) for device in model.devices], str(model.dtype).removeprefix("torch.")
        other = Engine(plan, device=devices, dtype=dtype, keep=0, memory=self.memory)
        other.meta_model.donor = model
        return other

    @property
    def vocabulary(self) -> int:
        return int(self.meta_model.model.config.get_text_config().vocab_size)

    @property
    def width(self) -> int:
        """The hidden size."""
        return self._shape.hidden

    def start(
        self,
        tokens: Tokens,
        hooks: Hooks = NO_HOOKS,
        *,
        resume: Resume | None = None,
        batch: int | None = None,
        beside: int = 0,
    ) -> BatchPasses:
        """Begin the forward pass of all windows, `batch` at a time (by default as many as memory has room for).

        `beside` is how many engines that share this one's weights (`sharing`) run at the same time.
        """
        self._share_memory(tokens, beside)
        return BatchPasses(self, tokens, batch or self.windows_per_batch(tokens, True), hooks, resume)

    def run(
        self,
        tokens: Tokens,
        hooks: Hooks = NO_HOOKS,
        *,
        logits: Callable[[int, Tokens, torch.Tensor], None] | None = None,
        progress: Progress = lambda count: None,
    ) -> None:
        """Run the model on all windows.

        `logits` is called with (first window, windows, logits [b, S, V]) batch by batch; without it the head is
        never run. `progress` counts tokens times layers.
        """
        passes = self.start(tokens, hooks, batch=self.windows_per_batch(tokens, logits is not None))
        try:
            passes.to_layer(len(self.layers), progress)
            if logits is not None:
                for i, each in enumerate(passes.passes):
                    for first, windows, values in passes.logits(i, self.windows_per_head(each.tokens)):
                        logits(first, windows, values)
        finally:
            passes.close()

    def logits(self, tokens: Tokens) -> torch.Tensor:
        """Return the logits [N, S, V] in float32: for few windows."""
        import torch

        gathered = torch.zeros(*tokens.ids.shape, self.vocabulary)

        def take(first: int, part: Tokens, values: torch.Tensor) -> None:
            gathered[first : first + len(part), : part.length, : values.shape[-1]] = values.float().cpu()

        self.run(tokens, logits=take)
        return gathered

    def work(self, tokens: Tokens) -> int:
        """The total that `progress` reaches in one run."""
        return tokens.count * len(self.layers)

    def windows_per_batch(self, tokens: Tokens, logits: bool) -> int:
        """Return how many windows go through a layer together. On the processor their logits must have room too."""
        per_token = self._shape.per_token(tokens.length)
        limit = min(BATCH_TOKENS, max(LEAST_TOKENS, BATCH_BYTES // per_token))
        if self.on_gpu:
            room = memory_budget.ACTIVATIONS * self._budget()
            limit = min(memory_budget.GPU_BATCH_TOKENS, int(room / per_token))
            if len(self.meta_model.devices) > 1:  # so many batches that each device has one to compute
                limit = min(limit, -(-tokens.ids.numel() // (4 * len(self.meta_model.devices))))
        elif logits:
            limit = min(limit, LOGITS_BYTES // (4 * self.vocabulary))
        return max(1, limit // tokens.length)

    def windows_per_head(self, tokens: Tokens) -> int:
        """Return how many windows have room for their logits, in float32 and once more."""
        if not self.on_gpu:
            return len(tokens)
        return max(1, int(memory_budget.LOGITS * self._budget(-1)) // (8 * self.vocabulary * tokens.length))

    def hidden_bytes(self, tokens: Tokens) -> int:
        """Return the bytes of the hidden states of all windows: embeddings are kept too, one batch is held twice."""
        return 3 * tokens.ids.numel() * self._shape.hidden * self._shape.itemsize

    def batch_bytes(self, tokens: Tokens) -> int:
        """Return about how many bytes a batch needs in a layer."""
        return tokens.ids.numel() * self._shape.per_token(tokens.length)

    def fits(self, tokens: Tokens) -> bool:
        """Whether all weights can stay on the first device beside what a run over `tokens` needs."""
        return sum(unit.nbytes for unit in self.meta_model.units.values()) <= self._room_for_weights(tokens, 0)

    def _budget(self, stage: int = 0) -> int:
        """Return the bytes of a GPU's memory this engine may use, including weights that are already loaded."""
        device = self.meta_model.devices[stage]
        others = sum(1 for other in _on_gpus if device in other.meta_model.devices)
        held = self.weights.held(stage % len(self.meta_model.devices))
        free = (memory_budget.free_bytes(device) + held) // max(1, others)
        return min(free, self.memory) if self.memory else free

    def _room_for_weights(self, tokens: Tokens, stage: int) -> int:
        share = 1 - memory_budget.ACTIVATIONS - 2 * memory_budget.LOGITS
        return int(share * self._budget(stage)) - self.hidden_bytes(tokens)

    def models_at_once(self, tokens: Tokens) -> int:
        """Return of how many models the hidden states may be in memory at a time, beside a unit: on the processor,
        where no memory was given, they may take as much as the largest unit."""
        largest = max(unit.nbytes for unit in self.meta_model.units.values())
        if self.on_gpu:
            room = self._room_for_weights(tokens, 0) + self.hidden_bytes(tokens) - 2 * largest
        else:
            room = self.memory - largest if self.memory else max(KEEP_BYTES, largest)
        return max(1, room // self.hidden_bytes(tokens))

    def _share_memory(self, tokens: Tokens, beside: int) -> None:
        """Set how many bytes of weights may stay loaded, next to hidden states, activations and the unit read ahead."""
        if not self._keeps_what_fits:
            return
        others = beside * self.hidden_bytes(tokens)
        for stage in range(len(self.meta_model.devices)):
            sizes = [unit.nbytes for unit in self.meta_model.units.values() if unit.stage == stage]
            if self.on_gpu:
                room = self._room_for_weights(tokens, stage) - others
                if beside:  # they use the unit that was loaded last
                    self.weights.keep[stage] = max(0, min(max(sizes), room - 2 * max(sizes)))
                else:
                    self.weights.keep[stage] = room if sum(sizes) <= room else max(0, room - 2 * max(sizes))
            elif self.memory:
                self.weights.keep[stage] = max(0, self.memory - self.hidden_bytes(tokens) - others - max(sizes))
