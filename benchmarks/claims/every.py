"""All claims of the two texts, re-checked by one command, on one page.

Runs that several claims want are made once. Results stand in a folder, one file a run: an interrupted call goes on where it was,
and a second one only judges.

    python -m benchmarks.claims.every --scale smoke|cpu|gpu [--data FOLDER] [--workers 2] [--only 2 6] [--out claims]
"""

from __future__ import annotations

from benchmarks.claims import (
    claim01_decorrelation,
    claim02_rewiring,
    claim03_gradient_scale,
    claim04_resets,
    claim05_exploitation,
    claim06_densities,
    claim07_methods,
    claim08_patterns,
    claim09_fraction,
    claim10_longer,
    claim11_sparse_momentum,
    claim12_ablation,
    claim13_empty_channels,
    claim14_specialization,
)
from benchmarks.claims.claim import main

CLAIMS = (
    claim01_decorrelation.CLAIM,
    claim02_rewiring.CLAIM,
    claim03_gradient_scale.CLAIM,
    claim04_resets.CLAIM,
    claim05_exploitation.CLAIM,
    claim06_densities.CLAIM,
    claim07_methods.CLAIM,
    claim08_patterns.CLAIM,
    claim09_fraction.CLAIM,
    claim10_longer.CLAIM,
    claim11_sparse_momentum.CLAIM,
    claim12_ablation.CLAIM,
    claim13_empty_channels.CLAIM,
    claim14_specialization.CLAIM,
)


if __name__ == "__main__":
    main(*CLAIMS, description=__doc__ or "")
