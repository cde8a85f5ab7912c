"""What the engine wraps: one module that holds every model of the step and returns the loss of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import Module, ModuleDict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from diffsynth_pipe.contracts import Batch, Draws, ModelFamily, TrainingTask


class LossModule(Module):
    """The models after the cut, behind one ``forward``.

    DDP and DeepSpeed wrap a single module and follow its ``forward`` alone, however many models there are and however
    often a task calls them.

    Args:
        family: Calls the denoiser.
        task: Computes the loss.
        models: The models by their component names; ``dit`` among them.
    """

    def __init__(self, family: ModelFamily, task: TrainingTask, models: Mapping[str, Module]) -> None:
        super().__init__()
        self.models = ModuleDict(models)
        self._family = family
        self._task = task

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Return one loss per sample, fp32 ``[batch]``."""
        return self._task.loss(self._family, dict(self.models.items()), batch, draws)
