import itertools
import shutil
import subprocess
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from nanogpt.params import Params, check_combinations, flatten, load_params
from tests.conftest import BUILT_IN, REPOSITORY
from tools import preset
from tools.__main__ import main
from tools.preset import overlaid

COMMITTED = BUILT_IN.read_text(encoding="utf-8")
NAMES = sorted(path.stem for path in (REPOSITORY / "presets").glob("*.yaml"))
PARAMS = Path("params.yaml")
DEFAULT = YAML(typ="safe").load(COMMITTED)
TRAIN = DEFAULT["train"]


def git(*arguments: str) -> None:
    person = ("-c", "user.name=a", "-c", "user.email=b")
    subprocess.run(["git", *person, *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with params.yaml and the presets, committed."""
    root = tmp_path_factory.mktemp("committed")
    shutil.copy(BUILT_IN, root)
    shutil.copytree(REPOSITORY / "presets", root / "presets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        git("init", "--quiet", "--template=")
        git("add", "--all")
        git("commit", "--quiet", "--message", "first")
    return root


@pytest.fixture(autouse=True)
def repository(committed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(committed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["preset", *arguments])


def refused(*arguments: str) -> str:
    """The error, one line; checks that params.yaml is unchanged and nothing is left beside it."""
    before = PARAMS.read_bytes()
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert PARAMS.read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == [".git", "params.yaml", "presets"]
    return result.output


def write(name: str, text: str) -> None:
    Path(f"presets/{name}.yaml").write_text(text, encoding="utf-8")


def layers(name: str) -> list[dict[str, Any]]:
    """The values of each preset that this one extends, then its own."""
    return [preset.flat(sections) for _, sections in preset.layers(Path(f"presets/{name}.yaml"))]


def resolved(name: str) -> dict[str, Any]:
    return reduce(or_, layers(name))


# --- the presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_makes_valid_params_of_which_nothing_but_values_is_changed(name: str) -> None:
    result = run(name)
    assert result.exit_code == 0, result.output
    assert resolved(name).items() <= flatten(load_params()).items()
    before, after = COMMITTED.splitlines(), PARAMS.read_text(encoding="utf-8").splitlines()
    for old, new in zip(before, after, strict=True):
        assert new.partition("#")[2] == old.partition("#")[2]
        assert new.split(":")[0] == old.split(":")[0]
        if len(new.partition("#")[0].rstrip()) < old.find("#"):
            assert new.find("#") == old.find("#")


def test_what_the_committed_preset_has_set_no_other_leaves_behind() -> None:
    values = {name: resolved(name) for name in NAMES}
    for first, second in itertools.permutations(NAMES, 2):
        alone, after = checked(values[second]), checked(values[first] | values[second])
        for key in without_effect(alone):
            after[key] = alone[key]
        assert after == alone, f"{second} on a committed {first}"


def test_each_preset_names_every_key_that_another_one_sets_and_its_result_depends_on() -> None:
    values = {name: resolved(name) for name in NAMES}
    for name in NAMES:
        unused = without_effect(checked(values[name]))
        assert set().union(*values.values()) - unused - values[name].keys() == set(), name


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_repeats_nothing_of_what_it_extends(name: str) -> None:
    *below, own = layers(name)
    assert own.items() & reduce(or_, below, {}).items() == set()


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The committed parameters with these values; they must be valid together."""
    sections = {name: dict(section) for name, section in DEFAULT.items()}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections[section][name] = value
    params = Params.model_validate(sections)
    check_combinations(params, PARAMS)
    return flatten(params)


def without_effect(params: dict[str, Any]) -> set[str]:
    """The keys that do not affect results with the other values."""
    unused = {key for key in params if key.startswith("runtime.")}
    if params["train.optimizer"] != "muon":
        unused |= {"train.muon_learning_rate", "train.muon_momentum", "train.muon_weight_decay"}
    if params["download.source"] != "grammar":
        unused.add("download.documents")
    if not params["download.source"].startswith("file:"):
        unused.add("download.texts")
    if params["tokenize.tokenizer"] != "bpe":
        unused.add("tokenize.vocab_size")
    if params["train.eval_only"]:
        used = {"init_from", "pretrained", "eval_only", "processes", "batch_size", "eval_iters"}
        unused |= {key for key in params if key.startswith("train.") and key.partition(".")[2] not in used}
    return unused


def test_the_list_has_each_preset_with_the_first_line_of_its_comment() -> None:
    lines = run().output.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert "train_gpt2              GPT-2 (124M) on OpenWebText from scratch" in lines
    assert all(len(line.split()) > 3 for line in lines)


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_a_preset_of_nothing_gives_the_commits_file_to_the_byte() -> None:
    write("nothing", "# Nothing\ntrain: {}\n")
    assert overlaid(COMMITTED, Path("presets/nothing.yaml")) == (COMMITTED, [])


def test_what_it_changes_compared_with_the_commit_is_reported() -> None:
    write("few", 'train:\n  max_iters: 9\n  warmup_iters: 5\n  seed: 1337\nsample:\n  prompts: ["", "a"]\n  top_k: 5\n')
    lines = run("few").output.splitlines()
    assert lines == [
        "params.yaml is now the committed one with presets/few.yaml:",
        f"  train.max_iters: {TRAIN['max_iters']} -> 9",
        f"  train.warmup_iters: {TRAIN['warmup_iters']} -> 5",
        '  sample.prompts: [""] -> ["", "a"]',
        "  sample.top_k: null -> 5",
    ]
    changed = set(PARAMS.read_text().splitlines()) - set(COMMITTED.splitlines())
    assert any(line.startswith('  prompts: ["", "a"]          # texts to continue') for line in changed)
    assert len(changed) == 4


def test_one_preset_after_another_is_the_other_alone() -> None:
    run("train_shakespeare_char")
    assert run("debug_one_step").exit_code == 0
    after = PARAMS.read_text()
    PARAMS.write_text(COMMITTED)
    run("debug_one_step")
    assert PARAMS.read_text() == after
    assert run("debug_one_step").exit_code == 0


def test_it_is_laid_on_what_is_committed() -> None:
    PARAMS.write_text(COMMITTED.replace(" learning_rate: 2e-2", " learning_rate: 4e-2"))
    git("commit", "--all", "--message", "second")
    write("short", "train:\n  max_iters: 90\n")
    run("short")
    params = load_params()
    assert (params.train.max_iters, params.train.learning_rate) == (90, 4e-2)


def test_what_it_extends_is_laid_below_it() -> None:
    write("lowest", "train:\n  max_iters: 7\n  seed: 7\n  eval_iters: 7\n")
    write("middle", "extends: lowest\ntrain:\n  seed: 8\n  eval_iters: 8\n")
    write("upper", "# Most of it from below\nextends: middle\ntrain:\n  eval_iters: 9\n")
    assert [line.partition(":")[0] for line in run("upper").output.splitlines()[1:]] == [
        "  train.seed",
        "  train.max_iters",
        "  train.eval_iters",
    ]
    train = load_params().train
    assert (train.max_iters, train.seed, train.eval_iters) == (7, 8, 9)
    assert "upper                   Most of it from below" in run().output.splitlines()


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("staged", [False, True])
def test_uncommitted_edits_are_not_lost_without_force(staged: bool) -> None:
    edited = COMMITTED.replace(f"max_iters: {TRAIN['max_iters']}", "max_iters: 701")
    PARAMS.write_text(edited)
    if staged:
        git("add", "params.yaml")
    line = refused("debug_one_step")
    assert "params.yaml has uncommitted edits, which would be lost (`git diff params.yaml` shows them)" in line
    assert "--force" in line
    assert run("debug_one_step", "--force").exit_code == 0
    assert load_params().train.max_iters == 1


def test_an_edit_after_a_preset_is_one_too() -> None:
    run("debug_one_step")
    PARAMS.write_text(PARAMS.read_text().replace("seed: 1337", "seed: 1"))
    assert "uncommitted edits" in refused("debug_profile")


def test_a_params_file_that_is_gone_or_no_text_holds_no_edits_or_needs_force() -> None:
    PARAMS.unlink()
    assert run("debug_one_step").exit_code == 0
    PARAMS.write_bytes(b"\xff\xfe")
    assert "uncommitted edits" in refused("debug_one_step")
    assert run("debug_one_step", "--force").exit_code == 0


def test_without_a_commit_the_way_to_one_is_reported(repository: Path) -> None:
    outside = repository / "no-commit"
    outside.mkdir()
    shutil.copytree("presets", outside / "presets")
    shutil.copy("params.yaml", outside)
    subprocess.run(["git", "init", "--quiet", str(outside)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(outside)
        line = refused("debug_one_step")
    assert "HEAD has no params.yaml to which to apply a preset; commit it first (`git init`" in line


def test_an_unknown_name_is_reported_with_the_nearest_and_all() -> None:
    assert "there is no preset train_gpt; did you mean train_gpt2?\n" in refused("train_gpt")
    assert "there is no preset ../params; use one of debug_one_step, " in refused("../params")
    shutil.rmtree("presets")
    Path("presets").mkdir()
    assert "there is no preset x; presets/ is empty" in refused("x")
    assert run().output == "\n"


UNKNOWN = "which the committed params.yaml does not have;"
MAX_ITERS = f"train.max_iters = {TRAIN['max_iters']}"
CIRCLE = "; remove `extends` from one of them\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad", "train: {max_iter: 9}", f" sets train.max_iter, {UNKNOWN} did you mean train.max_iters?\n"),
        ("bad", "trian: {max_iters: 9}", f" sets trian, {UNKNOWN} did you mean train?\n"),
        ("bad", "zzz: {max_iters: 9}", f" sets zzz, {UNKNOWN} use one of download, tokenize, model,"),
        ("bad", "train: {max_iters: many}", ": train.max_iters = 'many' is invalid"),
        ("bad", "train: {warmup_iters: 70000}", f": train.warmup_iters = 70000 is not below {MAX_ITERS}"),
        ("bad", "train: [1", " is not valid YAML ("),
        ("bad", "train: 5", " does not consist of sections with keys"),
        ("bad", "# nothing else", " does not consist of sections with keys"),
        ("bad", "train:\n  seed: 1\n  seed: 2", " is not valid YAML ("),
        ("bad", "extends: bad", f" extends bad, which forms a circle (bad -> bad){CIRCLE}"),
        ("base", "train: {max_iter: 9}", f" sets train.max_iter, {UNKNOWN} did you mean train.max_iters?\n"),
        ("base", "train: {seed: many}", "\n"),  # seed is set in presets/base.yaml
        ("base", "train: {warmup_iters: 50}", "; train.max_iters is set in presets/bad.yaml\n"),
        ("base", "train: [1", " is not valid YAML ("),
        (
            "base",
            "extends: train_gpt",
            " extends train_gpt: there is no preset train_gpt; did you mean train_gpt2?\n",
        ),
        ("base", "extends:", " extends None: there is no preset None; use one of bad, base, debug_one_step, "),
        ("base", "extends: [a]", " extends ['a']: there is no preset ['a']; use one of bad, base, debug_one_step, "),
        ("base", "extends: bad", f" extends bad, which forms a circle (bad -> base -> bad){CIRCLE}"),
    ],
)
def test_a_bad_preset_is_refused_in_one_line_and_nothing_is_changed(name: str, text: str, message: str) -> None:
    write("bad", "extends: base\ntrain: {max_iters: 9}")
    write("base", "train: {}")
    write(name, text)
    assert f"presets/{name}.yaml{message}" in refused("bad")
    assert run("debug_one_step").exit_code == 0  # it is no hindrance to others
    assert run("debug_profile").exit_code == 0


def test_a_write_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> Path:
        assert target == PARAMS
        raise OSError("the disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    assert "the disk is gone" in refused("debug_one_step")
