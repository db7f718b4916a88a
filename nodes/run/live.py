"""The live chart: what guidance does, sent to the front end while a run goes on.

Nothing is sent, copied or computed unless a browser (or another client of ComfyUI's WebSocket) waits for the run.
"""

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dng_core.guidance import NegativeGuidance, looks_along, tracked

EVENT = "dynamic_negative_guidance.chart"
INTERVAL = 0.2
"""Seconds from one update to the next."""

MAX_LINES = 16
"""Images that get a line each; of larger batches the quantiles are drawn."""

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

BUFFERED_STEPS = 64
"""Steps copied to the host at once; the others wait for the next update."""


@dataclass(frozen=True)
class Listener:
    """Who waits for the run that ComfyUI executes now: a client, and the node of its workflow to draw on."""

    server: Any
    client: str
    node: str
    workflow: str | None

    @property
    def connected(self) -> bool:
        return self.client in self.server.sockets

    def send(self, message: dict[str, Any]) -> None:
        message = {"node": self.node, "workflow": self.workflow, **message}
        self.server.send_sync(EVENT, message, self.client)


def current_listener() -> Listener | None:
    """The listener to the run that begins now; None in a headless one, and where there is no server at all."""
    # Not imported: a script that uses the nodes without ComfyUI's server must not load it for this.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None or server.client_id is None or server.last_node_id is None:
        return None
    running, _ = server.prompt_queue.get_current_queue_volatile()
    workflow = None
    for _, _, _, extra_data, *_ in running:
        workflow = ((extra_data.get("extra_pnginfo") or {}).get("workflow") or {}).get("id")
    return Listener(server, server.client_id, server.last_node_id, workflow)


class LiveChart:
    """Sends the posterior and scale of one run, at most five times a second.

    No update waits for the device. On a GPU each update starts a copy into pinned memory, and a later one sends what
    has arrived; on the CPU there is nothing to wait for; on other devices, which do not tell when a copy is done, the
    chart comes at the end of the run.

    Parameters
    ----------
    guidance: the run's guidance.
    steps: how many steps the run will have; None if its sampler decides that as it goes.
    listener: who gets the updates.
    """

    def __init__(self, guidance: NegativeGuidance, steps: int | None, listener: Listener) -> None:
        self._guidance = guidance
        self._steps = steps
        self._listener = listener
        self._sent: list[Tensor] = []  # log p of the first concept at each step
        self._due = 0.0
        self._began = 0.0
        self._seconds = 0.0
        self._buffer: Tensor | None = None
        self._copy: tuple[int, Tensor, torch.cuda.Event] | None = None

    def update(self) -> None:
        """Send what is new and has arrived, and start copying what is newer. Called after each model call."""
        self._began = time.perf_counter()
        self._update()
        self._seconds += time.perf_counter() - self._began

    def _update(self) -> None:
        if self._copy is not None:
            start, values, event = self._copy
            if not event.query():
                return
            self._copy = None
            self._send(start, values)
        now = time.monotonic()
        if now < self._due or not self._listener.connected:
            return
        self._due = now + INTERVAL
        start, values = self._new_steps()
        if values.device.type == "cpu":
            self._send(start, values)
        elif values.device.type == "cuda":
            if self._buffer is None:
                self._buffer = torch.empty(BUFFERED_STEPS, *values.shape[1:], pin_memory=True)
            host = self._buffer[: len(values)]
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copy = start, host, event

    def finish(self) -> None:
        """Send the whole chart once more, as it is at the end of the run. Waits for the device."""
        if not self._listener.connected:
            return
        self._began = time.perf_counter()
        trace = self._guidance.trace()
        self._send(0, torch.stack([trace.posterior, trace.scale], dim=1), done=True)

    def _new_steps(self) -> tuple[int, Tensor]:
        """The first step that is new or has changed since, and the (steps, 2, concepts, batch) values from there."""
        paths, sent = self._guidance.paths, self._sent
        known = [point.log_p for point in paths[0].points]
        while sent and (len(sent) > len(known) or sent[-1] is not known[len(sent) - 1]):
            sent.pop()  # a sampler that steps back, or rejects a step, takes its points back
        start = len(sent)
        span = slice(start, start + BUFFERED_STEPS)
        if not known[span]:
            return start, torch.zeros(0)
        sent += known[span]
        return start, torch.stack(tracked(paths, self._guidance.settings, span), dim=1).float()

    def _send(self, start: int, values: Tensor, done: bool = False) -> None:
        """Send (steps, 2, concepts, batch) values, which follow ``start`` steps sent before."""
        if not len(values):
            return
        images = values.shape[-1]
        if images > MAX_LINES:
            values = values.quantile(torch.tensor(QUANTILES, dtype=values.dtype), dim=-1).movedim(0, -1)
        posterior, scale = values.unbind(1)
        self._listener.send(
            {
                "start": start,
                "steps": self._steps,
                "images": images,
                "posterior": rounded(posterior.tolist()),
                "scale": rounded(scale.tolist()),
                "looked": looks_along(self._guidance.paths, slice(start, start + len(values))),
                "done": done,
                "seconds": self._seconds + time.perf_counter() - self._began,  # that the run spent here
            }
        )


def rounded(values: list | float) -> list | float | None:
    """Nested lists in four significant digits; None for what JSON does not know (NaN, infinity)."""
    if isinstance(values, list):
        return [rounded(inner) for inner in values]
    return float(f"{values:.4g}") if math.isfinite(values) else None
