"""The house's rules, read from its source: who may import whom, what no module does, how long things may get."""

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CORE = {path.stem: path for path in (REPOSITORY / "nanogpt").glob("*.py") if path.stem != "__init__"}
ALL = [path for package in ("nanogpt", "stages", "tools") for path in sorted((REPOSITORY / package).glob("*.py"))]

# Low to high; a module imports from its own level or from below. Each line: a module, and all that it imports of ours.
LEVELS: list[dict[str, set[str]]] = [
    {
        "counter": set(),
        "files": set(),
        "meta_pickle": set(),
        "params": {"files"},
        "provenance": set(),
        "journal": set(),
        "grammar": {"counter"},
        "tokenizer": {"files", "words"},
        "words": set(),
        "numerics": {"params"},
        "replicator": set(),
        "mlflow_server": {"journal"},
        "tracking_page": {"journal"},
        "tracking_models": {"journal", "tracking_page"},
        "tracking": {"files", "journal", "mlflow_server", "tracking_models", "tracking_page"},
        "tracking_follow": {"journal", "mlflow_server", "tracking"},
    },
    {
        "raw": {"files"},
        "corpus": {"grammar", "params", "raw"},
        "data": {"counter", "files"},
        "given": {"data", "meta_pickle", "raw", "tokenizer"},
        "prepare": {"data", "files", "given", "params", "raw", "tokenizer"},
        "floor": {"grammar", "tokenizer"},
        "loss": set(),
        "model": {"loss"},
        "flops": {"model"},
        "sizing": {"flops", "loss", "model"},
    },
    {
        "optim": {"params"},
        "distributed": set(),
        "evaluate": {"loss", "model"},
        "generate": {"counter", "model"},
        "pretrained": {"files", "model"},
        "published": {"files", "model", "provenance", "tokenizer"},
    },
    {
        "checkpoint": {"files", "journal", "provenance"},
        "complete": {"generate", "published", "tokenizer"},
        "initial": {"model", "params", "pretrained", "published", "tokenizer"},
    },
    {
        "train": {"checkpoint", "counter", "data", "distributed", "evaluate", "journal", "model", "optim", "params"},
        "mlflow_model": {"complete", "published"},
    },
]
EDGES = {module: imports for level in LEVELS for module, imports in level.items()}

MLFLOW = {"mlflow_model", "mlflow_server", "tracking", "tracking_follow", "tracking_models"}
WITHOUT_TORCH = {  # not even by what they import
    *(
        "corpus",
        "counter",
        "data",
        "files",
        "floor",
        "given",
        "grammar",
        "journal",
        "meta_pickle",
        "mlflow_server",
        "params",
    ),
    *(
        "prepare",
        "provenance",
        "raw",
        "replicator",
        "tokenizer",
        "tracking",
        "tracking_follow",
        "tracking_models",
        "tracking_page",
    ),
}
LONGER_FUNCTIONS = {("train.py", "train"): 80}  # the loop, top to bottom in one place

# What a constant may be made with: nothing that reads, writes or takes long.
BUILDERS = {
    "Field",
    "Lexicon",
    "Path",
    "Remote",
    "TypeVar",
    "_words",
    "frozenset",
    "functools.cache",
    "len",
    "re.compile",
    "str",
}
RUN_BY_MLFLOW = "set_model(Model())"  # mlflow_model.py is a script of MLflow's "models from code"


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """Dotted names of all that a file imports, at its top or lazily; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own(module):
    return {name.split(".")[1] for name in imports(CORE[module]) if name.startswith("nanogpt.")} & CORE.keys()


def foreign(path):
    tops = {name.split(".")[0] for name in imports(path)}
    return tops - sys.stdlib_module_names - {"nanogpt", "stages", "tools"}


def closure(module):
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += EDGES[name]
    return found


# --- imports ----------------------------------------------------------------------------------------------------------


def test_every_module_of_the_core_has_its_place():
    assert CORE.keys() == EDGES.keys()


@pytest.mark.parametrize("module", sorted(EDGES))
def test_a_module_imports_what_the_table_says(module):
    assert own(module) == EDGES[module]


def test_nobody_imports_from_above_and_there_is_no_circle():
    level_of = {module: number for number, level in enumerate(LEVELS) for module in level}
    for module, imported in EDGES.items():
        assert all(level_of[name] <= level_of[module] for name in imported), module
        assert not any(module in closure(name) for name in imported), f"{module} imports itself in a circle"


def test_the_core_knows_neither_stages_nor_tools_nor_click_nor_dvc():
    for path in CORE.values():
        assert not {"click", "dvc", "rich"} & foreign(path), path
        assert not [name for name in imports(path) if name.split(".")[0] in {"stages", "tools"}], path


def test_mlflow_is_imported_by_tracking_alone():
    assert {module for module in CORE if "mlflow" in foreign(CORE[module])} == MLFLOW
    others = [path.name for path in ALL if path.parent.name != "nanogpt" and "mlflow" in foreign(path)]
    assert others == ["gc.py"]  # asks MLflow which runs were deleted
    assert not closure("train") & MLFLOW


def test_what_is_not_about_tensors_does_without_torch():
    for module in WITHOUT_TORCH:
        users = {name for name in closure(module) if "torch" in foreign(CORE[name])}
        assert not users, f"{module} imports torch by {users}"


def test_slow_libraries_are_imported_where_they_are_needed_and_not_at_the_top():
    for path in ALL:
        top = {alias for node in tree(path).body for alias in _names(node)}
        allowed = {"mlflow"} if path.name == "mlflow_model.py" else set()
        slow = {"mlflow", "transformers", "datasets", "tiktoken", "tokenizers", "matplotlib", "pyarrow"} - allowed
        assert not {name.split(".")[0] for name in top} & slow, path


def _names(node):
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module} if isinstance(node, ast.ImportFrom) else set()


# --- what no module does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_unpickled_or_executed(path):
    pickles = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not {name.split(".")[0] for name in imports(path)} & pickles
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"eval", "exec", "compile", "__import__"}, node.lineno
            if ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), node.lineno
        elif isinstance(node, ast.Attribute) and path != CORE["pretrained"]:  # nanoGPT's ckpt.pt has no other form
            assert ast.unparse(node) not in {"torch.load", "torch.save"}, node.lineno
        elif isinstance(node, ast.keyword):
            unsafe = {"allow_pickle": True, "shell": True, "weights_only": False, "trust_remote_code": True}
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            assert unsafe.get(node.arg) is not value or value is None, ast.unparse(node)


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_runs_when_a_module_is_imported(path):
    for node in tree(path).body:
        if isinstance(node, ast.Expr):
            docstring = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            assert docstring or ast.unparse(node) == RUN_BY_MLFLOW, ast.unparse(node)
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) in {"TYPE_CHECKING", "__name__ == '__main__'"}, ast.unparse(node.test)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            calls = [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
            unknown = {name for name in calls if not name.startswith("click.")} - BUILDERS
            assert not unknown, f"line {node.lineno} calls {unknown}"
        else:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef), ast.unparse(node)


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_and_functions_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            allowed = LONGER_FUNCTIONS.get((path.name, node.name), 60) if path.parent.name == "nanogpt" else 60
            assert node.end_lineno - node.lineno + 1 <= allowed, node.name


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_each_file_says_what_it_is_for(path):
    assert ast.get_docstring(tree(path))
