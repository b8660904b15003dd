"""A two-dimensional LSTM, and the density of images that it gives with an MCGSM on top."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moestro.mixtures.torch.mcgsm import MCGSM


class SpatialLSTM(nn.Module):
    """An LSTM over the pixels of an image that remembers what is above and to the left.

        (g, o, i, f_r, f_c) = (tanh, σ, σ, σ, σ)(A [x_ij; h_{i,j-1}; h_{i-1,j}] + b)
        c_ij = g i + c_{i,j-1} f_c + c_{i-1,j} f_r,   h_ij = tanh(c_ij o)        Theis & Bethge 2015, eqs. 6-8

    The tanh is outside of the product with the output gate, unlike in most LSTMs. States are 0 outside of the
    image. Pixels of an anti-diagonal are computed at once: `rows + columns - 1` steps, not `rows * columns`.

    Args:
        width: inputs per pixel.
        hidden: size of the state.

    Shapes: x `[batch, rows, columns, width]` -> h `[batch, rows, columns, hidden]`.
    """

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.hidden = hidden
        self.cell = nn.Linear(width + 2 * hidden, 5 * hidden)
        nn.init.uniform_(self.cell.weight, -0.08, 0.08)
        nn.init.uniform_(self.cell.bias, -0.08, 0.08)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, _ = x.shape
        row = torch.arange(rows, device=x.device)
        c = h = x.new_zeros(batch, rows, self.hidden)  # of the diagonal before, by row
        diagonals = []
        for step in range(rows + columns - 1):
            column = step - row
            inside = ((column >= 0) & (column < columns)).unsqueeze(1)
            here = x[:, row, column.clamp(0, columns - 1)]
            c, h = self._step(here, c, h, _from_above(c), _from_above(h))
            c, h = c * inside, h * inside
            diagonals.append(h)
        return torch.stack(diagonals, 1)[:, row.unsqueeze(1) + torch.arange(columns, device=x.device), row[:, None]]

    def _step(self, x: Tensor, c_left: Tensor, h_left: Tensor, c_up: Tensor, h_up: Tensor) -> tuple[Tensor, Tensor]:
        g, o, i, keep_up, keep_left = self.cell(torch.cat([x, h_left, h_up], -1)).chunk(5, -1)
        c = g.tanh() * i.sigmoid() + c_left * keep_left.sigmoid() + c_up * keep_up.sigmoid()
        return c, (c * o.sigmoid()).tanh()


def _from_above(state: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(state[:, :1]), state[:, :-1]], 1)


def causal_neighbourhood(images: Tensor, size: int) -> Tensor:
    """What lies above and to the left of every pixel in a square window around it, 0 outside of the image.

    Of a window of size 5 that is two rows of five pixels above and two pixels on the left.
    Shapes: images `[batch, rows, columns, channels]` -> `[batch, rows, columns, (size² - 1) / 2 * channels]`.
    """
    reach = size // 2
    batch, rows, columns = images.shape[:3]
    padded = nn.functional.pad(images, (0, 0, reach, reach, reach, 0))
    seen = [(i, j) for i in range(reach + 1) for j in range(size) if (i, j) < (reach, reach)]
    if not seen:
        return images.new_zeros(batch, rows, columns, 0)
    return torch.cat([padded[:, i : i + rows, j : j + columns] for i, j in seen], -1)


class RecurrentImageDensity(nn.Module):
    """The density of an image, pixel by pixel: spatial LSTMs read what came before, an MCGSM says what comes.

        p(image) = prod_ij p(pixel_ij | h_ij)        Theis & Bethge 2015 (RIDE), eqs. 1 and 9

    Args:
        channels: numbers per pixel.
        hidden: size of a state.
        num_layers: spatial LSTMs, each reading the states of the one below.
        neighbourhood: size of the causal window that the first one reads, odd.
        num_components, num_scales, num_features: of the MCGSM.

    Shapes: images `[batch, rows, columns, channels]`, dequantised to real numbers (`dequantise`).

    Raises:
        ValueError: an even window, or no layer.
    """

    def __init__(
        self,
        channels: int = 1,
        hidden: int = 64,
        num_layers: int = 1,
        neighbourhood: int = 5,
        num_components: int = 32,
        num_scales: int = 4,
        num_features: int = 32,
    ) -> None:
        super().__init__()
        if neighbourhood % 2 == 0 or neighbourhood < 1 or num_layers < 1:
            raise ValueError(f"neighbourhood={neighbourhood} must be odd and num_layers={num_layers} at least 1")
        self.neighbourhood = neighbourhood
        widths = [(neighbourhood**2 - 1) // 2 * channels] + [hidden] * (num_layers - 1)
        self.layers = nn.ModuleList(SpatialLSTM(width, hidden) for width in widths)
        self.density = MCGSM(hidden, channels, num_components, num_scales, num_features)

    def states(self, images: Tensor) -> Tensor:
        """What is known of each pixel before it is seen, `[batch, rows, columns, hidden]`."""
        h = causal_neighbourhood(images, self.neighbourhood)
        for layer in self.layers:
            h = layer(h)
        return h

    def forward(self, images: Tensor) -> Tensor:
        """`log p(pixel | pixels before)`, `[batch, rows, columns]`."""
        h = self.states(images)
        flat = self.density(h.flatten(0, 2), images.flatten(0, 2))
        return flat.view(images.shape[:-1])

    def bits_per_number(self, images: Tensor) -> Tensor:
        """Mean of `-log2 p` per pixel and channel; for pixels in units of a 256th add 8."""
        bits: Tensor = -self(images).mean() / (images.shape[-1] * math.log(2))
        return bits

    def ensemble_log_prob(self, images: Tensor) -> Tensor:
        """`log p(image)` by the mean density of the eight flips and transposes, `[batch]`."""
        turned = [images, images.flip(1), images.flip(2), images.flip(1, 2)]
        turned += [image.transpose(1, 2) for image in turned]
        each = torch.stack([self(image).sum((1, 2)) for image in turned])
        return each.logsumexp(0) - math.log(len(turned))

    @torch.no_grad()
    def sample(self, batch: int, rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
        """Images drawn pixel by pixel, `[batch, rows, columns, channels]`; computes the states anew for each."""
        like = self.density.factor
        images = like.new_zeros(batch, rows, columns, like.shape[1])
        for i in range(rows):
            for j in range(columns):
                h = self.states(images[:, : i + 1])[:, i, j]
                images[:, i, j] = self.density.sample(h, generator)
        return images


def dequantise(pixels: Tensor, levels: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """Integers 0 to levels - 1 spread evenly over [0, 1), so that a density of them is finite."""
    noise = torch.rand(pixels.shape, generator=generator, device=pixels.device)
    return (pixels + noise) / levels
