"Random tensors and their comparison, for the tests of the network's parts."
import torch


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    "Norm of the difference relative to the norm of `b`, over the whole tensors in float64."
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    "Standard normal numbers in float64, the same for the same seed."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
