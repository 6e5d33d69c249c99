"""The house's rules, read from its source: who may import whom, what no module does, how long things may get."""

import ast
import functools
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def name_of(path):
    """ "corpus.grammar" of nanogpt/corpus/grammar.py, "model" of nanogpt/model.py."""
    return ".".join(path.relative_to(REPOSITORY / path.relative_to(REPOSITORY).parts[0]).with_suffix("").parts)


TOPS = {"nanogpt", "stages", "tracking", "tools"}
PACKAGES = ["nanogpt", "nanogpt/corpus", "stages", "tracking", "tools"]
FOLDERS = {package: sorted((REPOSITORY / package).glob("*.py")) for package in PACKAGES}
ALL = [path for paths in FOLDERS.values() for path in paths]
BENCHMARKS = sorted((REPOSITORY / "benchmarks").glob("*.py"))
CORE = {name_of(path): path for path in ALL if path.parts[-2] in {"nanogpt", "corpus"} and path.stem != "__init__"}

# Which package may import which; imports go down only. What lies below all stands in LEAVES.
BELOW = {
    "tools": {"stages", "tracking", "nanogpt", "nanogpt.corpus"},
    "stages": {"tracking", "nanogpt", "nanogpt.corpus"},
    "tracking": {"nanogpt", "nanogpt.corpus"},
    "nanogpt": {"nanogpt.corpus"},
    "nanogpt.corpus": set(),
}
LEAVES = {"nanogpt.files", "nanogpt.params", "nanogpt.params_errors", "nanogpt.seeds"}

# Inside the core, low to high: a module imports from below its own line.
LEVELS = [
    {"portable_products"},
    {
        "files",
        "seeds",
        "startup",
        "collector",
        "corpus.decoding",
        "corpus.meta_pickle",
        "corpus.split",
        "corpus.batch_encoding",
        "distributed",
        "gpt_config",
        "loss",
        "ngrams",
        "params_errors",
        "portable",
        "scaling",
        "schedule",
        "tied_gradient",
    },
    {
        "sharding",
        "known_answers",
        "params",
        "corpus.grammar",
        "corpus.raw_text",
        "corpus.tokenizer",
        "corpus.token_files",
    },
    {
        "corpus.bpe_training",
        "corpus.huggingface_tokenizer",
        "corpus.nanogpt_bins",
        "corpus.separators",
        "corpus.floor",
        "corpus.parts",
        "batches",
        "dataset",
        "determinism",
        "model",
        "optimizer",
    },
    {"corpus.prepare", "corpus.text_files", "evaluate", "flops", "generate", "train_state", "weights"},
    {"checkpoint", "corpus.sources", "huggingface", "nanogpt_checkpoint", "saved_model", "sizing"},
    {"complete", "pretrained", "train"},
    {"dial", "dry_run", "recipe", "timing"},
]

