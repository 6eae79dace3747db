"""What of the build this machine can use, for `make demo`, which waits for no more than that.

Prints what to put into the environment: GRADAMP_CUDA=0 where torch sees no GPU, else the
architectures of the GPUs here. What the environment says already stands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping

EVERYTHING = "`make build` builds for all GPU generations"


def wish(environ: Mapping[str, str], capabilities: Iterable[tuple[int, int]]) -> tuple[str, str]:
    """What to set, and the line that tells of it; both are "" where someone has chosen before."""
    if environ.get("GRADAMP_CUDA") or environ.get("TORCH_CUDA_ARCH_LIST"):
        return "", ""
    archs = ";".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities)))
    if not archs:
        return (
            "GRADAMP_CUDA=0",
            f"no NVIDIA GPU is seen, so only the CPU part is built; {EVERYTHING}",
        )
    return f"TORCH_CUDA_ARCH_LIST={archs}", f"built for the GPU here alone ({archs}); {EVERYTHING}"


def main() -> None:
    import torch

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    setting, line = wish(os.environ, map(torch.cuda.get_device_capability, gpus))
    print(setting)
    if line:
        print(f"gradamp_fast: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
