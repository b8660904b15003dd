"""A small LSTM that learns from the history of loads how they go on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from moestro.parallel.loads import Load, load_shares


def lstm(
    history: Load, horizon: int, window: int = 10, hidden: int = 32, epochs: int = 100, seed: int = 0
) -> np.ndarray:
    """The next step as a learned function of the last `window` steps of all experts, rolled forward.

        z[t + 1] = W LSTM(z[t - window + 1 .. t]),   z = shares less their mean, over their standard deviation

    Cong et al. 2024, who say nothing of its sizes; those here are ours. W begins at zero, hence the forecast at the
    mean of the history; Adam on all windows at once. On one machine history and seed decide it.

    Args:
        history: `[steps, experts]`.
        horizon: steps to foresee; forecasts enter the window.
        window: steps looked back upon.
        hidden: of the LSTM.
        epochs: steps of Adam.
        seed: of its first weights.

    Shapes: -> `[horizon, experts]`.

    Raises:
        ValueError: fewer than `2 * window` steps, or sizes below 1.
    """
    shares = load_shares(history)
    if min(window, hidden, epochs) < 1 or len(shares) < 2 * window:
        raise ValueError(f"{len(shares)} steps are too few for window={window}; pass at least {2 * window}")
    mean, spread = shares.mean(0), np.maximum(shares.std(0), 1e-6)
    series = torch.from_numpy((shares - mean) / spread).float()
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(series.shape[1], hidden)
        _learn(network, series, window, epochs)
    forecast = _rolled(network, series[-window:], horizon).double().numpy() * spread + mean
    forecast = np.clip(forecast, 0, 1)
    return forecast / np.maximum(forecast.sum(1, keepdims=True), 1e-300)


class _Network(nn.Module):
    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.memory = nn.LSTM(experts, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, experts)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, windows: Tensor) -> Tensor:
        """The step after each window. Shapes: `[windows, steps, experts]` -> `[windows, experts]`."""
        step: Tensor = self.readout(self.memory(windows)[0][:, -1])
        return step


def _learn(network: _Network, series: Tensor, window: int, epochs: int) -> None:
    windows = series.unfold(0, window, 1)[:-1].transpose(1, 2).contiguous()  # [windows, steps, experts]
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(epochs):
        optimiser.zero_grad()
        (network(windows) - series[window:]).square().mean().backward()
        optimiser.step()


@torch.no_grad()
def _rolled(network: _Network, recent: Tensor, horizon: int) -> Tensor:
    steps = [recent.new_zeros(0, recent.shape[1])]
    for _ in range(horizon):
        step = network(recent.unsqueeze(0))
        steps.append(step)
        recent = torch.cat([recent[1:], step])
    return torch.cat(steps)
