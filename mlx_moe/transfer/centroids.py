"""Router initialisation from clusters of the router's inputs, so that experts start with distinct kinds of tokens.

N tokens, D model, E experts (copies of the FFN).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Routers = Mapping[int, NDArray[np.float32]]  # layer -> rows (E, D)

ITERATIONS = 20
# Standard deviation of the logits: with 1, two experts whose logits differ by that have gates in the ratio e, so gates
# discriminate, and none is near 0 or 1, where its gradient would vanish.
LOGIT_STD = 1.0


def centroid_rows(x_ND: NDArray[Any], n_rows: int, seed: int) -> NDArray[np.float32]:
    """Return router rows (E, D) for states x: directions of E clusters, scaled to logits of standard deviation 1.

    The mean state does not discriminate, and would send every token to the same experts: in a trained model it is long.
    So the clusters are of directions orthogonal to the mean (spherical k-means, Dhillon & Modha 2001, initialised by
    k-means++), and so are the rows, whose logits have mean 0 over x for every expert. docs/mathematics.md has the
    formulas.
    """
    # takes a second to import, which training without centroids should not pay
    from scipy.cluster.vq import kmeans2

    x_ND = x_ND.astype(np.float64)
    mean_D = x_ND.mean(axis=0)
    mean_D /= np.linalg.norm(mean_D)
    directions_ND = _normed(x_ND - np.outer(x_ND @ mean_D, mean_D))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a cluster that loses all its tokens keeps its centre
        centres_ED, _ = kmeans2(directions_ND, n_rows, ITERATIONS, minit="++", rng=np.random.default_rng(seed))
    rows_ED = _normed(centres_ED - np.outer(centres_ED @ mean_D, mean_D))
    rows_ED *= LOGIT_STD / (x_ND @ rows_ED.T).std()
    return rows_ED.astype(np.float32)


def _normed(x_ND: NDArray[Any]) -> NDArray[Any]:
    normed: NDArray[Any] = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    return normed
