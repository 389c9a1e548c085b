"""What makes a scene hard to reconstruct, apart from where its cameras stand."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Difficulty:
    """Knobs of a scene; the defaults are the easy end of each. Raises ValueError outside the range that is named."""

    objects: int = 9  # boxes and spheres, beside the room
    scale: tuple[float, float] = (1.0, 1.0)  # range of the factor on a surface's texture cells
    flat: float = 0.0  # share of surfaces that show next to no texture
    repeated: float = 0.0  # share of surfaces that look like the first of their scene: one for faces, one for objects
    light_change: float = 0.0  # between views: exposure, colour cast and place of the lamp; 1 is the most
    fov_jitter: float = 0.0  # between views: 1 lets the focal length lie between 2/3 and 3/2 of the scene's

    def __post_init__(self) -> None:
        for name in ("flat", "repeated", "light_change", "fov_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0 … 1, got {getattr(self, name)}")
        if self.objects < 0:
            raise ValueError(f"objects must be at least 0, got {self.objects}")
        if not 0 < self.scale[0] <= self.scale[1] or math.isinf(self.scale[1]):
            raise ValueError(f"scale must be an increasing range of positive factors, got {self.scale}")


DIFFICULTIES = {
    "easy": Difficulty(),
    "medium": Difficulty(12, (0.6, 1.6), flat=0.15, repeated=0.15, light_change=0.3, fov_jitter=0.25),
    "hard": Difficulty(16, (0.35, 2.5), flat=0.4, repeated=0.4, light_change=0.8, fov_jitter=0.6),
}
