"""Small pictures of 24 classes, drawn: eight shapes, each filled with one of three textures, under clutter and noise.

Shape, place, size, turn, colours, what else is in the picture and the grain are drawn from a seeded generator, so that
a seed and a count name a data set. Hard enough that a trained network errs on some, as quantization then shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

SHAPES = ("disc", "square", "triangle", "ring", "cross", "star", "crescent", "bar")
TEXTURES = ("stripes", "checks", "dots")
CLASSES = len(SHAPES) * len(TEXTURES)
SIZE = 32
NOISE = 0.08  # deviation of the grain, in units of the range of a colour
CHUNK = 4096  # pictures drawn together


@dataclass(frozen=True)
class Pictures:
    """images [n, 3, 32, 32] float32 of mean 0 and deviation about 1; labels [n], from 0 to 23."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def draw(count: int, seed: int) -> Pictures:
    """`count` pictures; the first of a larger count are not those of a smaller one."""
    generator = torch.Generator().manual_seed(seed)
    parts = [_chunk(min(CHUNK, count - start), generator) for start in range(0, count, CHUNK)]
    return Pictures(torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))


def _chunk(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    shape, texture = labels // len(TEXTURES), labels % len(TEXTURES)
    # The background: a slow wave of one colour into another. Two other shapes, of one colour, lie on it.
    colours = uniform(0, 1, 5, 3, 1, 1)
    ripple = _wave(*_frame(uniform(-1, 1), uniform(-1, 1), uniform(1, 3), uniform(0, 2 * pi)))
    picture = torch.lerp(colours[:, 0], colours[:, 1], ripple.unsqueeze(1))
    for other in (2, 3):
        inside = _inside(
            torch.randint(0, len(SHAPES), (n,), generator=generator),
            *_frame(uniform(-1, 1), uniform(-1, 1), uniform(0.15, 0.3), uniform(0, 2 * pi)),
        )
        picture = torch.lerp(picture, colours[:, other], inside.unsqueeze(1))
    # The shape, at least half a range of some colour away from its texture's other colour.
    frame = _frame(uniform(-0.35, 0.35), uniform(-0.35, 0.35), uniform(0.5, 0.75), uniform(0, 2 * pi))
    ink = colours[:, 4]
    paper = (ink + 0.5 + uniform(-0.15, 0.15, 3, 1, 1)) % 1
    pattern = _texture(texture, *frame, uniform(5, 8))
    filled = torch.lerp(paper, ink, pattern.unsqueeze(1))
    picture = torch.lerp(picture, filled, _inside(shape, *frame).unsqueeze(1))
    picture = picture * uniform(0.5, 1, 1, 1, 1) + uniform(-0.2, 0.2, 1, 1, 1)
    picture = picture + NOISE * torch.randn(picture.shape, generator=generator)
    return (picture - 0.37) / 0.26, labels


def _frame(x: Tensor, y: Tensor, size: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates [n, 32, 32] of each pixel in the frame of a thing at (x, y): its edge is about 1 away."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    dx = axis.view(1, 1, -1) - x.view(-1, 1, 1)
    dy = axis.view(1, -1, 1) - y.view(-1, 1, 1)
    cos, sin, size = turn.cos().view(-1, 1, 1), turn.sin().view(-1, 1, 1), size.view(-1, 1, 1)
    return (cos * dx + sin * dy) / size, (cos * dy - sin * dx) / size


def _inside(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """1 inside a shape, 0 outside, [n, 32, 32], with an edge about a pixel wide."""
    radius, angle = torch.hypot(u, v), torch.atan2(v, u)
    a, b = u.abs(), v.abs()
    depth = torch.empty_like(u)  # how far inside, in units of the shape's size
    for index, name in enumerate(SHAPES):
        chosen = shape == index
        depth[chosen] = {
            "disc": lambda r, t, a, b, u, v: 0.9 - r,
            "square": lambda r, t, a, b, u, v: 0.8 - torch.maximum(a, b),
            "triangle": lambda r, t, a, b, u, v: 0.5 - r * _polygon(t, 3),
            "ring": lambda r, t, a, b, u, v: 0.28 - (r - 0.72).abs(),
            "cross": lambda r, t, a, b, u, v: torch.minimum(0.3 - torch.minimum(a, b), 1 - torch.maximum(a, b)),
            "star": lambda r, t, a, b, u, v: 0.7 + 0.3 * (5 * t).cos() - r,
            "crescent": lambda r, t, a, b, u, v: torch.minimum(1 - r, torch.hypot(u - 0.5, v) - 0.7),
            "bar": lambda r, t, a, b, u, v: torch.minimum(1 - a, 0.4 - b),
        }[name](*(x[chosen] for x in (radius, angle, a, b, u, v)))
    return (depth * 8 + 0.5).clamp(0, 1)


def _polygon(angle: Tensor, corners: int) -> Tensor:
    """The cosine of the angle to the middle of the nearest side."""
    sector = 2 * pi / corners
    return (torch.remainder(angle, sector) - sector / 2).cos()


def _wave(u: Tensor, v: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.sin(2 * u)


def _texture(texture: Tensor, u: Tensor, v: Tensor, frequency: Tensor) -> Tensor:
    """From 0 to 1, [n, 32, 32]: stripes, a chequerboard, or round dots."""
    f = frequency.view(-1, 1, 1)
    stripes, across = torch.sin(f * u), torch.sin(f * v)
    found = torch.where(texture.view(-1, 1, 1) == 0, stripes, stripes * across * 2)
    found = torch.where(texture.view(-1, 1, 1) == 2, stripes.abs() + across.abs() - 1, found)
    return (found * 2 + 0.5).clamp(0, 1)
