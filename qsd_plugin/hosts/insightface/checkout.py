"""The user's arcface_torch checkout: found by path, checked by the names and signatures that the plugin relies on.

Nothing of it is copied or changed. A checkout that was modified is welcome as long as these contracts hold; where one
does not, the refusal says which, and what was found instead.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from qsd_plugin.core.errors import HostError

#: The script that is run, and by which a checkout is recognised.
SCRIPT = "train_v2.py"
#: Every file that something is taken from.
FILES = (
    SCRIPT,
    "backbones/__init__.py",
    "configs/base.py",
    "dataset.py",
    "eval/verification.py",
    "losses.py",
    "lr_scheduler.py",
    "partial_fc_v2.py",
    "utils/utils_callbacks.py",
    "utils/utils_config.py",
    "utils/utils_distributed_sampler.py",
)
#: Where the trainer lies in a clone of deepinsight/insightface.
IN_CLONE = Path("recognition") / "arcface_torch"
#: What the script must import, and from where.
IMPORTS = {"get_model": "backbones", "get_dataloader": "dataset", "PartialFC_V2": "partial_fc_v2"}
#: How often the script passes positional arguments to what is replaced: at least this many.
CALLS = {"get_model": 1, "get_dataloader": 7, "PartialFC_V2": 4}


@dataclass(frozen=True)
class Contract:
    """Parameters that something in the host must begin with; what follows needs a default.

    Args:
        module: Module of the host.
        name: Function, class or method in it.
        parameters: Their names in order, without ``self``; ``**`` for any keyword.
    """

    module: str
    name: str
    parameters: tuple[str, ...]

    def difference(self) -> str | None:
        """What differs, in words; ``None`` where the contract holds."""
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            if not hasattr(found, part):
                return f"{self.module} has no {self.name}"
            found = getattr(found, part)
        try:
            signature = inspect.signature(found)
        except (TypeError, ValueError):
            return f"{self.module}.{self.name} is no function or class"
        parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
        names = tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)
        wanted = len(self.parameters)
        rest = [
            p for p in parameters[wanted:] if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if names[:wanted] != self.parameters or rest:
            return f"{self.module}.{self.name}({', '.join(names)}) instead of ({', '.join(self.parameters)})"
        return None


CONTRACTS = (
    Contract("backbones", "get_model", ("name", "**")),
    Contract(
        "dataset",
        "get_dataloader",
        ("root_dir", "local_rank", "batch_size", "dali", "dali_aug", "seed", "num_workers"),
    ),
    Contract("dataset", "MXFaceDataset", ("root_dir", "local_rank")),
    Contract("dataset", "ImageFolder", ("root", "transform")),
    Contract("dataset", "DataLoaderX", ("local_rank", "**")),
    Contract("dataset", "BackgroundGenerator", ("generator", "local_rank")),
    Contract("partial_fc_v2", "PartialFC_V2", ("margin_loss", "embedding_size", "num_classes", "sample_rate", "fp16")),
    Contract("partial_fc_v2", "PartialFC_V2.forward", ("local_embeddings", "local_labels")),
    Contract("losses", "CombinedMarginLoss", ("s", "m1", "m2", "m3", "interclass_filtering_threshold")),
    Contract("losses", "CombinedMarginLoss.forward", ("logits", "labels")),
    Contract("lr_scheduler", "PolynomialLRWarmup", ("optimizer", "warmup_iters", "total_iters")),
    Contract("utils.utils_config", "get_config", ("config_file",)),
    Contract("eval.verification", "load_bin", ("path", "image_size")),
    Contract("eval.verification", "test", ("data_set", "backbone", "batch_size", "nfolds")),
)


def find_checkout(path: Path) -> Path:
    """The trainer's folder of a checkout.

    Args:
        path: That folder, or a clone of the whole repository.

    Raises:
        HostError: There is none, or it has another layout.
    """
    path = path.expanduser()
    root = next((folder for folder in (path, path / IN_CLONE) if (folder / SCRIPT).is_file()), None)
    if root is None:
        raise HostError(
            "arcface_torch checkout",
            value=str(path),
            expected=f"a folder with {SCRIPT}, or a clone of deepinsight/insightface with {IN_CLONE}/{SCRIPT}",
            remedy="Clone https://github.com/deepinsight/insightface and pass its folder as --host-root.",
        )
    missing = [name for name in FILES if not (root / name).is_file()]
    if missing:
        raise HostError(
            f"arcface_torch checkout {root}: unknown layout",
            value=f"no {', '.join(missing)}",
            expected="the layout of deepinsight/insightface since 2022 (train_v2.py with partial_fc_v2.py)",
        )
    _check_script(root / SCRIPT)
    return root.resolve()


def check_contracts(root: Path) -> None:
    """Compare names and signatures of the host's imported modules with :data:`CONTRACTS`.

    Raises:
        HostError: Some differ; all of them are listed.
    """
    differences = [text for contract in CONTRACTS if (text := contract.difference())]
    if differences:
        raise _differs(root, differences)


@contextmanager
def on_path(root: Path) -> Iterator[None]:
    """Inside, the host's modules are found first; they have names as general as ``utils``.

    Raises:
        HostError: Modules of these names have been imported from elsewhere.
    """
    for name in sorted({Path(file).parts[0].removesuffix(".py") for file in FILES}):
        module = sys.modules.get(name)
        if module is None:
            continue
        if not getattr(module, "__file__", None):  # a folder of that name somewhere on the path
            del sys.modules[name]
        elif root not in Path(str(module.__file__)).resolve().parents:
            raise HostError(
                f"A module called {name!r} has been imported already",
                value=module.__file__,
                expected=f"that of {root}",
                remedy="Start the training in a process of its own: tools/train_arcface.py.",
            )
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(root))


def host_module(name: str) -> ModuleType:
    """A module of the host, which is on the path.

    Raises:
        HostError: It cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise HostError(
            f"arcface_torch's module {name!r} cannot be imported",
            value=str(error),
            remedy="Install what the checkout needs besides torch: pip install easydict (mxnet is not needed here).",
        ) from error


def _check_script(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"), str(script))
    imported = {
        alias.asname or alias.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    differences = [
        f"it takes {name} from {imported.get(name, 'nowhere')}, not from {module}"
        for name, module in IMPORTS.items()
        if imported.get(name) != module
    ]
    calls: dict[str, list[int]] = {name: [] for name in CALLS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
            calls[node.func.id].append(len(node.args))
    for name, least in CALLS.items():
        if not calls[name] or min(calls[name]) < least:
            differences.append(f"it calls {name} with {calls[name]} positional arguments, not with {least} or more")
    if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
        differences.append("it has no function main")
    if differences:
        raise _differs(script, differences)


def _differs(where: Path, differences: list[str]) -> HostError:
    return HostError(
        f"{where} is not the trainer that the plugin knows",
        value="; ".join(differences),
        remedy="Undo these changes, or train with the version that the plugin was tested with: see "
        "projects/InsightFace/README.md.",
    )
