"""A Gaussian mixture under noise, where every denoiser and posterior has a closed form: the truth to test against."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """p(x_0) = sum_k weight_k N(mean_k, std^2 I), and under VE noise N(mean_k, (std^2 + sigma^2) I).

    Parameters
    ----------
    means: (components, ...) of any latent shape.
    std: of every component, above 0.
    weights: (components,), above 0, summing to 1.
    """

    means: Tensor
    std: float
    weights: Tensor

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ValueError(f"std must be above 0; it is {self.std}")
        if self.weights.shape != self.means.shape[:1] or bool((self.weights <= 0).any()):
            raise ValueError("weights must hold one value above 0 for each component")

    @classmethod
    def random(cls, components: int, shape: Sequence[int], std: float = 0.2, seed: int = 0) -> "GaussianMixture":
        """Equally likely components with standard normal means of the given latent ``shape``."""
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(components, *shape, generator=generator)
        return cls(means, std, torch.full((components,), 1 / components))

    @classmethod
    def attributes(
        cls, values: int, shape: Sequence[int], std: float = 0.2, seed: int = 0, weights: Tensor | None = None
    ) -> "GaussianMixture":
        """Two attributes, A and B, of ``values`` values each: a component for each pair, see :func:`with_attributes`.

        A fixes the first half of a latent's elements, B the second, with standard normal means. ``weights``: (values,
        values), P(A, B); all pairs are equally likely if None, and A and B then independent at every noise level.
        """
        generator = torch.Generator().manual_seed(seed)
        half = math.prod(shape) // 2
        a = torch.randn(values, half, generator=generator).repeat_interleave(values, dim=0)
        b = torch.randn(values, math.prod(shape) - half, generator=generator).repeat(values, 1)
        if weights is None:
            weights = torch.full((values, values), 1 / values**2)
        return cls(torch.cat([a, b], dim=1).reshape(-1, *shape), std, weights.flatten())

    @classmethod
    def topics(
        cls, topics: int, components: int, shape: Sequence[int], distance: float, std: float = 0.2, seed: int = 0
    ) -> "GaussianMixture":
        """``components`` equally likely components, dealt in order to ``topics`` groups that lie far apart.

        Within a topic the means are standard normal around a centre, and the centres ``distance`` from one another.
        """
        if components % topics:
            raise ValueError(f"{components} components cannot be dealt evenly to {topics} topics")
        generator = torch.Generator().manual_seed(seed)
        around = torch.randn(components, *shape, generator=generator)
        directions, _ = torch.linalg.qr(torch.randn(math.prod(shape), topics, generator=generator))
        centres = directions.T.reshape(topics, *shape) * distance / math.sqrt(2)
        means = around + centres.repeat_interleave(components // topics, dim=0)
        return cls(means, std, torch.full((components,), 1 / components))

    def log_responsibilities(self, x: Tensor, sigma: float, components: Sequence[int] | None = None) -> Tensor:
        """log p(component | x) at noise ``sigma``, (batch, components), among ``components`` only (all if None)."""
        means, weights = self._on(x)
        squared = (x[:, None] - means).flatten(2).square().sum(dim=2)
        logits = weights.log() - squared / (2 * (self.std**2 + sigma**2))
        if components is not None:
            outside = torch.ones(len(weights), dtype=torch.bool, device=x.device)
            outside[list(components)] = False
            logits = logits.masked_fill(outside, -torch.inf)
        return logits.log_softmax(dim=1)

    def denoised(self, x: Tensor, sigma: float, components: Sequence[int] | None = None) -> Tensor:
        """E[x_0 | x], for x_0 from ``components`` only (all if None); x is (batch, ...), a VE state."""
        means, _ = self._on(x)
        mean = torch.tensordot(self.log_responsibilities(x, sigma, components).exp(), means, dims=1)
        shrink = self.std**2 / (self.std**2 + sigma**2)
        return mean + shrink * (x - mean)

    def log_posterior(
        self, x: Tensor, sigma: float, components: Sequence[int], given: Sequence[int] | None = None
    ) -> Tensor:
        """log p(x_0 from ``components`` | x, x_0 from ``given``), (batch,), at noise ``sigma``."""
        return self.log_responsibilities(x, sigma, given)[:, list(components)].logsumexp(dim=1)

    def classify(self, x: Tensor) -> Tensor:
        """The most likely component of each noiseless sample, (batch,)."""
        return self.log_responsibilities(x, 0.0).argmax(dim=1)

    def distance(self, x: Tensor) -> Tensor:
        """Euclidean distance of each sample to its nearest component mean, (batch,)."""
        return (x[:, None] - self._on(x)[0]).flatten(2).norm(dim=2).amin(dim=1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, ...) noiseless samples."""
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.means.shape[1:], generator=generator, dtype=self.means.dtype)
        return self.means[index] + self.std * noise

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.means.to(x), self.weights.to(x)


def with_attributes(values: int, a: int | None = None, b: int | None = None) -> list[int]:
    """The components of :meth:`GaussianMixture.attributes` that have value ``a`` of A and ``b`` of B (None: any)."""
    return [i * values + j for i in range(values) for j in range(values) if a in (None, i) and b in (None, j)]
