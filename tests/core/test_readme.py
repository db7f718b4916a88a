"""The README's lines do what it says."""

import re
from pathlib import Path

import torch

from dng_core.oracle import GaussianMixture
from dng_core.schedules import DDPMSchedule, ddpm_sigmas

README = Path(__file__).parents[2] / "README.md"


def test_the_lines_around_a_plain_loop_remove_the_undesired_component() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    mixture = GaussianMixture.random(8, (16,))
    sigmas = ddpm_sigmas(DDPMSchedule.named("linear"), 50)
    torch.manual_seed(0)
    start = sigmas[0] * torch.randn(1000, 16)

    def denoise(x: torch.Tensor, sigma: float, label: str | None) -> torch.Tensor:
        return mixture.denoised(x, sigma, [0] if label == "undesired" else None)

    names = {"torch": torch, "denoise": denoise, "sigmas": sigmas, "x": start.clone()}
    exec("".join(blocks), names)
    share = (mixture.classify(names["x"]) == 0).float().mean()
    assert share < 0.05  # of 12.5 % without guidance
