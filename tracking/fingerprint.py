"""Where a result comes from: content hashes, the code that made it, the run's fingerprint, the environment."""

import ast
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from nanogpt.files import sha256_file, sha256_json

# What cannot change a result: it checks parameters, shows progress, chooses the run to go on with, or records it. No
# stage declares it in dvc.yaml, and what only it imports does not count either.
PLUMBING = ("nanogpt/params.py", "tracking/")


def import_closure(root: Path, module: str) -> list[str]:
    """Files of the repository that `module` imports, directly or not, lazily or not; itself included, plumbing not.

    Paths are relative to `root`, sorted. Found in the source, so that an import inside a function counts and nothing
    is run. Packages' own `__init__.py` hold docstrings alone (a test sees to it) and are left out.
    """
    seen: set[str] = set()
    todo = [module.replace(".", "/") + ".py"]
    while todo:
        path = todo.pop()
        if path in seen or path.startswith(PLUMBING):
            continue
        seen.add(path)
        todo += [
            candidate
            for name in _imported_names(ast.parse((root / path).read_text(encoding="utf-8")))
            if (root / (candidate := name.replace(".", "/") + ".py")).is_file()
        ]
    return sorted(seen)


def _imported_names(tree: ast.AST) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def code_hash(root: Path, module: str) -> str:
    """Hash of the files in a module's import closure."""
    return sha256_json({path: sha256_file(root / path) for path in import_closure(root, module)})


def fingerprint(params: dict[str, Any], inputs: dict[str, str], code: str, numerics: dict[str, Any]) -> str:
    """Hash of all that determines a run's bits: parameters, input hashes, code hash, resolved numerics.

    Two runs with the same fingerprint are the same run; one that was killed is continued.
    """
    return sha256_json({"params": params, "inputs": inputs, "code": code, "numerics": numerics})


def environment() -> dict[str, str]:
    """What the pinned environment cannot pin, and the versions that change bits. For the record, not for the hash."""
    packages = ("torch", "numpy", "tiktoken", "tokenizers", "transformers", "datasets", "safetensors", "dvc", "mlflow")
    return {
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        **{name: metadata.version(name) for name in packages},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
