"""What identifies a training: hashes of its inputs and code, its fingerprint; and the environment."""

import ast
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.collector import collector_paused
from nanogpt.files import sha256_json, sha256_tree

if TYPE_CHECKING:
    from nanogpt.distributed import Ranks
    from nanogpt.recipe import Recipe

# Code that cannot change a result: it checks parameters, shows progress, chooses the run to continue, or records it. No
# stage declares it in dvc.yaml, and neither counts what only this code imports.
PLUMBING = ("nanogpt/params.py", "tracking/")
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def import_closure(root: Path, module: str) -> list[str]:
    """The module's file and all files of the repository that it imports, directly or not; without plumbing.

    Paths are relative to `root`, sorted. Reads the source and runs nothing, so imports inside functions count. The
    `__init__.py` of packages are left out, as they contain only docstrings (a test checks that).
    """
    return sorted(_closure(root, module))


def _closure(root: Path, module: str) -> dict[str, ast.Module]:
    """The syntax trees of the files of `import_closure`."""
    trees: dict[str, ast.Module] = {}
    todo = [module.replace(".", "/") + ".py"]
    while todo:
        path = todo.pop()
        if path in trees or path.startswith(PLUMBING):
            continue
        trees[path] = ast.parse((root / path).read_text(encoding="utf-8"))
        todo += [
            candidate
            for name in _imported_names(trees[path])
            if (root / (candidate := name.replace(".", "/") + ".py")).is_file()
        ]
    return trees


def _imported_names(tree: ast.AST) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def code_hash(root: Path, module: str) -> str:
    """Hash of the code in a module's import closure, without its comments, docstrings and formatting."""
    with collector_paused():
        return sha256_json({path: _as_json(tree) for path, tree in _closure(root, module).items()})


def code_of(source: str) -> Any:
    """The syntax tree of a source file as JSON, without docstrings and line numbers.

    Empty fields are left out, since new versions of Python add some.
    """
    return _as_json(ast.parse(source))


def _as_json(node: Any) -> Any:
    if isinstance(node, ast.AST):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, {name: _as_json(value) for name, value in fields.items()}]
    return [_as_json(each) for each in node] if isinstance(node, list) else repr(node)


def fingerprint(params: dict[str, Any], inputs: dict[str, str], code: str, numerics: dict[str, Any]) -> str:
    """Hash of everything that determines a run's bits: parameters, input hashes, code hash, resolved numerics.

    A training with the fingerprint of a killed run continues it.
    """
    return sha256_json({"params": params, "inputs": inputs, "code": code, "numerics": numerics})


def identify(recipe: "Recipe") -> dict[str, str]:
    """The hashes by which a run is found: fingerprint, tokens, code and, unless they are random, initial weights."""
    inputs = {"tokens": sha256_tree(recipe.data.directory), "initial": recipe.initial.sha256}
    code = code_hash(Path.cwd(), "stages.train")
    hashes = {
        "fingerprint": fingerprint(_params_of(recipe), inputs, code, recipe.numerics.identity()),
        "tokens.sha256": inputs["tokens"],
        "code.sha256": code,
    }
    return hashes if recipe.initial.weights is None else {**hashes, "initial.sha256": inputs["initial"]}


def check_agreement(recipe: "Recipe", hashes: dict[str, str], ranks: "Ranks") -> None:
    """Raises ValueError unless all processes of a training have the same code, parameters and data.

    They must make the same decisions, so the intervals count as well, although they change no result. The resolved
    numerics, which may differ between machines, do not.
    """
    runtime = recipe.params.runtime
    params = _params_of(recipe) | {"intervals": (runtime.log_interval, runtime.checkpoint_interval)}
    inputs = {"tokens": hashes["tokens.sha256"], "initial": recipe.initial.sha256}
    own = fingerprint(params, inputs, hashes["code.sha256"], recipe.params.numerics.model_dump())
    if ranks.broadcast(own) != own:
        raise ValueError(
            "not all processes of this training have the same code, parameters and data; on each machine check out the "
            "same commit and `dvc pull`"
        )


def _params_of(recipe: "Recipe") -> dict[str, Any]:
    """The parameters that a training depends on."""
    values = recipe.settings()
    if recipe.params.numerics.determinism == "off":  # only the last bits depend on them, so a run may go on with others
        values.pop("train.processes")
        values.pop("train.parallel", None)
    return values


def environment() -> dict[str, str]:
    """Versions and hardware that may change bits, for the record; they are not part of the fingerprint."""
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
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
