import ast
from importlib import metadata
from pathlib import Path

import pytest

from nanogpt.files import sha256_file, sha256_json, sha256_tree
from nanogpt.recipe import Recipe
from tests.conftest import committed_params
from tracking import fingerprint as provenance
from tracking.fingerprint import code_hash, code_of, fingerprint, import_closure

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("nanogpt", "stages", "tracking", "tools")


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_file_is_the_sha256_of_its_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


TREE = {"a": "1", "b": "2", "deep/c": "3"}


@pytest.mark.parametrize(
    "other",
    [
        {**TREE, "a": "x"},
        {"A": "1", "b": "2", "deep/c": "3"},
        {"a": "1", "b": "2", "other/c": "3"},
        {"a": "2", "b": "1", "deep/c": "3"},
        {"a": "1", "b": "2"},
        {**TREE, "empty": ""},
        {**TREE, ".hidden": "4"},
    ],
)
def test_the_hash_of_a_tree_changes_with_any_name_or_content(tmp_path, other):
    for name, files in (("one", TREE), ("same", dict(reversed(TREE.items()))), ("other", other)):
        write(tmp_path / name, files)
    assert sha256_tree(tmp_path / "one") == sha256_tree(tmp_path / "same") != sha256_tree(tmp_path / "other")


def test_the_hash_of_a_json_value_depends_on_the_order_of_lists_but_not_of_keys():
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    different = [
        {"a": 1, "b": [2, 1]},
        {"a": 1.0, "b": [1, 2]},
        {"a": "1", "b": [1, 2]},
        {"a": 1, "b": [1, 2], "c": None},
    ]
    assert sha256_json({"a": 1, "b": [1, 2]}) not in map(sha256_json, different)


PARTS = {
    "params": {"train.seed": 1, "train.learning_rate": 1e-3},
    "inputs": {"data/tokens": "aa"},
    "code": "cc",
    "numerics": {"threads": 2, "device": "cpu"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"train.seed": 2, "train.learning_rate": 1e-3}},
        {"params": {"train.seed": 1, "train.learning_rate": 1.0000000000000002e-3}},
        {"params": {"train.seed": 1}},
        {"inputs": {"data/tokens": "ab"}},
        {"inputs": {"data/token": "aa"}},
        {"code": "cd"},
        {"numerics": {"threads": 1, "device": "cpu"}},
    ],
)
def test_a_fingerprint_changes_with_each_of_its_parts(change):
    assert fingerprint(**PARTS) == fingerprint(**{name: PARTS[name] for name in reversed(PARTS)})
    assert fingerprint(**PARTS) != fingerprint(**{**PARTS, **change})


# --- imports ----------------------------------------------------------------------------------------------------------

