"""Generated scenes: coloured, textured shapes on four kinds of ground, with exact masks and captions.

52 classes: 48 objects (4 colours x 3 textures x 4 shapes, such as "red striped circle") and 4 backgrounds. Everything
is computed for whole batches at once. Two properties are promised:

- **The same bits everywhere.** A picture depends on the seed, the side and its index alone: not on the machine, the
  number of threads or how many pictures are asked for. Only arithmetic that IEEE 754 fixes is used on pixels (no
  sin, exp, normal draws or reductions, whose last bits depend on the processor).
- **Exact masks.** A pixel belongs to an object where its centre lies inside the shape; edges are smoothed in the
  picture alone. Where objects overlap it belongs to the front one, in the semantic mask and in the instance map.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from infoclip.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from infoclip.data.panoptic import Category

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "OBJECT_CLASSES",
    "SCENE_CLASSES",
    "SHAPES",
    "TEXTURES",
    "Scenes",
    "captions",
    "render",
    "render_scenes",
    "scene_categories",
    "split_classes",
    "write_scenes",
]

COLOURS = ("red", "green", "blue", "yellow")
TEXTURES = ("plain", "striped", "dotted")
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ("grass", "sand", "water", "brick")

OBJECT_CLASSES: tuple[str, ...] = tuple(f"{c} {t} {s}" for c in COLOURS for t in TEXTURES for s in SHAPES)
SCENE_CLASSES: tuple[str, ...] = (*OBJECT_CLASSES, *BACKGROUNDS)
"""The 52 names; an index into this tuple is a mask's value."""

GENERATOR_VERSION = 1
"""Changes whenever the same seed gives other pictures."""

# Pictures are drawn in blocks of this many, each from a generator of its own, so that picture i never depends on how
# many are asked for.
_BLOCK = 32
_MAX_OBJECTS = 4
_CANDIDATES = 12
_MIN_SIZE = 32

_COLOUR_RGB = ((0.86, 0.12, 0.14), (0.13, 0.74, 0.28), (0.14, 0.27, 0.88), (0.97, 0.82, 0.10))
# Inradius, half side or arm lengths in radii: the four shapes have similar areas.
_TRIANGLE_INRADIUS = 0.60
_SQUARE_HALF = 0.84
_CROSS_LONG, _CROSS_SHORT = 1.06, 0.36
_STRIPE_PERIOD, _DOT_PERIOD, _DOT_RADIUS = 6.0, 7.0, 2.2  # pixels


class Scenes(NamedTuple):
    """A batch of pictures and what is in them."""

    images: Tensor  # [n, 3, S, S] uint8, RGB
    masks: Tensor  # [n, S, S] int64, index into SCENE_CLASSES
    objects: Tensor  # [n, 4] int64, object classes from back to front, -1 where there is none
    backgrounds: Tensor  # [n] int64, index into BACKGROUNDS
    instances: Tensor  # [n, S, S] int64, 1 for the ground (stuff), 2 + k for the object of column k (things)

    @property
    def instance_classes(self) -> Tensor:
        """Class of each instance, int64 [n, 5]: column i is that of instance i + 1, -1 where there is none."""
        return torch.cat([self.backgrounds[:, None] + len(OBJECT_CLASSES), self.objects], dim=1)


def split_classes(split: str) -> tuple[list[str], list[str]]:
    """Seen and unseen classes, as names; the four backgrounds are always seen.

    - ``attribute``: unseen is every class that is yellow or a cross (21 of 48), so that one colour and one shape are
      never trained on.
    - ``composition``: 16 of 48 unseen; every colour, texture and shape, and every pair of colour and shape, is seen in
      other combinations.

    Raises:
        ConfigError: another split.
    """
    if split not in ("attribute", "composition"):
        raise ConfigError(f"Unknown split '{split}'; expected attribute or composition.")
    unseen = []
    for index, name in enumerate(OBJECT_CLASSES):
        colour, texture, shape = _attributes(index)
        if split == "attribute":
            hidden = COLOURS[colour] == "yellow" or SHAPES[shape] == "cross"
        else:
            hidden = (colour + texture + shape) % 3 == 0
        if hidden:
            unseen.append(name)
    return [name for name in SCENE_CLASSES if name not in unseen], unseen


