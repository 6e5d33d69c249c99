"""Where a result comes from: content hashes, the code that made it, the run's fingerprint, the environment."""

import ast
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

# Cannot change a result: they check parameters, show progress, choose the run to go on with, or report to MLflow.
# No stage declares them in dvc.yaml, and what only they import does not count either.
PLUMBING = (
    "nanogpt/params.py",
    "nanogpt/replicator.py",
    "nanogpt/tracking.py",
    "stages/attempt.py",
    "stages/console.py",
    "stages/dvcfile.py",
    "stages/launch.py",
    "stages/preview.py",
    "stages/profile.py",
    "stages/report.py",
    "stages/stop.py",
)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(directory: Path) -> str:
    """One hash for a directory: of the names and contents of all its files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return sha256_json({path.relative_to(directory).as_posix(): sha256_file(path) for path in files})


def sha256_json(value: Any) -> str:
    """Hash of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def import_closure(root: Path, module: str) -> list[str]:
    """Files of the repository that `module` imports, directly or not, lazily or not; itself included, plumbing not.

    Paths are relative to `root`, sorted. Found in the source, so that an import inside a function counts and nothing
    is run. Packages' own `__init__.py` hold docstrings alone (a test sees to it) and are left out.
    """
    seen: set[str] = set()
    todo = [module.replace(".", "/") + ".py"]
    while todo:
        path = todo.pop()
        if path in seen or path in PLUMBING:
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


def git(root: Path, *arguments: str) -> str:
    """Output of a git command in `root`, without the last newline; empty where git or the repository is missing."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.decode(errors="replace").rstrip("\n")
