"""The devices that networks run on, and the machine's name in records."""

import platform

import torch


def devices(choice: str) -> list[str]:
    """The devices for "auto", "cpu" or "cuda": the CPU, or every GPU; ValueError for "cuda" without a GPU."""
    gpus = torch.cuda.device_count() if choice != "cpu" and torch.cuda.is_available() else 0
    if choice == "cuda" and not gpus:
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    return [f"cuda:{i}" for i in range(gpus)] or ["cpu"]


def machine() -> str:
    """The processor, torch's threads, and the GPU if there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}"
