"""A mix-in that gives every `transformers.Trainer` an exact balance loss and a selection bias that trains."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from moestro.balance.losses import Convention
from moestro.balance.totals import Layers, StepTotals
from moestro.hf.watch import TransformersLog


class BalancedTrainer:
    """Put it before a Trainer class; works with those of TRL, told not to add the pooled loss themselves.

        class Trainer(moestro.hf.BalancedTrainer, transformers.Trainer): ...

        trainer = Trainer(model, args, train_dataset=data, balance=0.01)

    With TRL: `class Trainer(moestro.hf.BalancedTrainer, trl.SFTTrainer)`, `SFTConfig(router_aux_loss_coef=0.0)`.

    In training the loss becomes `loss + balance * auxiliary_loss`, per layer, without padding, and with gradient
    accumulation exactly that of one big batch: the routing of all micro-batches of a step is counted first, in a
    forward pass without gradient (about a third of a step). `exact=False` saves that pass and balances each
    micro-batch by itself. Evaluation losses stay as they are. Logs gain `balance_loss`, the mean over layers.

    Args:
        balance: coefficient; None = the model's `router_aux_loss_coef`; 0 = no loss, the bias alone.
        balance_convention: see `moestro.balance.LoadTimesProbability`; `transformers` keeps released coefficients.
        balance_layers: `mean` or `sum` of layers, or `pooled`.
        balance_z_loss: coefficient of the router z-loss relative to the balance loss.
        bias_rate: step of the selection bias after every optimiser step; None = leave it alone.
        exact: see above.

    Raises:
        ValueError: a model without mixture layers, or without a bias when asked for one; no coefficient anywhere;
            a model that adds transformers' own pooled loss as well.
    """

    model: Any
    args: Any
    accelerator: Any

    def __init__(
        self,
        *args: Any,
        balance: float | None = None,
        balance_convention: Convention = "transformers",
        balance_layers: Layers = "mean",
        balance_z_loss: float = 0.0,
        bias_rate: float | None = None,
        exact: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.balance = _coefficient(self.model.config, balance, bias_rate)
        self.exact_balance = exact
        self.routing_log = TransformersLog(
            self.model,
            convention=balance_convention,
            layers=balance_layers,
            z_loss=balance_z_loss,
            bias_rate=bias_rate,
        )
        self._totals: StepTotals | None = None
        self._balance_losses: list[Tensor] = []
        if bias_rate is not None:
            self.add_callback(_bias_callback(self.routing_log))  # type: ignore[attr-defined]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the micro-batches of a step, and count their routing."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._totals = None
        several = len(batches) > 1 or self.accelerator.num_processes > 1
        if self.exact_balance and self.balance and several:
            self.model.train()
            passes = (partial(self._look_at, batch) for batch in batches)
            self._totals = self.routing_log.first_pass(passes)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the Trainer below, plus in training the balance loss."""
        below = super().compute_loss  # type: ignore[misc]
        if not model.training:
            return below(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        with self.routing_log.recording():
            loss, outputs = below(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.balance:
            auxiliary = self.routing_log.auxiliary_loss(self._totals)
            self._balance_losses.append(self.routing_log.losses(self._totals)["balance"])
            loss = loss + self.balance * self._scale(num_items_in_batch) * auxiliary.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the Trainer below logs, and the balance loss since the last time."""
        if self._balance_losses and "loss" in logs:
            logs["balance_loss"] = float(sum(self._balance_losses)) / len(self._balance_losses)
            self._balance_losses = []
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _look_at(self, batch: Any) -> None:
        inputs = self._prepare_inputs(batch)  # type: ignore[attr-defined]
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            self.model(**inputs)

    def _scale(self, num_items: Any) -> float:
        """What undoes the division by micro-batches that may follow, or makes the one that will not."""
        steps = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        divided = not self._is_scaled(num_items)
        if self._totals is not None:  # shares add up over micro-batches and ranks; ranks are averaged later
            return float(self.accelerator.num_processes * (steps if divided else 1))
        return 1.0 if divided else 1.0 / steps

    def _is_scaled(self, num_items: Any) -> bool:
        """Whether the Trainer below takes the loss as it is, instead of dividing it by the micro-batches."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        accepts = self.model_accepts_loss_kwargs and num_items is not None  # type: ignore[attr-defined]
        return bool(accepts or self.compute_loss_func is not None)  # type: ignore[attr-defined]


def _coefficient(config: Any, balance: float | None, bias_rate: float | None) -> float:
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits is on, so the model adds transformers' pooled loss as well; set "
            "model.config.output_router_logits = False, or with TRL router_aux_loss_coef=0.0 in its arguments"
        )
    if balance is None:
        balance = 0.0 if bias_rate is not None else getattr(config, "router_aux_loss_coef", None)
    if balance is None:
        raise ValueError(
            f"{config.model_type} has no router_aux_loss_coef; pass balance=0.001 or another coefficient"
        )
    if balance == 0 and bias_rate is None:
        raise ValueError(
            "balance=0 without a bias_rate balances nothing; pass one of them, or use the plain Trainer"
        )
    return balance


def _bias_callback(log: TransformersLog) -> Any:
    from transformers import TrainerCallback

    class UpdateBias(TrainerCallback):
        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            log.update_bias()

    return UpdateBias()
