#!/usr/bin/env python3
"""Are the attention kernels right on this chip, and how fast are they beside every other implementation that is there?

    python3 bench/chip.py --out DIR --budget 540       # any Hopper GPU or TPU VM
    python3 bench/chip.py --out DIR --rehearse         # anywhere: tiny, on the CPU, with a hang and crashes planted

It needs jax and numpy alone: the checkout's folder `kernels` is imported as `bestiary.kernels` through a link in a
temporary folder, so that nothing must be installed. What it does and writes: `kernels/bench/chip.py`.
"""

import os
import sys
import tempfile
from pathlib import Path


def main() -> int:
    if "--rehearse" in sys.argv:
        os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "bestiary"
        package.mkdir()
        (package / "kernels").symlink_to(Path(__file__).resolve().parent.parent / "kernels")
        sys.path.insert(0, folder)
        from bestiary.kernels.bench.chip import main as run

        return run()


if __name__ == "__main__":
    sys.exit(main())
