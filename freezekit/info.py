"""`python -m freezekit.info`: what this build is, and what it can run on here."""

import platform
from typing import Any

import torch

import freezekit
from freezekit import _extension


def info() -> dict[str, Any]:
    """Versions, whether CUDA kernels are in and for which architectures, and the devices that torch sees.

    >>> sorted(info())
    ['cuda_archs', 'cuda_kernels', 'devices', 'emulated_kernels', 'freezekit', 'nvcc', 'platform', 'python', 'torch', \
'torch_at_build']
    """
    import freezekit._C as _C

    built = _extension.build_info()
    return {
        "freezekit": freezekit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_at_build": built["torch"],
        "nvcc": built["cuda"],
        "cuda_kernels": _C.has_cuda_kernels(),
        "cuda_archs": built["archs"],
        "emulated_kernels": _extension.emulated_kernels().exists(),
        "devices": [_device(i) for i in range(torch.cuda.device_count())]
        + [f"cpu ({torch.get_num_threads()} threads)"],
    }


def _device(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})"


def describe() -> str:
    """The lines that `python -m freezekit.info` prints."""
    facts = info()
    archs = ", ".join(f"sm_{arch}" for arch in facts["cuda_archs"])
    kernels = f"yes, for {archs} (nvcc {facts['nvcc']})" if facts["cuda_kernels"] else "no, built without nvcc"
    rows = [
        ("freezekit", facts["freezekit"]),
        ("python", f"{facts['python']} on {facts['platform']}"),
        ("torch", f"{facts['torch']} (built for {facts['torch_at_build']})"),
        ("CUDA kernels", kernels),
        ("emulated kernels", "yes" if facts["emulated_kernels"] else "no"),
        *(("device", device) for device in facts["devices"]),
    ]
    return "\n".join(f"{name:<17} {value}" for name, value in rows)


if __name__ == "__main__":
    print(describe())
