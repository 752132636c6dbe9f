"""Ways of improving neighbors after the search; each maps neighbors to neighbors.

================  =========================================================================================
expansion         new embeddings from those of the neighbors, to be searched again
k_reciprocal      nearer, the more two instances share of their mutual neighborhoods
diffusion         nearer, the more paths of mutual neighbors lead from one to the other
normalisation     distances relative to how near a query, and a gallery instance, is to others at all
thresholding      shorter lists
pairwise          as a model judges each query together with its nearest
================  =========================================================================================

`k_reciprocal` and `diffusion` read the `graph` of nearest neighbors, as sparse as the lists are. Each sorts by
(distance, id) what the search has found, and finds nothing else: so what was excluded stays so. Distances are no longer
those of the definition, and normalised ones may be negative: normalise after re-ranking.
"""
