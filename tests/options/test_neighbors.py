"""`NeighborConfig` by itself."""

import pytest

from options.neighbors import NeighborConfig
from tests.options.reference import DEFAULTS, defaults_of, parse

pytestmark = pytest.mark.usefixtures("folder")


def test_neighbor_config_alone():
    assert defaults_of(NeighborConfig) == {name: DEFAULTS[name] for name in defaults_of(NeighborConfig)} | {
        "magnitude_type": "cosine"
    }
    names = {"similarity": "cosine", "distance": "euclidean", "cosine": "cosine", "euclidean": "euclidean", "matmul": "matmul"}
    for name, metric in names.items():
        assert parse(f"--magnitude_type {name}").model.neighbors == NeighborConfig(magnitude_type=name)
        assert NeighborConfig(magnitude_type=name).metric == metric
    assert NeighborConfig(sampling_type="spatial").sampling == "all"  # num_samples=-1
    assert NeighborConfig(sampling_type="spatial", num_samples=3).sampling == "spatial"
