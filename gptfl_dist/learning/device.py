"""Which device a name of the configuration means on this machine."""

from __future__ import annotations

import torch

from gptfl_dist.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device of `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda`, `cuda:N` or `mps`.

    Raises ConfigError where this machine, or this build of PyTorch, does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError(
                f"device is {name}, but PyTorch {torch.__version__} finds no CUDA device here",
                hint="set device to auto or cpu, or check the driver (nvidia-smi) and install a CUDA build of PyTorch",
            )
        if device.index is not None and device.index >= count:
            raise ConfigError(
                f"device is {name}, but this machine has {count} CUDA device(s), counted from cuda:0",
                hint=f"set device to cuda:0{f' ... cuda:{count - 1}' if count > 1 else ''}, or to auto",
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"device is mps, but PyTorch {torch.__version__} finds no Apple GPU here",
            hint="set device to auto or cpu",
        )
    return device