PACKAGE = {
    "pkg/__init__.py": '"""A package."""\n',
    "pkg/entry.py": "import os\nimport pkg.plain\nfrom pkg import module, name_of_nothing\n",
    "pkg/plain.py": "import pkg.entry  # a circle\n\ndef f():\n    from pkg.lazy import value\n",
    "pkg/module.py": "import torch\nfrom pkg import tool\n",
    "pkg/lazy.py": "if True:\n    try:\n        import pkg.deep.leaf as leaf\n    finally:\n        value = 1\n",
    "pkg/deep/leaf.py": "from os import path\n",
    "pkg/tool.py": "from pkg import only_for_the_tool\n",
    "pkg/only_for_the_tool.py": "",
    "pkg/typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.lazy import value\n",
    "pkg/unused.py": "",
    "torch.py.not": "",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PLUMBING", ("pkg/tool.py",))
    write(tmp_path, PACKAGE)
    return tmp_path


def test_the_closure_includes_lazy_nested_and_module_imports_but_no_plumbing(package):
    assert import_closure(package, "pkg.entry") == [
        "pkg/deep/leaf.py",
        "pkg/entry.py",
        "pkg/lazy.py",
        "pkg/module.py",
        "pkg/plain.py",
    ]


def test_imports_for_types_count_too(package):
    assert "pkg/lazy.py" in import_closure(package, "pkg.typed")


def test_what_plumbing_imports_counts_when_something_else_imports_it_too(package):
    (package / "pkg/plain.py").write_text("import pkg.only_for_the_tool\n")
    assert "pkg/only_for_the_tool.py" in import_closure(package, "pkg.entry")


@pytest.mark.parametrize(
    ("edited", "changes"), [("deep/leaf", True), ("entry", True), ("tool", False), ("unused", False)]
)
def test_the_hash_of_the_code_changes_with_what_is_imported_and_nothing_else(package, edited, changes):
    before = code_hash(package, "pkg.entry")
    path = package / "pkg" / f"{edited}.py"
    path.write_text(path.read_text() + "edited = True\n")
    assert (code_hash(package, "pkg.entry") != before) is changes


CODE = '''"""A module."""

def double(x: int = 1, *, strict: bool = False) -> int:
    """Twice x."""
    return x * 2 if strict else f"{x}" + "2"
'''
SAME = {
    "a comment": CODE.replace("    return", "    # Why.\n    return"),
    "other docstrings": CODE.replace("A module.", "The module.").replace("Twice x.", "x, twice."),
    "no docstrings": CODE.replace('    """Twice x."""\n', "").replace('"""A module."""\n', ""),
    "formatting": CODE.replace("x: int = 1, *,", "x: int = 1,\n    *,").replace('"2"', "'2'").replace("x * 2", "(x*2)"),
}
OTHER = {
    "a constant": CODE.replace("* 2", "* 3"),
    "a type of constant": CODE.replace("* 2", "* 2.0"),
    "a sign": CODE.replace("* 2", "* -2"),
    "a default": CODE.replace("= 1", "= 0"),
    "false or none": CODE.replace("= False", "= None"),
    "a name": CODE.replace("double", "twice"),
    "an operator": CODE.replace("x * 2", "x + 2"),
    "text inside an f-string": CODE.replace('f"{x}"', 'f"{x!r}"'),
    "a string that is no docstring": CODE.replace('"2"', '"3"'),
    "a decorator": CODE.replace("def", "@cache\ndef"),
}


@pytest.mark.parametrize("edit", SAME)
def test_comments_docstrings_and_formatting_do_not_count_as_code(edit):
    assert SAME[edit] != CODE
    assert code_of(SAME[edit]) == code_of(CODE)


@pytest.mark.parametrize("edit", OTHER)
def test_everything_else_counts_as_code(edit):
    assert code_of(OTHER[edit]) != code_of(CODE)


def sources():
    return [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


def test_packages_contain_only_a_docstring_since_the_closure_leaves_them_out():
    for path in sources():
        if path.name == "__init__.py":
            assert all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body), path


def test_there_are_no_imports_that_the_closure_cannot_see():
    for path in sources():
        if str(path.relative_to(REPOSITORY)).startswith((*provenance.PLUMBING, "tools/__main__.py")):
            continue  # the latter imports the command that is called; no stage imports it
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
            assert name not in {"import_module", "__import__", "run_module", "run_path"}, f"{path}: an import by name"


def test_the_plumbing_exists():
    assert all((REPOSITORY / path).exists() for path in provenance.PLUMBING)


@pytest.mark.parametrize(
    ("stage", "needs", "ignores"),
    [
        (
            "train",
            {"model", "train", "train_state", "optimizer", "schedule", "batches", "seeds", "determinism", "checkpoint"},
            {"corpus/sources", "corpus/grammar", "generate"},
        ),
        (
            "evaluate",
            {"model", "evaluate", "corpus/floor", "corpus/grammar", "corpus/token_files", "determinism"},
            {"train", "train_state", "optimizer", "checkpoint"},
        ),
        ("sample", {"model", "generate", "seeds", "determinism"}, {"train", "optimizer", "evaluate", "batches"}),
    ],
)
def test_the_stages_depend_on_what_they_compute_with(stage, needs, ignores):
    closure = set(import_closure(REPOSITORY, f"stages.{stage}"))
    assert {f"nanogpt/{name}.py" for name in needs} <= closure
    assert not {f"nanogpt/{name}.py" for name in ignores} & closure
    assert not [path for path in closure if path.startswith("tracking/")]


# --- environment ------------------------------------------------------------------------------------------------------


def test_the_environment_has_versions_and_the_processor_but_no_host():
    found = provenance.environment()
    assert found["torch"] == metadata.version("torch")
    assert {"python", "libc", "cpu", "machine", "numpy"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())
    assert Path("/proc/sys/kernel/hostname").read_text().strip() not in found.values()


# --- how the processes share a step -----------------------------------------------------------------------------------


def counted(determinism, **train):
    """Of train.processes and train.parallel, what a training's fingerprint contains."""
    ours = committed_params()
    params = ours.model_copy(
        update={
            "train": ours.train.model_copy(update=train),
            "numerics": ours.numerics.model_copy(update={"determinism": determinism}),
        }
    )
    values = provenance._params_of(Recipe(params, numerics=None, data=None, initial=None))
    return {name: values[f"train.{name}"] for name in ("processes", "parallel") if f"train.{name}" in values}


def test_training_in_shards_is_part_of_what_decides_a_result_where_it_changes_bits():
    assert counted("portable", processes=2, parallel="fsdp") == {"processes": 2, "parallel": "fsdp"}
    assert counted("portable", processes=2, parallel="ddp") == {"processes": 2}
    assert counted("portable", processes=1, parallel="fsdp") == {"processes": 1}
    assert counted("off", processes=2, parallel="fsdp") == {}
