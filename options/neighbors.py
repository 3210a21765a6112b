"""`NeighborConfig`: options of the search for the K neighbors of each token."""

import math
from dataclasses import dataclass
from typing import TypedDict

from options.fields import SIDE, TOKENS, check_fields, option

METRIC_ALIASES = {
    "cosine": "cosine",
    "similarity": "cosine",
    "euclidean": "euclidean",
    "distance": "euclidean",
    "matmul": "matmul",
}


def canonical_metric(name: str) -> str:
    """Return cosine, euclidean or matmul for any of their names. Raises ValueError for another name."""
    if name not in METRIC_ALIASES:
        raise ValueError(f"metric={name!r} is not one of {', '.join(METRIC_ALIASES)}")
    return METRIC_ALIASES[name]


NEIGHBORS = {"group": "neighbors"}


@dataclass(frozen=True)
class NeighborConfig:
    """The K neighbors of each token: the candidates, and the measure that ranks them."""

    K: int = option(9, "neighbors per token, which may include the token itself", low=1, high=TOKENS, **NEIGHBORS)
    sampling_type: str = option(
        "all",
        "candidates: all tokens, a random set per step, or a spatial grid",
        choices=("all", "random", "spatial"),
        **NEIGHBORS,
    )
    num_samples: int = option(
        -1, "random: number of candidates; spatial: side of their grid; -1: all tokens", low=-1, high=TOKENS, **NEIGHBORS
    )
    sample_padding: int = option(0, "spatial: margin left free at the border, in tokens", low=0, high=SIDE, **NEIGHBORS)
    magnitude_type: str = option(
        "cosine",
        "measure of similarity; similarity is cosine, distance is euclidean",
        choices=tuple(METRIC_ALIASES),
        **NEIGHBORS,
    )
    similarity_type: str = option(
        "Col", "compare features (Col), coordinates (Loc) or both (Loc_Col)", choices=("Col", "Loc", "Loc_Col"), **NEIGHBORS
    )
    aggregation_type: str = option(
        "Col", "aggregate values, or values with their coordinates appended (Loc_Col)", choices=("Col", "Loc_Col"), **NEIGHBORS
    )
    lambda_param: float = option(
        0.5, "Loc_Col: weight of the features; coordinates get 1 - lambda_param", low=0, high=1, **NEIGHBORS
    )

    def __post_init__(self):
        self._check_ranges()
        # A class token may be one candidate more; without one, check_candidates is stricter by one.
        most = {"all": math.inf, "random": self.num_samples + 1, "spatial": self.num_samples**2 + 1}[self.sampling]
        if self.K > most:
            self._too_few(most - 1)

    def _check_ranges(self) -> None:
        check_fields(self)
        if self.num_samples == 0:
            raise ValueError("num_samples=0 leaves no candidates; use at least 1, or -1 for all tokens")

    @property
    def metric(self) -> str:
        """`magnitude_type` without aliases: cosine, euclidean or matmul."""
        return canonical_metric(self.magnitude_type)

    @property
    def sampling(self) -> str:
        """`sampling_type`, where num_samples=-1 means all."""
        return "all" if self.num_samples == -1 else self.sampling_type

    @property
    def uses_location(self) -> bool:
        """True if the neighbors of a token, or their values, depend on the places of the tokens."""
        return self.sampling == "spatial" or (self.similarity_type, self.aggregation_type) != ("Col", "Col")

    def check_candidates(self, grid: tuple[int, ...] | None, *, axes: int = 2, class_tokens: int = 0) -> None:
        """Raise ValueError if a token of this grid cannot have K neighbors.

        With `grid=None` (size not known yet), check only what holds for `axes` sides of any length.
        """
        s, pad = self.num_samples, self.sample_padding
        tokens = math.prod(grid) if grid else math.inf
        if self.sampling == "random" and s > tokens:
            raise ValueError(
                f"num_samples={s} is more than the {tokens} tokens of the {as_sides(grid)} grid; use at most {tokens}"
            )
        if self.sampling == "spatial" and grid and s > min(grid) - 2 * pad:
            raise ValueError(
                f"num_samples={s} with sample_padding={pad} does not fit the {as_sides(grid)} grid; "
                f"at most {max(min(grid) - 2 * pad, 0)} per side"
            )
        candidates = class_tokens + {"all": tokens, "random": s, "spatial": s**axes}[self.sampling]
        if self.K > candidates:
            self._too_few(candidates)

    def _too_few(self, candidates: int):
        if self.sampling == "all":
            raise ValueError(f"K={self.K} is more than the {candidates} tokens; use 1 to {candidates}")
        raise ValueError(
            f"K={self.K} is more than the {candidates} candidates (sampling_type={self.sampling_type}, "
            f"num_samples={self.num_samples}); lower K or raise num_samples"
        )


class NeighborFields(TypedDict, total=False):
    """Fields of a `NeighborConfig`, as keyword arguments of a layer."""

    K: int
    sampling_type: str
    num_samples: int
    sample_padding: int
    magnitude_type: str
    similarity_type: str
    aggregation_type: str
    lambda_param: float


def as_neighbors(neighbors: NeighborConfig | None, fields: NeighborFields) -> NeighborConfig:
    """Return the config of a layer, which takes it whole or by its fields. Raises TypeError for both, or an unknown field."""
    if neighbors is None:
        return NeighborConfig(**fields)
    if not isinstance(neighbors, NeighborConfig):
        raise TypeError(f"neighbors={neighbors!r} is not a NeighborConfig; give that, or its fields by keyword, such as K=9")
    if fields:
        raise TypeError(f"{', '.join(fields)} cannot be given beside neighbors; set it in the NeighborConfig")
    return neighbors


def as_sides(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid))