def render(
    n: int,
    size: int,
    objects: tuple[int, int] = (1, 4),
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n, 3, size, size] (RGB) and masks int64 [n, size, size] (index into :data:`SCENE_CLASSES`).

    Arguments and errors as :func:`render_scenes`, which also tells what each picture holds.
    """
    scenes = render_scenes(n, size, objects, seed, classes)
    return scenes.images, scenes.masks


def render_scenes(
    n: int,
    size: int,
    objects: tuple[int, int] = (1, 4),
    seed: int = 0,
    classes: Sequence[str] | None = None,
    counts: Tensor | None = None,  # [n]
) -> Scenes:
    """Draw scenes.

    Args:
        n: number of pictures.
        size: side in pixels, at least 32; up to 96 px objects keep their size in pixels, beyond they grow with it.
        objects: smallest and largest number of objects, 0 to 4, drawn uniformly.
        seed: picture i depends on this, ``size`` and the arguments below alone, not on ``n``.
        classes: names that may occur; without a background among them all four may. All 52 by default.
        counts: number of objects of each picture, [n] int64, in place of a draw from ``objects``.

    Raises:
        ValueError: sizes or counts out of range.
        DataError: an unknown class name, or no object class among ``classes`` although objects are asked for.
    """
    low, high = objects
    if n < 0 or size < _MIN_SIZE:
        raise ValueError(f"expected n >= 0 pictures of at least {_MIN_SIZE} px, given n = {n}, size = {size}")
    if not 0 <= low <= high <= _MAX_OBJECTS:
        raise ValueError(f"expected 0 <= objects[0] <= objects[1] <= {_MAX_OBJECTS}, given {objects}")
    if counts is not None:
        if counts.shape != (n,):
            raise ValueError(f"expected counts [{n}], given {list(counts.shape)}")
        if n and not 0 <= int(counts.min()) <= int(counts.max()) <= _MAX_OBJECTS:
            raise ValueError(f"expected counts from 0 to {_MAX_OBJECTS}")
        high = int(counts.max()) if n else 0
    allowed, grounds = _allowed(classes, high)
    blocks = []
    for block in range(math.ceil(n / _BLOCK)):
        draws = _Draws(_BLOCK, size, _block_seed(seed, block))
        part = None
        if counts is not None:
            part = torch.zeros(_BLOCK, dtype=torch.int64)
            given = counts[block * _BLOCK : (block + 1) * _BLOCK]
            part[: len(given)] = given
        blocks.append(draws.arrange(low, high, allowed, grounds, part))
    if not blocks:
        empty = torch.empty(0, dtype=torch.int64)
        return Scenes(
            torch.empty(0, 3, size, size, dtype=torch.uint8), empty.view(0, 1, 1).expand(0, size, size),
            empty.view(0, 1).expand(0, _MAX_OBJECTS), empty,
            empty.view(0, 1, 1).expand(0, size, size),
        )  # fmt: skip
    plan = _Plan(*(torch.cat(parts)[:n] for parts in zip(*blocks, strict=True)))
    return _paint(plan, size)


def captions(scenes: Scenes, seed: int = 0, name_background: float = 0.6) -> list[str]:
    """One caption for each scene: a template, the objects in random order joined by "and", often the ground.

    Args:
        scenes: from :func:`render_scenes`.
        seed: of the choices of words.
        name_background: share of the captions that end in "on BACKGROUND"; a scene without objects always names it.
    """
    n = len(scenes.backgrounds)
    generator = torch.Generator().manual_seed(_block_seed(seed, -1))
    which = torch.randint(len(CAPTION_TEMPLATES), (n,), generator=generator).tolist()
    order = torch.rand(n, _MAX_OBJECTS, generator=generator).argsort(dim=1).tolist()
    named = (torch.rand(n, generator=generator) < name_background).tolist()
    article = (torch.rand(n, generator=generator) < 0.5).tolist()
    texts = []
    for i, (objects, ground) in enumerate(zip(scenes.objects.tolist(), scenes.backgrounds.tolist(), strict=True)):
        names = [OBJECT_CLASSES[objects[j]] for j in order[i] if objects[j] >= 0]
        if article[i]:
            names = [f"a {name}" for name in names]
        if not names:
            text = BACKGROUNDS[ground]
        else:
            text = " and ".join(names) + (f" on {BACKGROUNDS[ground]}" if named[i] else "")
        texts.append(CAPTION_TEMPLATES[which[i]].format(text))
    return texts


CAPTION_TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "there is {} in the scene", "this is {}")
"""What a caption's list of things is put into."""


