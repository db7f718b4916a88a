"""When to look: at which calls an undesired prediction is evaluated, and at which the last one stands in for it.

One look costs one evaluation of the model. Between two looks the last difference Delta = D_neg - D_ref is held: it is
what pushes, and the jump from the last look to the present call moves the posterior by the closed form of the reverse
kernel, whose step may be of any size. So an image that turns to the undesired between two looks wakes by itself. At
the next look the jump over all calls since is counted once, from look to look; no jump starts from a held call. Two
other forms were measured beside it (docs/samplers.md, "Looking less often"): a posterior that stays as it is between
looks forgets evidence, and one that takes the sampler's own steps with the old Delta, from the references that are
known at every call, finds less evidence where Delta grows.

A look can wait for two reasons, decided for each image from its last look:

- **Quiet**: max(tau, lambda) |Delta| / sigma is small. Over one unit of log sigma the evidence has the variance
  2 tau^2 |Delta|^2 / sigma^2 or less, and the push moves the estimate by lambda |Delta|, which the sampler sees in
  units of sigma. At high noise both are next to nothing, and so they are once an image shows all of the undesired.
- **Asleep**: p(c-|x) is small. Along the reference's own chain p is a martingale, so that it climbs from p to c with a
  chance of p / c at most (Ville). Under classifier-free guidance and on deterministic samplers the bound is a rule of
  thumb, and so nothing is held for longer than a few calls.

An undesired prediction is evaluated where one image of the batch needs it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .settings import check, check_numbers

EconomyName = Literal["off", "auto"]


@dataclass(frozen=True)
class Economy:
    """When an undesired prediction is evaluated. An invalid value raises ValueError; the default is at every call.

    Parameters
    ----------
    asleep: an image whose posterior is below this sleeps, in [0, 1]; at 1 every image always does.
    quiet: an image is quiet where max(tau, lambda) |Delta| / sigma is not above this, in nats; at least 0.
    longest: from one look to the next it takes this many calls at most, at least 1.
    """

    asleep: float = 0.0
    quiet: float = 0.0
    longest: int = 1

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "asleep", 0 <= self.asleep <= 1, "between 0 and 1")
        check(self, "quiet", 0 <= self.quiet < math.inf, "at least 0 and finite")
        check(self, "longest", isinstance(self.longest, int) and self.longest >= 1, "a whole number of at least 1")

    @classmethod
    def every(cls, calls: int) -> "Economy":
        """A look at every ``calls``-th call, whatever the images show."""
        return cls(asleep=1.0, longest=calls)

    @property
    def off(self) -> bool:
        """Whether every call is looked at."""
        return self.longest == 1


ECONOMIES: dict[EconomyName, Economy] = {
    "off": Economy(),
    # Chosen on the oracle with seed 1, and reported with seed 2 (docs/samplers.md, "Looking less often").
    "auto": Economy(asleep=1e-3, quiet=0.3, longest=8),
}
"""The policies by the names that nodes give them."""


class Watch:
    """The looks at one concept along one run: what the last one showed, and whether it still stands.

    ``made`` and ``spared``: how many undesired predictions were evaluated, and how many calls did without one.
    """

    def __init__(self, economy: Economy) -> None:
        self._economy = economy
        self._difference: Tensor | None = None
        self._length: Tensor | None = None
        self._sigma = 0.0
        self._calls = 0
        self._unrest: Arriving | None = None
        self.made = 0
        self.spared = 0

    def due(self, sigma: float) -> bool:
        """Whether the prediction is to be evaluated at the call at ``sigma``. It waits for no work of its device.

        True also where nothing was seen yet, and where the sampler went back to more noise.
        """
        if self._difference is None or sigma > self._sigma or self._calls >= self._economy.longest:
            return True
        if self._economy.asleep == 1:
            return False
        return self._unrest is None or not self._unrest.value() <= self._economy.quiet * sigma

    def looked(self, sigma: float, negative: Tensor, reference: Tensor) -> None:
        """A prediction was evaluated; both are (batch, ...), in float32 or better."""
        self.made += 1
        if not self._economy.off:
            self._difference, self._sigma, self._calls, self._length = negative - reference, sigma, 1, None

    def held(self) -> Tensor:
        """The difference that stands in at a call that is not looked at, (batch, ...)."""
        if self._difference is None:
            raise ValueError("an undesired prediction cannot be held before it was evaluated once")
        self.spared += 1
        self._calls += 1
        return self._difference

    def forget(self) -> None:
        """The concept does not apply at this call: what was seen before it does not stand for what comes after."""
        self._difference = self._unrest = None

    def note(self, log_p: Tensor, scale: Tensor, temperature: float) -> None:
        """What the call found, (batch,) each: by this and the last look the next call is decided."""
        if self._economy.off or self._economy.asleep == 1 or self._difference is None:
            return
        if self._length is None:
            self._length = torch.linalg.vector_norm(self._difference.flatten(1), dim=1)
        unrest = scale.clamp(min=temperature) * self._length
        if self._economy.asleep > 0:
            unrest = unrest.masked_fill(log_p < math.log(self._economy.asleep), 0.0)
        self._unrest = Arriving(unrest.amax())


class Arriving:
    """A number on its way from its device to the host, without the device being waited for when it is sent.

    On CUDA the copy goes into pinned memory, and an event marks its end. ComfyUI's sampling reads each call's noise
    level from the device before a forward pass, and by then the copy has arrived. Elsewhere the copy is made at once.
    """

    def __init__(self, number: Tensor) -> None:
        self._event = None
        if number.device.type == "cuda":
            self._host = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = number.detach().cpu()

    def value(self) -> float:
        """The number; waits where it has not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
