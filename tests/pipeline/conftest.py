"""Clones for the tests: `fresh` and `seed` are made once per test run, whatever the number of xdist's workers."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.clones import Clone, locked, make_fresh


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of this test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "clones"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[[str, Callable[[Path], object]], Clone]:
    """`once(name, make)`: the clone that `make(path)` makes, by the first worker that asks for it."""
    return lambda name, make: _once(shared / name, make)


@pytest.fixture(scope="session")
def fresh(once) -> Clone:
    """A clone in which nothing has been run. Not to be changed: take a copy."""
    return once("fresh", make_fresh)


@pytest.fixture(scope="session")
def seed(fresh: Clone, once) -> Clone:
    """A clone in which `dvc repro` has been run once, with its dvc.lock committed. Not to be changed: take a copy."""

    def reproduce(path: Path) -> None:
        clone = fresh.copy(path)
        clone.repro()
        clone.commit("The pipeline's result")

    return once("seed", reproduce)


def _once(path: Path, make: Callable[[Path], object]) -> Clone:
    """What `make` makes at `path`; done by the first process that asks, and by nobody again if that failed."""
    with locked(path.with_suffix(".lock")):
        failed = path.with_suffix(".failed")
        if failed.exists():
            pytest.fail(f"{path.name} could not be made: {failed.read_text()}")
        if not path.exists():
            try:
                make(path)
            except BaseException as error:
                failed.write_text(str(error))
                shutil.rmtree(path, ignore_errors=True)
                raise
    return Clone(path)


@pytest.fixture
def copy_of(tmp_path: Path) -> Iterator[Callable[..., Clone]]:
    """`copy_of(seed, runs=False, mlflow=False)`: a copy for this test alone; what runs in it ends with the test."""
    made: list[Clone] = []

    def copy(origin: Clone, name: str = "clone", **options: bool) -> Clone:
        made.append(origin.copy(tmp_path / name, **options))
        return made[-1]

    yield copy
    for clone in made:
        clone.end_processes()
        shutil.rmtree(clone.path, ignore_errors=True)
