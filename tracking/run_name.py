"""What a run is called: by what differs from its commit, so that a table of runs is readable."""

import re
from pathlib import Path
from typing import Any

from tracking.dvc_files import read_yaml
from tracking.git import git_or_none
from tracking.run import as_text

LIMIT = 100  # characters of a name
SEED = "train.seed"


def run_name(experiment: str | None, setting: str, seed: int, attempt: int) -> str:
    """A name such as "wide n_embd=64 seed=1338".

    `experiment` is DVC's name for it, which is used only if the user chose it; `attempt` N is shown if N > 1.
    """
    front = experiment if experiment and not is_generated(experiment) else ""
    end = f"seed={seed}" + (f" attempt={attempt}" if attempt > 1 else "")
    return f"{_cut(f'{front} {setting}'.strip(), LIMIT - len(end) - 1)} {end}"


def setting(params: dict[str, Any], committed: dict[str, Any], diff: str, commit: str) -> str:
    """How a training differs from its commit, apart from the seed: "muon_learning_rate=0.04"; else the commit.

    `params` are the training's, flat; `committed` those of HEAD. A `diff`, the uncommitted changes as git shows them,
    adds "+ uncommitted". The sections model and train are left out of the keys.
    """
    short = {key: re.sub(r"^(model|train)\.", "", key) for key in params if key != SEED}
    changes = [f"{name}={as_text(params[key])}" for key, name in short.items() if committed.get(key) != params[key]]
    changes = changes or [commit[:7] or "no commit"]
    if re.search(r"^diff --git (?!a/params\.yaml )", diff, re.MULTILINE):
        changes.append("+ uncommitted")
    return " ".join(changes)


def committed_params(root: Path) -> dict[str, Any]:
    """params.yaml of HEAD, flat; empty if it is not readable, since a commit can contain anything."""
    try:
        sections = read_yaml(git_or_none(root, "show", "HEAD:./params.yaml") or "", "params.yaml")
    except ValueError:
        return {}
    found = ((name, section) for name, section in sections.items() if isinstance(section, dict))
    return {f"{name}.{key}": value for name, section in found for key, value in section.items()}


def is_generated(name: str) -> bool:
    """Whether DVC generated that name of an experiment ("freed-tach")."""
    from dvc.repo.experiments.utils import gen_random_name

    # Its words are constants of that function; a user's "wider-muon" has the same form.
    lists = [constant for constant in gen_random_name.__code__.co_consts if isinstance(constant, tuple)]
    words = name.split("-")
    return len(words) == 2 and all(any(word in words_of_dvc for words_of_dvc in lists) for word in words)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