MLFLOW = {"mlflow_client", "mlflow_model", "mlflow_models", "mlflow_run", "mlflow_server", "mlflow_sync"}
WITH_TORCH = {  # the only ones of the core that import it, by themselves or by what they import
    *(
        "batches",
        "checkpoint",
        "complete",
        "determinism",
        "dial",
        "distributed",
        "dry_run",
        "evaluate",
        "flops",
        "generate",
        "huggingface",
    ),
    *(
        "known_answers",
        "loss",
        "model",
        "ngrams",
        "nanogpt_checkpoint",
        "optimizer",
        "portable",
        "portable_products",
        "pretrained",
        "recipe",
        "saved_model",
        "sharding",
        "sizing",
        "timing",
    ),
    *("startup", "tied_gradient", "train", "train_state", "weights"),
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


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(paths):
    """(path, node) of all that these files hold."""
    return ((path, node) for path in paths for node in ast.walk(tree(path)))


@functools.cache
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


@functools.cache
def own(path):
    """Modules of ours that a file imports, as "nanogpt.corpus.grammar"."""
    found = {name for name in imports(path) if name.split(".")[0] in TOPS}
    return {name for name in found if (REPOSITORY / (name.replace(".", "/") + ".py")).is_file()}


def foreign(path):
    tops = {name.split(".")[0] for name in imports(path)}
    return tops - sys.stdlib_module_names - TOPS


def package_of(module):
    return module.rpartition(".")[0]


def closure(path):
    """The files of ours that a file imports, directly or not; itself included."""
    found, todo = set(), [path]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += [REPOSITORY / (name.replace(".", "/") + ".py") for name in own(file)]
    return found


# --- imports ----------------------------------------------------------------------------------------------------------


def test_imports_go_down():
    for path in ALL:
        package = ".".join(path.relative_to(REPOSITORY).parent.parts)
        for name in own(path) - LEAVES:
            assert package_of(name) in BELOW[package] | {package}, f"{path} imports {name}"


def test_the_core_has_levels():
    assert CORE.keys() == set().union(*LEVELS)
    level_of = {f"nanogpt.{module}": number for number, level in enumerate(LEVELS) for module in level}
    for module, path in CORE.items():
        for name in own(path):
            assert level_of[name] < level_of[f"nanogpt.{module}"], f"nanogpt.{module} imports {name}"


def test_stages_holds_the_five_stages():
    assert [path.stem for path in FOLDERS["stages"]] == [
        "__init__",
        "download",
        "evaluate",
        "sample",
        "tokenize",
        "train",
    ]


def test_the_core_knows_neither_dvc_nor_mlflow_nor_a_command_line():
    for path in CORE.values():
        assert not {"click", "dvc", "mlflow", "rich"} & foreign(path), path
        assert not re.search(r"dvc|mlflow|\bgit\b", path.read_text(encoding="utf-8"), re.IGNORECASE), path


def test_mlflow_is_imported_by_tracking_alone():
    assert {path.stem for path in ALL if "mlflow" in foreign(path)} == MLFLOW | {"gc"}  # asks which runs were deleted


def test_what_is_not_about_tensors_does_without_torch():
    found = {module for module, path in CORE.items() if any("torch" in foreign(file) for file in closure(path))}
    assert found == WITH_TORCH


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


def test_nothing_is_unpickled_or_executed():
    pickles = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    unsafe = {"allow_pickle": True, "shell": True, "weights_only": False, "trust_remote_code": True}
    assert [path for path in ALL if {name.split(".")[0] for name in imports(path)} & pickles] == []
    for path, node in nodes(ALL):
        place = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"eval", "exec", "compile", "__import__"}, place
            if ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), place
        elif isinstance(node, ast.Attribute):
            if path != CORE["nanogpt_checkpoint"]:  # nanoGPT's ckpt.pt has no other form
                assert ast.unparse(node) not in {"torch.load", "torch.save"}, place
        elif isinstance(node, ast.keyword):
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            assert unsafe.get(node.arg) is not value or value is None, place


def test_nothing_runs_when_a_module_is_imported():
    for path in ALL:
        for node in tree(path).body:
            place = f"{path}:{node.lineno}: {ast.unparse(node)}"
            if isinstance(node, ast.Expr):
                docstring = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
                assert docstring or ast.unparse(node) == RUN_BY_MLFLOW, place
            elif isinstance(node, ast.If):
                never = {"TYPE_CHECKING", "__name__ == '__main__'", "__name__ == '__main__' and (not __package__)"}
                assert ast.unparse(node.test) in never, place
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                calls = [ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)]
                assert {name for name in calls if not name.startswith("click.")} <= BUILDERS, place
            else:
                assert isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef), place


# --- size -------------------------------------------------------------------------------------------------------------


def test_files_and_functions_stay_small():
    for path in [*ALL, *BENCHMARKS]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
    for path, node in nodes([*ALL, *BENCHMARKS]):
        if isinstance(node, ast.FunctionDef):
            allowed = LONGER_FUNCTIONS.get((path.name, node.name), 60)
            assert node.end_lineno - node.lineno + 1 <= allowed, f"{path}: {node.name}"


def test_each_file_says_what_it_is_for():
    assert [path for path in ALL if not ast.get_docstring(tree(path))] == []
