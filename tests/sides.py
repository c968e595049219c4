"""What add and multiply take: random codes with their step and zero, or values without; and where results go."""

import torch


def side(shape, device, codes, seed, step=0.02, zero=7):
    g = torch.Generator().manual_seed(seed)
    if not codes:
        return (2 * torch.randn(shape, generator=g)).to(device), None, None
    u = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).to(device)
    return u, torch.tensor([step], device=device), torch.tensor([zero], dtype=torch.int32, device=device)


def target(device, step=0.0317, zero=93):
    return torch.tensor([step], device=device), torch.tensor([zero], dtype=torch.int32, device=device)
