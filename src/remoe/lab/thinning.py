"""Long series made short for a plot, so that no spike is lost.

Legend: N series, S records.
"""

from itertools import pairwise

import numpy as np

POINTS = 2400  # of a plot, about


def kept_points(values_NS: np.ndarray, points: int = POINTS) -> np.ndarray:
    """The indices that a plot keeps: for every span of records the lowest and the highest value of each series.

    Half of the spans have equally many records, half grow geometrically, for logarithmic steps.

    Args:
        values_NS: (N, S) float64, the series of a plot; NaN is neither lowest nor highest.
        points: about the most indices.
    """
    series, size = values_NS.shape
    if size <= points:
        return np.arange(size)
    spans = max(8, points // (4 * series))
    low_NS, high_NS = (
        np.where(np.isnan(values_NS), np.inf, values_NS),
        np.where(np.isnan(values_NS), -np.inf, values_NS),
    )
    kept = [np.array([0, size - 1])]
    for edges in (np.linspace(0, size, spans + 1), np.geomspace(1, size + 1, spans + 1) - 1):
        starts = np.unique(edges.round().astype(int))
        for start, end in pairwise(starts):
            kept += [start + low_NS[:, start:end].argmin(axis=1), start + high_NS[:, start:end].argmax(axis=1)]
    return np.unique(np.concatenate(kept))
