"""What a run is called: by what differs from the commit, so that a table of runs can be read."""

import re
from pathlib import Path
from typing import Any

from tracking.dvc_files import read_yaml
from tracking.git import git_or_none
from tracking.mlflow_server import as_text

LIMIT = 100  # characters of a name
SEED = "train.seed"


def run_name(experiment: str | None, setting: str, seed: int, attempt: int) -> str:
    """Such as "wide n_embd=64 seed=1338".

    `experiment` is DVC's name, which counts only if the user gave it; `attempt` N > 1 is shown.
    """
    front = experiment if experiment and not is_generated(experiment) else ""
    end = f"seed={seed}" + (f" attempt={attempt}" if attempt > 1 else "")
    return f"{_cut(f'{front} {setting}'.strip(), LIMIT - len(end) - 1)} {end}"


def setting(params: dict[str, Any], committed: dict[str, Any], diff: str, commit: str) -> str:
    """All but the seed in which a training differs from its commit, "muon_learning_rate=0.04"; else the commit.

    `params` are the training's, flat; `committed` those of HEAD; `diff` is the uncommitted change, as git shows it, of
    which no more is said than "+ uncommitted". Sections are left out where the key says enough: model and train.
    """
    short = {key: re.sub(r"^(model|train)\.", "", key) for key in params if key != SEED}
    changes = [f"{name}={as_text(params[key])}" for key, name in short.items() if committed.get(key) != params[key]]
    changes = changes or [commit[:7] or "no commit"]
    if re.search(r"^diff --git (?!a/params\.yaml )", diff, re.MULTILINE):
        changes.append("+ uncommitted")
    return " ".join(changes)


def committed_params(root: Path) -> dict[str, Any]:
    """params.yaml of HEAD, flat; empty where it cannot be read, since a commit can hold anything."""
    try:
        sections = read_yaml(git_or_none(root, "show", "HEAD:./params.yaml") or "", "params.yaml")
    except ValueError:
        return {}
    found = ((name, section) for name, section in sections.items() if isinstance(section, dict))
    return {f"{name}.{key}": value for name, section in found for key, value in section.items()}


def is_generated(name: str) -> bool:
    """Whether DVC made up that name of an experiment ("freed-tach")."""
    from dvc.repo.experiments.utils import gen_random_name

    # Its words are constants of that function; a user's "wider-muon" has the same form.
    known = [constant for constant in gen_random_name.__code__.co_consts if isinstance(constant, tuple)]
    words = name.split("-")
    return len(words) == 2 and all(any(word in some for some in known) for word in words)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
