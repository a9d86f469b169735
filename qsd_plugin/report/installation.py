"""What is installed here, and what about it will cause trouble."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

import qsd_plugin

#: What the methods, the tools and the host import.
PACKAGES = (
    "fastreid",
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "opencv-python-headless",
    "PyYAML",
    "yacs",
    "tabulate",
    "termcolor",
    "tensorboard",
    "faiss-cpu",
    "tqdm",
    "matplotlib",
)
_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
#: Requirements that the fastreid wheel declares and that its use here deliberately does not meet.
EXPECTED_PIP_CHECK = ("fastreid 1.4.0 has requirement",)


def versions() -> list[tuple[str, str]]:
    """``(package, version)``, ``missing`` where it is not installed."""
    python = f"{platform.python_version()} ({sys.executable})"
    return [("python", python), ("qsd_plugin", qsd_plugin.__version__), *((name, version(name)) for name in PACKAGES)]


def version(package: str) -> str:
    """Installed version of a distribution, or ``missing``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def device() -> str:
    """The devices torch can use."""
    if not torch.cuda.is_available():
        return f"CPU only, {torch.get_num_threads()} threads (GPU rows of the patch table are not exercised here)"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{len(names)} GPU(s): {', '.join(names)}"


def problems() -> list[str]:
    """Sentences about what is missing or doubled, each with its remedy."""
    found = []
    missing = [name for name in PACKAGES if version(name) == "missing" and name != "opencv-python-headless"]
    if missing:
        found.append(f"Not installed: {', '.join(missing)}. Run: pip install -r requirements/runtime.txt.")
    opencv = [name for name in _OPENCV if version(name) != "missing"]
    if len(opencv) > 1:
        found.append(
            f"Several packages own the module cv2: {', '.join(opencv)}. Keep one: "
            f"pip uninstall {' '.join(opencv[1:])}, then reinstall {opencv[0]}."
        )
    elif not opencv:
        found.append("Not installed: opencv-python-headless, which fast-reid imports. Run: make venv.")
    if version("torch").partition("+")[0] == "2.13.0" and version("torchvision") != "missing":
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError) as error:
            found.append(f"torchvision does not fit this torch ({error}). A matching pair: torch 2.12.1 and 0.27.1.")
    return found
