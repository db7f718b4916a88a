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

An undesired prediction is evaluated for the images that need it where the model takes a part of a batch, and else for
all images where one needs it. Where some images are evaluated, the others go on with the difference that was held for
them as if it had been seen there: their posterior then moves from call to call, not from look to look.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .kernels import on_device
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

    ``made`` and ``spared``: how many undesired predictions of single images were evaluated, and how many were not.
    """

    def __init__(self, economy: Economy) -> None:
        self._economy = economy
        self._difference: Tensor | None = None
        self._length: Tensor | None = None
        self._sigma = 0.0
        self._calls: list[int] = []  # since each image was last evaluated, with the call that evaluated it
        self._unrest: Arriving | None = None
        self.made = 0
        self.spared = 0

    def awake(self, sigma: float) -> list[int] | None:
        """The images whose prediction is to be evaluated at the call at ``sigma``, by their places in the batch.

        None for all: where nothing was seen yet, where the sampler went back to more noise, and where each image needs
        it. No work of the device is waited for.
        """
        if self._difference is None or sigma > self._sigma or self._economy.off:
            return None
        late = [calls >= self._economy.longest for calls in self._calls]
        if self._economy.asleep < 1:
            if self._unrest is None:
                return None
            most = self._economy.quiet * sigma
            late = [waited or not unrest <= most for waited, unrest in zip(late, self._unrest.values(), strict=True)]
        return None if all(late) else [i for i, due in enumerate(late) if due]

    def looked(self, sigma: float, negative: Tensor, reference: Tensor, rows: Sequence[int] | None = None) -> None:
        """A prediction was evaluated; both are (batch, ...), in float32 or better.

        ``rows``: the images that were evaluated; None for all. The predictions of the others are :meth:`completed`.
        """
        count = len(negative)
        evaluated = range(count) if rows is None else rows
        self.made += len(evaluated)
        self.spared += count - len(evaluated)
        if not self._economy.off:
            since = [calls + 1 for calls in self._calls] if rows is not None else [1] * count
            for row in evaluated:
                since[row] = 1
            self._difference, self._sigma, self._calls, self._length = negative - reference, sigma, since, None

    def completed(self, some: Tensor, index: Tensor, reference: Tensor) -> Tensor:
        """The predictions of all images, (batch, ...), from those of the images ``index`` (long), in that order.

        The difference of each other image is the held one.
        """
        return (reference + self._known()).index_copy(0, index, some)

    def held(self) -> Tensor:
        """The difference that stands in at a call that is not looked at, (batch, ...)."""
        difference = self._known()
        self.spared += len(difference)
        self._calls = [calls + 1 for calls in self._calls]
        return difference

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
        self._unrest = Arriving(unrest)

    def _known(self) -> Tensor:
        if self._difference is None:
            raise ValueError("an undesired prediction cannot be held before it was evaluated once")
        return self._difference


class Arriving:
    """Numbers, (n,), on their way from their device to the host. When they are sent, the device is not waited for.

    On CUDA the copy goes into pinned memory, and an event marks its end. ComfyUI's sampling reads each call's noise
    level from the device before a forward pass, and by then the copy has arrived. Elsewhere the copy is made at once.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = numbers.detach().cpu()

    def values(self) -> list[float]:
        """The numbers; waits where they have not arrived."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


def places(rows: Sequence[int], device: torch.device) -> Tensor:
    """The places of images in a batch, (n,) long, on a device, which is not waited for."""
    return on_device(torch.tensor(rows, dtype=torch.long), device)
