"""Installation. Pure Python; the hosts are never pulled in, see requirements/hosts.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "qsd_plugin/__init__.py").read_text()).group(1)

# The folders a user edits lie at the top of the clone; an installed wheel carries them inside the package.
FOLDERS = {
    "qsd_plugin.tools": "tools",
    "qsd_plugin.model_zoo.configs": "configs",
    "qsd_plugin.model_zoo.projects": "projects",
}

setup(
    name="qsd_plugin",
    version=VERSION,
    description="Quality-aware training (QSD, QGFace, DIL, QUD) for fast-reid and InsightFace",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["qsd_plugin", "qsd_plugin.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "qsd_plugin": ["py.typed"],
        "qsd_plugin.model_zoo.configs": ["*.yml"],
        "qsd_plugin.model_zoo.projects": ["*/*.yml", "*/*/*.yml"],
    },
    install_requires=[
        "torch>=2.6",  # the methods
        "torchvision",  # fast-reid's transforms
        "numpy>=1.26",  # labels, ranking
        "scipy",  # sparse re-ranking
        "scikit-learn",  # imported by fast-reid's evaluator
        "pillow",  # decoding, degradations
        "opencv-python-headless",  # imported by fast-reid's visualiser and predictors
        "PyYAML",  # configs
        "yacs",  # fast-reid's CfgNode
        "tabulate",  # tables, as in fast-reid
        "termcolor",  # imported by fast-reid
        "tensorboard",  # fast-reid's event writer
        "faiss-cpu",  # imported by fast-reid's evaluation
        "tqdm",  # progress
        "matplotlib",  # pictures; imported by fast-reid's visualiser
    ],
    extras_require={
        "pretrained": ["gdown"],
        "enhance": ["scikit-image"],  # tools/visualize.py enhance: PSNR, SSIM, blur
        # Optional: training and evaluation never load them, and new Pythons wait months for onnxruntime's wheels.
        "export": [
            "onnx",  # tools/export_model.py --onnx: the file format, its checker and metadata
            "onnxscript",  # torch's exporter (2.9 and later) is written in it
            "onnxruntime",  # runs the exported file beside torch before it is kept
            "safetensors",  # tools/export_model.py --safetensors
        ],
    },
    entry_points={
        "console_scripts": [
            "qsd-train=qsd_plugin.tools.train_net:main",
            "qsd-train-arcface=qsd_plugin.tools.train_arcface:main",
            "qsd-arcface-shards=qsd_plugin.tools.arcface_shards:main",
            "qsd-export=qsd_plugin.tools.export_model:main",
            "qsd-doctor=qsd_plugin.tools.doctor:main",
            "qsd-data=qsd_plugin.tools.build_data:main",
            "qsd-experiment=qsd_plugin.tools.experiment:main",
            "qsd-compare=qsd_plugin.tools.compare:main",
            "qsd-labels=qsd_plugin.tools.quality_labels:main",
            "qsd-weights=qsd_plugin.tools.convert_weights:main",
            "qsd-visualize=qsd_plugin.tools.visualize:main",
        ]
    },
)
