"""What the engine wraps: one module that holds every model of the step and returns the loss of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.nn import Module, ModuleDict

from diffsynth_pipe.contracts import Turn, module_of
from diffsynth_pipe.training.sources import collate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from diffsynth_pipe.contracts import Batch, Draws, ModelFamily, NoiseLevels, Objective, TrainingTask
    from diffsynth_pipe.graph import Cut
    from diffsynth_pipe.training.templates import TemplateInjection


class OneLoss:
    """The objective of a task that minimises one loss in every step; see ``Objective``.

    Args:
        family: Calls the denoiser.
        task: Computes the loss.
        levels: The distribution of noise levels.
        max_grad_norm: Gradients above this global norm are scaled.
    """

    def __init__(self, family: ModelFamily, task: TrainingTask, levels: NoiseLevels, max_grad_norm: float) -> None:
        self.turns: tuple[Turn, ...] = (Turn(name="train", max_grad_norm=max_grad_norm),)
        self.learning_rates: Mapping[str, float] = {}
        self.needs_empty_caption = False
        self.empty_caption: Batch | None = None
        self.lineage: Mapping[str, object] = {}
        self._family = family
        self._task = task
        self._levels = levels

    def helpers(self, dit: Module) -> Mapping[str, Module]:  # noqa: ARG002 - the run's models are all
        """Return nothing."""
        return {}

    def loss(self, models: Mapping[str, Module], batch: Batch, draws: Draws, turn: Turn | None) -> Tensor:  # noqa: ARG002
        """Return the task's loss, in training and in validation."""
        return self._task.loss(self._family, models, batch, draws, self._levels)


class LossModule(Module):
    """The models after the cut, behind one ``forward``.

    DDP and DeepSpeed wrap a single module and follow its ``forward`` alone, however many models there are and however
    often a task calls them.

    Args:
        objective: Computes the loss.
        components: The loaded models after the cut by their names, ``dit`` among them, and the objective's helpers.
        split: Its live units run in every step; None if there are none.
        template: Lets a template model act on the denoiser; None if there is none.
    """

    def __init__(
        self,
        objective: Objective,
        components: Mapping[str, Any],
        split: Cut | None = None,
        template: TemplateInjection | None = None,
    ) -> None:
        super().__init__()
        self.models = ModuleDict({name: module_of(component) for name, component in components.items()})
        self._components = components
        self._objective = objective
        self._live = split.live if split else ()
        self._columns = split.columns if split else ()
        self.template = template

    def forward(self, batch: Batch, draws: Draws, turn: Turn | None = None) -> Tensor:
        """Return one loss per sample, fp32 ``[batch]``; without a turn that of a validation."""
        if self._live:
            batch = self._encode(batch)
        if self.template is not None:
            self.template(batch)
        return self._objective.loss(dict(self.models.items()), batch, draws, turn)

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