# Drawing: random numbers first, in an order that no option changes; then pixels, by exact arithmetic.


class _Plan(NamedTuple):
    """Everything random about n pictures; ``size`` pixels a side."""

    objects: Tensor  # [n, 4] int64, -1 for none
    backgrounds: Tensor  # [n] int64
    centre: Tensor  # [n, 4, 2] pixels, x and y
    radius: Tensor  # [n, 4] pixels
    turn: Tensor  # [n, 4] tangent of half the angle
    tint: Tensor  # [n, 4, 3] factor on the colour
    second: Tensor  # [n, 4, 2]: light or dark, and how much
    stripes: Tensor  # [n, 4, 3]: direction, phase x, phase y
    light: Tensor  # [n, 3]: brightness, gradient in x and y
    ground: Tensor  # [n, 4]: tint (3) and phase
    fine: Tensor  # [n, S, S] noise, 0..1
    coarse: Tensor  # [n, G, G] noise, 0..1


class _Draws:
    """The random numbers of one block of pictures."""

    def __init__(self, n: int, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:  # float32 uniform is exact: 24 bits of a Mersenne twister
            return torch.rand(n, *shape, generator=generator)

        self.n, self.size = n, size
        self.count, self.background = uniform(), uniform()
        self.cls = uniform(_MAX_OBJECTS)
        self.radius = uniform(_MAX_OBJECTS)
        self.places = uniform(_MAX_OBJECTS, _CANDIDATES, 2)
        self.turn = uniform(_MAX_OBJECTS)
        self.tint = uniform(_MAX_OBJECTS, 3)
        self.second = uniform(_MAX_OBJECTS, 2)
        self.stripes = uniform(_MAX_OBJECTS, 3)
        self.light = uniform(3)
        self.ground = uniform(4)
        self.fine = uniform(size, size)
        self.coarse = uniform(size // 8 + 3, size // 8 + 3)

    def arrange(
        self, low: int, high: int, allowed: Tensor, grounds: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The plan of the block, as a tuple in the order of :class:`_Plan`."""
        if counts is None:
            counts = low + (self.count * (high - low + 1)).long().clamp(max=high - low)
        slot = torch.arange(_MAX_OBJECTS)
        present = slot < counts[:, None]  # [n, 4]
        if len(allowed):
            objects = allowed[(self.cls * len(allowed)).long().clamp(max=len(allowed) - 1)]
        else:
            objects = torch.full((self.n, _MAX_OBJECTS), -1)
        objects = torch.where(present, objects, -1)
        background = grounds[(self.background * len(grounds)).long().clamp(max=len(grounds) - 1)]

        scale = max(1.0, self.size / 96)
        # Many objects in a small picture are drawn smaller, so that all can be seen.
        room = self.size / (torch.tensor([3.5, 3.5, 4.4, 4.9, 5.4])[counts])  # [n]
        largest = torch.minimum(room, torch.tensor(21.0 * scale))[:, None]
        smallest = torch.minimum(largest * 0.9, torch.tensor(12.0 * scale))
        radius = smallest + (largest - smallest) * self.radius  # [n, 4]
        centre = self._spread(radius)
        return (
            objects, background, centre, radius,
            (self.turn - 0.5) * 0.36,  # up to 20 degrees either way
            0.90 + 0.18 * self.tint,
            self.second,
            self.stripes,
            self.light,
            self.ground,
            self.fine,
            self.coarse,
        )  # fmt: skip

    def _spread(self, radius: Tensor) -> Tensor:  # [n, 4] -> [n, 4, 2]
        """Each object takes, of its candidate places, the one that is farthest from the objects before it."""
        margin = radius * 0.95 + 1
        places = margin[..., None, None] + self.places * (self.size - 2 * margin)[..., None, None]  # [n, 4, K, 2]
        chosen = [places[:, 0, 0]]
        for k in range(1, _MAX_OBJECTS):
            gap = torch.full((self.n, _CANDIDATES), float("inf"))
            for j in range(k):
                step = places[:, k] - chosen[j][:, None]  # [n, K, 2]
                distance = _sqrt(step[..., 0] * step[..., 0] + step[..., 1] * step[..., 1])
                gap = torch.minimum(gap, distance - (radius[:, k] + radius[:, j])[:, None])
            best = gap.argmax(dim=1)
            chosen.append(places[torch.arange(self.n), k, best])
        return torch.stack(chosen, dim=1)


def _paint(plan: _Plan, size: int) -> Scenes:
    n = len(plan.backgrounds)
    scale = max(1.0, size / 96)
    axis = torch.arange(size, dtype=torch.float32) + 0.5
    image = torch.empty(n, 3, size, size)
    for index, painter in enumerate((_grass, _sand, _water, _brick)):
        rows = (plan.backgrounds == index).nonzero()[:, 0]
        if len(rows):
            image[rows] = painter(plan.fine[rows], plan.coarse[rows], plan.ground[rows], axis, scale)
    masks = (plan.backgrounds + len(OBJECT_CLASSES))[:, None, None].repeat(1, size, size)
    instances = torch.ones_like(masks)

    for slot in range(_MAX_OBJECTS):
        rows = (plan.objects[:, slot] >= 0).nonzero()[:, 0]
        if not len(rows):
            continue
        parts = _Plan._make([*(field[rows] for field in plan[:-2]), plan.fine[:0], plan.coarse[:0]])
        cls = parts.objects[:, slot]
        distance, u, v = _distance(parts, slot, axis)  # [m, S, S]
        colour = _object_colour(parts, slot, distance, u, v, scale)
        cover = (0.5 - distance).clamp(0, 1)[:, None]  # [m, 1, S, S]
        image[rows] = image[rows] * (1 - cover) + colour * cover
        masks[rows] = torch.where(distance < 0, cls[:, None, None], masks[rows])
        instances[rows] = instances[rows].masked_fill(distance < 0, slot + 2)

    x = (axis / size - 0.5)[None, None, :]
    y = (axis / size - 0.5)[None, :, None]
    light = plan.light[..., None, None]  # [n, 3, 1, 1]
    shade = (0.84 + 0.28 * light[:, 0]) + (light[:, 1] - 0.5) * 0.3 * x + (light[:, 2] - 0.5) * 0.3 * y
    image = image * shade[:, None]
    images = (image * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)
    return Scenes(images, masks, plan.objects.contiguous(), plan.backgrounds, instances)


def _distance(plan: _Plan, slot: int, axis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed distance to the outline in pixels (negative inside), and coordinates in the object's own frame."""
    centre, radius = plan.centre[:, slot], plan.radius[:, slot, None, None]
    t = plan.turn[:, slot, None, None]
    cos, sin = (1 - t * t) / (1 + t * t), (t + t) / (1 + t * t)
    x = axis[None, None, :] - centre[:, 0, None, None]
    y = axis[None, :, None] - centre[:, 1, None, None]
    u, v = x * cos + y * sin, y * cos - x * sin  # [m, S, S]
    shape = plan.objects[:, slot] % len(SHAPES)
    distance = torch.empty_like(u)
    for index in range(len(SHAPES)):
        rows = (shape == index).nonzero()[:, 0]
        if not len(rows):
            continue
        a, b, r = u[rows], v[rows], radius[rows]
        if SHAPES[index] == "circle":
            d = _sqrt(a * a + b * b) - r
        elif SHAPES[index] == "square":
            d = torch.maximum(a.abs(), b.abs()) - r * _SQUARE_HALF
        elif SHAPES[index] == "triangle":  # three half planes; the tip points up
            lower = b - r * 0.10  # the centre of its box, not of its inscribed circle
            d = torch.maximum(lower, a.abs() * 0.8660254 - lower * 0.5) - r * _TRIANGLE_INRADIUS
        else:
            a, b = a.abs(), b.abs()
            long, short = r * _CROSS_LONG, r * _CROSS_SHORT
            d = torch.minimum(torch.maximum(a - long, b - short), torch.maximum(a - short, b - long))
        distance[rows] = d
    return distance, u, v


def _object_colour(plan: _Plan, slot: int, distance: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
    """Colour at every pixel, [m, 3, S, S]: texture of two colours and a darker rim."""
    cls = plan.objects[:, slot]
    colour, texture = cls // (len(TEXTURES) * len(SHAPES)), cls // len(SHAPES) % len(TEXTURES)
    base = torch.tensor(_COLOUR_RGB)[colour] * plan.tint[:, slot]  # [m, 3]
    light, amount = plan.second[:, slot, :1], plan.second[:, slot, 1:]
    pale = base + (0.97 - base) * (0.72 + 0.2 * amount)
    dark = base * (0.34 - 0.2 * amount)
    second = torch.where(light < 0.5, pale, dark)

    direction, phase_x, phase_y = (plan.stripes[:, slot, i, None, None] for i in range(3))
    striped = torch.where(direction < 0.5, u, v)  # stripes along one of the object's own axes
    period = _STRIPE_PERIOD * scale
    wave = _sawtooth(striped / period + phase_x)  # distance to a stripe's middle, 0..0.5 periods
    stripe = ((wave - 0.25) * period + 0.5).clamp(0, 1)
    period = _DOT_PERIOD * scale
    du, dv = _sawtooth(u / period + phase_x) * period, _sawtooth(v / period + phase_y) * period
    dot = (_DOT_RADIUS * scale - _sqrt(du * du + dv * dv) + 0.5).clamp(0, 1)
    kind = texture[:, None, None]
    share = torch.where(kind == 1, stripe, torch.where(kind == 2, dot, torch.zeros(())))[:, None]  # [m, 1, S, S]
    rgb = base[..., None, None] * (1 - share) + second[..., None, None] * share
    rim = (1 - 0.42 * (distance + 1.6 * scale).clamp(0, 1))[:, None]
    return rgb * rim


def _sqrt(x: Tensor) -> Tensor:  # float32 of any shape
    """The square root that IEEE 754 fixes: torch's own is MKL's, whose last bit depends on the processor."""
    return torch.from_numpy(np.sqrt(x.numpy()))


def _sawtooth(x: Tensor) -> Tensor:
    """Distance to the nearest whole number, 0..0.5."""
    return (x - (x + 0.5).floor()).abs()


def _smooth(coarse: Tensor, x: Tensor, y: Tensor) -> Tensor:  # [m, G, G], [S], [S] -> [m, S, S]
    """Bilinear interpolation of noise at lattice coordinates."""
    x0, y0 = x.floor().long(), y.floor().long()
    fx, fy = (x - x0)[None, None, :], (y - y0)[None, :, None]
    top = coarse[:, y0][:, :, x0] * (1 - fx) + coarse[:, y0][:, :, x0 + 1] * fx
    bottom = coarse[:, y0 + 1][:, :, x0] * (1 - fx) + coarse[:, y0 + 1][:, :, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _stretched(fine: Tensor, steps: float, vertical: bool) -> Tensor:  # [m, S, S] -> [m, S, S]
    """Noise drawn out along one axis over ``steps`` pixels, interpolated."""
    size = fine.shape[-1]
    position = torch.arange(size, dtype=torch.float32) / steps
    low = position.floor().long()
    part = position - low
    high = (low + 1).clamp(max=size - 1)
    if vertical:
        part = part[None, :, None]
        return fine[:, low] * (1 - part) + fine[:, high] * part
    part = part[None, None, :]
    return fine[:, :, low] * (1 - part) + fine[:, :, high] * part


def _blend(base: Sequence[float], spread: Sequence[float], value: Tensor, ground: Tensor) -> Tensor:
    """``base + spread * value`` per channel with the picture's own tint, [m, 3, S, S]."""
    tint = 0.93 + 0.14 * ground[:, :3, None, None]
    b = torch.tensor(base)[None, :, None, None]
    return (b + torch.tensor(spread)[None, :, None, None] * value[:, None]) * tint


def _patches(coarse: Tensor, axis: Tensor, scale: float) -> Tensor:  # [m, G, G] -> [m, S, S]
    return _smooth(coarse, axis / (8 * scale), axis / (8 * scale))


def _grass(fine: Tensor, coarse: Tensor, ground: Tensor, axis: Tensor, scale: float) -> Tensor:
    blades = _stretched(fine, 5 * scale, vertical=True)
    value = 0.7 * blades + 0.5 * _patches(coarse, axis, scale) - 0.1
    return _blend((0.21, 0.33, 0.10), (0.17, 0.25, 0.08), value, ground)


def _sand(fine: Tensor, coarse: Tensor, ground: Tensor, axis: Tensor, scale: float) -> Tensor:
    value = 0.55 * fine + 0.65 * _patches(coarse, axis, scale) - 0.1
    return _blend((0.70, 0.60, 0.43), (0.16, 0.15, 0.13), value, ground)


def _water(fine: Tensor, coarse: Tensor, ground: Tensor, axis: Tensor, scale: float) -> Tensor:
    ripple = _stretched(fine, 7 * scale, vertical=False)
    bend = _patches(coarse, axis, scale)
    wave = _sawtooth(axis[None, :, None] / (9 * scale) + bend * 0.9 + ground[:, 3, None, None]) * 2
    value = 0.45 * ripple + 0.65 * wave * wave
    return _blend((0.20, 0.46, 0.56), (0.26, 0.26, 0.22), value, ground)


def _brick(fine: Tensor, coarse: Tensor, ground: Tensor, axis: Tensor, scale: float) -> Tensor:
    height, width = 7 * scale, 14 * scale
    y = axis / height + ground[:, 3:]  # [m, S]
    row = y.floor()
    shift = (row - 2 * (row * 0.5).floor()) * 0.5  # every second row is half a brick aside
    x = (axis / width)[None, None, :] + ground[:, :1, None] + shift[:, :, None]  # [m, S, S]
    column = x.floor()
    side = coarse.shape[-1]
    r = (row.long() % side)[:, :, None].expand(-1, -1, x.shape[-1])
    c = column.long() % side
    tone = coarse.flatten(1).gather(1, (r * side + c).flatten(1)).view_as(x)
    gap = torch.minimum(_edge(y[:, :, None], height), _edge(x, width))  # pixels to the next joint
    joint = (1.2 * scale - gap).clamp(0, 1)[:, None]
    bricks = _blend((0.44, 0.23, 0.17), (0.20, 0.10, 0.08), 0.7 * tone + 0.4 * fine, ground)
    mortar = _blend((0.62, 0.58, 0.53), (0.10, 0.10, 0.10), fine, ground)
    return bricks * (1 - joint) + mortar * joint


def _edge(x: Tensor, period: float) -> Tensor:
    """Pixels to the nearest whole number of a coordinate in periods."""
    return _sawtooth(x) * period


def _attributes(index: int) -> tuple[int, int, int]:
    """Colour, texture and shape of an object class."""
    return index // 12, index // 4 % 3, index % 4


def _block_seed(seed: int, block: int) -> int:
    """A seed of 63 bits for a block of pictures: splitmix64 of both numbers."""
    x = (int(seed) * 0x9E3779B97F4A7C15 + (block + 2) * 0xD1B54A32D192ED03) & (2**64 - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


def _allowed(classes: Sequence[str] | None, high: int) -> tuple[Tensor, Tensor]:
    """Object classes and backgrounds that may occur, as indices."""
    names = SCENE_CLASSES if classes is None else classes
    unknown = [name for name in names if name not in SCENE_CLASSES]
    if unknown:
        raise DataError(
            f"'{unknown[0]}' is no class of the scenes; expected names such as '{OBJECT_CLASSES[0]}' or one of "
            f"{', '.join(BACKGROUNDS)}."
        )
    objects = [i for i, name in enumerate(OBJECT_CLASSES) if name in names]
    grounds = [i for i, name in enumerate(BACKGROUNDS) if name in names] or list(range(len(BACKGROUNDS)))
    if high > 0 and not objects:
        raise DataError("The scenes are to hold objects, but no object class is among the given classes.")
    return torch.tensor(objects, dtype=torch.int64), torch.tensor(grounds)


# Folders of scenes.

_FORMAT = "infoclip-scenes"
_Mode = Literal["RGB", "L"]


def write_scenes(
    root: str | Path,
    count: int,
    size: int,
    seed: int,
    objects: tuple[int, int] = (1, 4),
    classes: Sequence[str] | None = None,
    panoptic: bool = False,
) -> Path:
    """Write scenes as real files: ``images/000000.png`` (RGB), ``masks/000000.png`` (8 bit, index into the class list),
    ``classes.json`` (the 52 names) and ``scenes.json`` (how they were made).

    Every file is written to a temporary name and renamed. Calling it again with the same arguments checks every file
    against its picture, draws those that are missing or cannot be read (so an interrupted call is simply repeated), and
    changes nothing else.

    Args:
        root: folder, made when missing.
        count: number of pictures.
        size, seed, objects, classes: as :func:`render_scenes`.
        panoptic: also write the instance truth in the layout of COCO panoptic (as panopticapi reads it):
            ``panoptic/000000.png``, whose colour is the segment's id (R + 256 G + 65536 B), and ``panoptic.json`` with
            the segments of each picture and the categories, whose ids are the masks' values. It may be added to a
            folder that was written without it.

    Returns:
        ``root``.

    Raises:
        DataError: the folder already holds other scenes or other files, or a picture in it was changed.
        StorageError: the folder cannot be written.
    """
    root = Path(root)
    allowed = None if classes is None else [name for name in SCENE_CLASSES if name in set(classes)]
    if count < 1:
        raise DataError(f"The scenes in {root} are to be {count}; expected at least 1.")
    _allowed(classes, objects[1])
    manifest = {
        "format": _FORMAT,
        "generator": GENERATOR_VERSION,
        "count": count,
        "size": size,
        "seed": seed,
        "objects": list(objects),
        "classes": allowed,
    }
    _claim(root, manifest)
    from infoclip.data.panoptic import Segment, panoptic_json, segments_info

    try:
        for folder in ("images", "masks", *(["panoptic"] if panoptic else [])):
            (root / folder).mkdir(parents=True, exist_ok=True)
        annotations: list[dict[str, Any]] = []
        _write_json(root / "classes.json", list(SCENE_CLASSES))
        _write_json(root / "scenes.json", manifest)
        # Whole blocks, because a part of a block would be drawn in full anyway.
        step = _BLOCK * max(1, 128 * 96 * 96 // (_BLOCK * size * size))
        for start in range(0, count, step):
            stop = min(start + step, count)
            scenes = _render_range(start, stop, size, objects, seed, classes)
            for index in range(start, stop):
                name = f"{index:06d}.png"
                picture = scenes.images[index - start].permute(1, 2, 0).contiguous()
                _write_png(root / "images" / name, picture, "RGB")
                _write_png(root / "masks" / name, scenes.masks[index - start].to(torch.uint8), "L")
                if panoptic:
                    instances = scenes.instances[index - start].to(torch.uint8)
                    colour = F.pad(instances[..., None], (0, 2))  # ids up to 5 are all in the red channel
                    _write_png(root / "panoptic" / name, colour, "RGB")
                    classes_of = scenes.instance_classes[index - start].tolist()
                    segments = [Segment(i, classes_of[i - 1]) for i in instances.unique().tolist()]
                    info = segments_info(instances, segments, scene_categories())
                    annotations.append({"image_id": index, "file_name": name, "segments_info": info})
        if panoptic:
            pictures = [
                {"id": a["image_id"], "file_name": a["file_name"], "width": size, "height": size} for a in annotations
            ]
            groups = {True: "object", False: "ground"}
            _write_json(root / "panoptic.json", panoptic_json(pictures, annotations, scene_categories(), groups))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"Cannot write the scenes to {root}: {error.strerror or error}.") from error
    return root


def scene_categories() -> list[Category]:
    """The 52 classes as categories of a panoptic data set: objects are things, grounds are stuff."""
    from infoclip.data.panoptic import Category

    return [Category(i, name, i < len(OBJECT_CLASSES)) for i, name in enumerate(SCENE_CLASSES)]


def _render_range(
    start: int, stop: int, size: int, objects: tuple[int, int], seed: int, classes: Sequence[str] | None
) -> Scenes:
    """Pictures ``start`` (a multiple of the block) to ``stop``."""
    allowed, grounds = _allowed(classes, objects[1])
    blocks = [
        _Draws(_BLOCK, size, _block_seed(seed, block)).arrange(*objects, allowed, grounds, None)
        for block in range(start // _BLOCK, math.ceil(stop / _BLOCK))
    ]
    return _paint(_Plan(*(torch.cat(parts)[: stop - start] for parts in zip(*blocks, strict=True))), size)


def _claim(root: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but these scenes."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; expected a folder for the scenes.")
    path = root / "scenes.json"
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as the manifest of scenes ({error}); delete {root}.") from error
        if found == manifest:
            return
        keys = [key for key in manifest if not isinstance(found, dict) or found.get(key) != manifest[key]]
        given = found.get(keys[0]) if keys and isinstance(found, dict) else "another format"
        what = f"{keys[0]} is {_short(given)} there and {_short(manifest[keys[0]])} here" if keys else "other fields"
        raise DataError(f"{root} already holds other scenes ({what}); choose another folder, or delete this one.")
    # The class list is written before the manifest: alone it is the mark of a call that was interrupted at once.
    foreign = [p.name for p in root.iterdir() if not _leftover(p)] if root.exists() else []
    if foreign:
        raise DataError(
            f"{root} holds files but no scenes.json (first: {min(foreign)}); choose an empty folder for the scenes."
        )


def _leftover(path: Path) -> bool:
    """Whether a path is what an interrupted first call leaves behind."""
    if path.name in ("images", "masks", "panoptic"):
        return path.is_dir() and not any(path.iterdir())
    return path.name in ("classes.json", "classes.json.tmp", "scenes.json.tmp")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_png(path: Path, pixels: Tensor, mode: _Mode) -> None:  # [S, S, 3] or [S, S] uint8
    """Write a picture unless it is already there; a readable file with other pixels is refused."""
    from PIL import Image

    array = pixels.numpy()
    if path.exists():
        try:
            with Image.open(path) as found:
                same = found.mode == mode and np.array_equal(np.asarray(found), array)
        except (OSError, SyntaxError, ValueError):
            same = None  # damaged: drawn again
        if same:
            return
        if same is False:
            raise DataError(f"{path} is not the picture that its scenes.json describes; delete the folder and retry.")
    temporary = path.with_name(path.name + ".tmp")
    try:
        Image.fromarray(array).save(temporary, format="PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
