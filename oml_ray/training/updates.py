"""One update: from the loss of a step to moved parameters, wherever they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oml_ray.learning.ema import WeightAverage
from oml_ray.learning.extractors import Extractor
from oml_ray.learning.learner import Learner
from oml_ray.learning.pair_learner import PairLearner
from oml_ray.learning.sharded_head import ShardedHead
from oml_ray.learning.siamese import PairModel
from oml_ray.training.divergence import not_finite
from oml_ray.training.optimizers import Factor


class Updates:
    """Moves the parameters of a learner: the optimizer's, a sharded head's own, and the average that follows them.

    Attributes:
        head: the criterion's sharded head, or None.
        average: the moving average of the extractor, or None.
    """

    def __init__(
        self,
        learner: Learner | PairLearner,
        optimizer: torch.optim.Optimizer,
        factor: Factor,
        *,
        device: torch.device,
        scale_loss: bool = False,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
    ) -> None:
        """Move `learner`, which is on its device and in its dtype already.

        Args:
            learner: extractor and criterion.
            optimizer: over its parameters.
            factor: of the learning rates at a step.
            device: of the parameters.
            scale_loss: keep small gradients of float16 from vanishing.
            clip_grad_norm: largest L2 norm of the gradient of all parameters, on all ranks; None for no clipping.
            ema_decay: of the moving average; None for no average.
        """
        self.learner, self.optimizer, self.factor, self.clip_grad_norm = learner, optimizer, factor, clip_grad_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale_loss)
        self.head = next((part for part in learner.modules() if isinstance(part, ShardedHead)), None)
        self.average = None if ema_decay is None else WeightAverage(learner.extractor, decay=ema_decay, warmup=True)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]
        # A network may hold infinite constants, such as the mask of an attention.
        self._infinite_constants: frozenset[str] = frozenset()
        self._infinite_constants = frozenset(self.not_finite())

    @property
    def evaluated(self) -> Extractor | PairModel:
        """The extractor to validate and to keep: the average, where there is one."""
        evaluated: Extractor | PairModel = self.learner.extractor if self.average is None else self.average.averaged  # type: ignore[assignment]
        return evaluated

    @property
    def has_gradients(self) -> bool:
        """Return whether any parameter of the optimizer learns now; a sharded head, which moves itself, aside."""
        return any(parameter.requires_grad for parameter in self.learner.parameters())

    def begin(self, step: int) -> None:
        """Prepare for the forward pass of a step, counted from the start of the training."""
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * self.factor(step)
        if self.head is not None:
            self.head.begin_step(step)

    def apply(self, loss: Tensor, step: int) -> dict[str, Tensor]:
        """Compute the gradients of a loss and move the parameters.

        Args:
            loss: scalar of the global batch, with DDP's graph behind it.
            step: as in `begin`.

        Returns:
            Scalars worth logging.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if not self.has_gradients:
            return self._apply_to_head(loss, step)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scale = self.scaler.get_scale()
        if self.head is not None and scale != 1:
            self.head.scale_gradient_(1 / scale)
        logs = {}
        if self.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            logs["grad_norm"] = self._clip(self.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # The scale falls when a gradient overflowed: then nothing has moved, and nothing else must.
        moved = self.scaler.get_scale() >= scale
        if moved and self.head is not None:
            self.head.step(self.factor(step))
        if moved and self.average is not None:
            self.average.update()
        return logs

    def _apply_to_head(self, loss: Tensor, step: int) -> dict[str, Tensor]:
        """Move a sharded head alone, without GradScaler: it refuses to step where no parameter has a gradient."""
        assert self.head is not None
        loss.backward()  # type: ignore[no-untyped-call]
        logs = {} if self.clip_grad_norm is None else {"grad_norm": self._clip(self.clip_grad_norm)}
        self.head.step(self.factor(step))
        if self.average is not None:
            self.average.update()
        return logs

    def _clip(self, largest: float) -> Tensor:
        parameters = list(self.learner.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.head is not None:
            norm = (norm.square() + self.head.gradient_square_sum()).sqrt()
            self.head.scale_gradient_((largest / (norm + 1e-6)).clamp(max=1))  # as clip_grads_with_norm_ does
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint keeps beside the evaluated extractor and the parts of a sharded head."""
        state: dict[str, Any] = {
            "criterion": self.learner.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.average is not None:
            state["raw_extractor"] = dict(self.learner.extractor.state_dict())
            state["num_updates"] = self.average.num_updates
        return state

    def not_finite(self) -> list[str]:
        """Name all weights and buffers with a NaN or an infinity, of what a checkpoint keeps; waits for the device."""
        states = {"": self.learner.state_dict()}
        if self.average is not None:
            states["average."] = self.average.averaged.state_dict()
        if self.head is not None:
            states["sharded_head."] = {"weight": self.head.weight}
        tensors = {
            f"{prefix}{name}": tensor
            for prefix, state in states.items()
            for name, tensor in state.items()
            if isinstance(tensor, Tensor)
        }
        return [name for name in not_finite(tensors) if name not in self._infinite_constants]

    def load_state_dict(
        self, state: dict[str, Any], evaluated: dict[str, Tensor], *, with_optimizer: bool = True
    ) -> None:
        """Continue from what `state_dict` gave and the state of the evaluated extractor.

        The present rates and options of the optimizer stay: they may have changed since.

        Args:
            state: of the training.
            evaluated: of the evaluated extractor.
            with_optimizer: whether the optimizer goes on with its old state.

        Raises:
            RuntimeError, ValueError, KeyError: they are of another architecture.
        """
        self.learner.extractor.load_state_dict(evaluated if self.average is None else state["raw_extractor"])
        if self.average is not None:
            self.average.load_state_dict({"num_updates": state["num_updates"], "averaged": evaluated})
        self.learner.criterion.load_state_dict(state["criterion"])
        if with_optimizer:
            options = [
                {name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups
            ]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, present in zip(self.optimizer.param_groups, options, strict=True):
                group.update(present)
        if state["scaler"]:  # which no other precision than float16 has
            self.scaler.load_state_dict(state["scaler"])
