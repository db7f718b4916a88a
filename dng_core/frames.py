"""Noise frames: how the states and noise levels of a model or sampler become those of the mathematics.

Everything in this library is computed in the variance-exploding (VE) frame, x = x_0 + sigma n. States in another frame
are turned into it where they come in, and turned back where they go out; nothing in between knows of frames.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseFrame:
    """The frame in which a sampler holds its states.

    ``kind``

    - "ve": state x, level sigma (k-diffusion and ComfyUI for epsilon, v and EDM models).
    - "vp": state x / sqrt(1 + sigma^2), level sigma (DDPM's own states).
    - "flow": state (1 - t) x_0 + t k n, level t in (0, 1], with k the ``noise_scale`` (rectified flow; ComfyUI's
      CONST). Then x = state / (1 - t) and sigma = k t / (1 - t), infinite at t = 1.
    """

    kind: Literal["ve", "vp", "flow"] = "ve"
    noise_scale: float = 1.0

    def sigma(self, level: float) -> float:
        """The VE noise level of ``level``; infinite for a flow at t = 1."""
        if self.kind == "flow":
            return self.noise_scale * level / (1 - level) if level < 1 else math.inf
        return level

    def to_ve(self, state: Tensor, level: float) -> Tensor:
        """The VE state of ``state``, (batch, ...); ``state`` itself in the VE frame.

        A flow at t = 1 is pure noise of infinite variance. Its VE state is given as 0: a jump from there has the
        ratio r = 0, so that the state does not count.
        """
        if self.kind == "ve":
            return state
        scale = self._scale(level)
        return torch.zeros_like(state) if math.isinf(scale) else scale * state

    def from_ve(self, x: Tensor, level: float) -> Tensor:
        """The state of a VE state, (batch, ...), at a finite noise level: the inverse of :meth:`to_ve`."""
        return x if self.kind == "ve" else x / self._scale(level)

    def _scale(self, level: float) -> float:
        """The factor that takes a state at ``level`` into the VE frame; infinite for a flow at t = 1."""
        if self.kind == "flow":
            return 1 / (1 - level) if level < 1 else math.inf
        return math.sqrt(1 + level**2) if self.kind == "vp" else 1.0


VE = NoiseFrame("ve")
VP = NoiseFrame("vp")
