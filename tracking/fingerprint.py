"""Where a result comes from: content hashes, the code that made it, the run's fingerprint, the environment."""

import ast
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt.files import sha256_json, sha256_tree
from nanogpt.params import flatten

if TYPE_CHECKING:
    from nanogpt.distributed import Ranks
    from nanogpt.recipe import Recipe

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
    """Hash of the code in a module's import closure: not of its comments, docstrings and formatting."""
    return sha256_json(
        {path: code_of((root / path).read_text(encoding="utf-8")) for path in import_closure(root, module)}
    )


def code_of(source: str) -> Any:
    """What a source file computes, as JSON: its syntax tree without docstrings and places.

    Fields that are empty are left out, since each version of Python adds some.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                del node.body[0]
    return _as_json(tree)


def _as_json(node: Any) -> Any:
    if isinstance(node, ast.AST):
        fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
        return [type(node).__name__, {name: _as_json(value) for name, value in fields.items()}]
    return [_as_json(each) for each in node] if isinstance(node, list) else repr(node)


def fingerprint(params: dict[str, Any], inputs: dict[str, str], code: str, numerics: dict[str, Any]) -> str:
    """Hash of all that determines a run's bits: parameters, input hashes, code hash, resolved numerics.

    Two runs with the same fingerprint are the same run; one that was killed is continued.
    """
    return sha256_json({"params": params, "inputs": inputs, "code": code, "numerics": numerics})


def identify(recipe: "Recipe") -> dict[str, str]:
    """What a run is found by: the fingerprint, and the hashes of tokens, code and, unless new, initial weights."""
    inputs = {"tokens": sha256_tree(recipe.data.directory), "initial": recipe.initial.sha256}
    code = code_hash(Path.cwd(), "stages.train")
    hashes = {
        "fingerprint": fingerprint(_read(recipe), inputs, code, recipe.numerics.of_the_bits()),
        "tokens.sha256": inputs["tokens"],
        "code.sha256": code,
    }
    return hashes if recipe.initial.weights is None else {**hashes, "initial.sha256": inputs["initial"]}


def check_agreement(recipe: "Recipe", hashes: dict[str, str], ranks: "Ranks") -> None:
    """Raises ValueError unless all processes of a training have the same code, parameters and data.

    All must come to the same decisions, so the intervals, which change no result, count as well; what differs from
    machine to machine (the resolved numerics) does not.
    """
    runtime = recipe.params.runtime
    read = _read(recipe) | {"intervals": (runtime.log_interval, runtime.checkpoint_interval)}
    inputs = {"tokens": hashes["tokens.sha256"], "initial": recipe.initial.sha256}
    same = fingerprint(read, inputs, hashes["code.sha256"], recipe.params.numerics.model_dump())
    if ranks.tell(same) != same:
        raise ValueError(
            "not all processes of this training have the same code, parameters and data; on each machine check out the "
            "same commit and `dvc pull`"
        )


def _read(recipe: "Recipe") -> dict[str, Any]:
    """The parameters that a training depends on."""
    params = recipe.params
    read = flatten(params.model, "model.") | flatten(params.train, "train.")
    if params.numerics.determinism == "off":
        del read["train.processes"]  # it changes the last bits alone, so more or fewer of them may go on with a run
    return read


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
