"""What the engine wraps: one module that holds every model of the step and returns the loss of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.nn import Module, ModuleDict

from diffsynth_pipe.contracts import module_of
from diffsynth_pipe.training.sources import collate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from diffsynth_pipe.contracts import Batch, Draws, ModelFamily, NoiseLevels, TrainingTask
    from diffsynth_pipe.graph import Cut
    from diffsynth_pipe.training.templates import TemplateInjection


class LossModule(Module):
    """The models after the cut, behind one ``forward``.

    DDP and DeepSpeed wrap a single module and follow its ``forward`` alone, however many models there are and however
    often a task calls them.

    Args:
        family: Calls the denoiser.
        task: Computes the loss.
        components: The loaded models after the cut by their names; ``dit`` among them.
        levels: The distribution of noise levels.
        split: Its live units run in every step; None if there are none.
        template: Lets a template model act on the denoiser; None if there is none.
    """

    def __init__(
        self,
        family: ModelFamily,
        task: TrainingTask,
        components: Mapping[str, Any],
        levels: NoiseLevels,
        split: Cut | None = None,
        template: TemplateInjection | None = None,
    ) -> None:
        super().__init__()
        self.models = ModuleDict({name: module_of(component) for name, component in components.items()})
        self._components = components
        self._family = family
        self._task = task
        self._levels = levels
        self._live = split.live if split else ()
        self._columns = split.columns if split else ()
        self.template = template

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Return one loss per sample, fp32 ``[batch]``."""
        if self._live:
            batch = self._encode(batch)
        if self.template is not None:
            self.template(batch)
        return self._task.loss(self._family, dict(self.models.items()), batch, draws, self._levels)

    def _encode(self, batch: Batch) -> Batch:
        """Add what the live units make of each sample, with gradients."""
        records = []
        for index in range(len(batch.sample_ids)):
            values: dict[str, Any] = {
                name: field[index, : batch.lengths[name][index]] if name in batch.lengths else field[index]
                for name, field in batch.fields.items()
            }
            values |= {name: bytes(values[name].flatten().tolist()[:-1]).decode() for name in self._columns}
            for unit in self._live:
                values |= unit.encode(self._components, {name: values[name] for name in unit.inputs})
            records.append(values)
        made = collate([spec for unit in self._live for spec in unit.outputs], records)
        return replace(batch, fields={**batch.fields, **made[0]}, lengths={**batch.lengths, **made[1]})
