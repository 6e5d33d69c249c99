"""params.yaml for a known experiment: `python -m tools preset NAME`; without a name, the list of presets."""

import difflib
import io
import json
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from nanogpt.files import replacing
from nanogpt.params import Params, load_params
from tracking.git import git_or_none

PARAMS, PRESETS = Path("params.yaml"), Path("presets")


@click.command()
@click.argument("name", required=False)
@click.option("--force", is_flag=True, help="Even if uncommitted edits of params.yaml are lost.")
def main(name: str | None, force: bool) -> None:
    """Makes params.yaml that of a preset, or lists the presets.

    params.yaml becomes that of the commit with presets/NAME.yaml laid on it. What the preset does not name is as in the
    commit, so the result is the same whatever params.yaml held before. Without NAME, lists the presets.
    """
    click.echo(listing() if name is None else apply(name, force))


def presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def listing() -> str:
    """All presets, each with the first line of its comment."""
    known = presets()
    width = max(map(len, known), default=0)
    lines = (path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in known.values())
    return "\n".join(f"{name:{width}}  {line}" for name, line in zip(known, lines, strict=True))


def apply(name: str, force: bool) -> str:
    """Rewrites params.yaml and tells what differs from the commit's. Raises ValueError, and then nothing is changed."""
    preset = find(name)
    committed = committed_params()
    text, changes = overlaid(committed, preset)
    if not force and is_edited(committed):
        raise ValueError(
            f"{PARAMS} has uncommitted edits, which would be lost (`git diff {PARAMS}` shows them); "
            "commit them, or give --force"
        )
    with replacing(PARAMS) as temporary:
        temporary.write_bytes(text.encode())
        try:
            load_params(temporary)
        except ValueError as error:
            raise ValueError(str(error).replace(str(temporary), f"{PARAMS} with {preset} on it")) from error
    return "\n".join([f"{PARAMS} is that of the commit with {preset} on it:", *(f"  {line}" for line in changes)])


def preset_params(name: str) -> Params:
    """The parameters of a preset on the params.yaml that is here; nothing is written. Raises ValueError."""
    text, _ = overlaid(PARAMS.read_text(encoding="utf-8"), find(name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return load_params(path)


def find(name: str) -> Path:
    """The preset of that name. Raises ValueError, with the one that may be meant."""
    known = presets()
    if name in known:
        return known[name]
    near = f"did you mean {near}? " if (near := _near(name, known)) else ""
    raise ValueError(f"there is no preset {name}; {near}known: {', '.join(known) or f'none in {PRESETS}/'}")


def committed_params() -> str:
    """params.yaml as git's HEAD has it. Raises ValueError where no commit has one."""
    text = git_or_none(Path.cwd(), "show", f"HEAD:./{PARAMS}")
    if not text:
        raise ValueError(
            f"no commit has a {PARAMS} on which the preset could be laid; commit it first (`git init`, if this is no "
            f"repository yet, `git add {PARAMS}`, `git commit`)"
        )
    return text + "\n"


def is_edited(committed: str) -> bool:
    """Whether params.yaml holds what neither the commit nor a preset would give again."""
    if not PARAMS.exists():
        return False
    current = PARAMS.read_bytes().decode(errors="replace").rstrip("\n") + "\n"
    if current == committed:
        return False
    for preset in presets().values():
        with suppress(ValueError):  # another preset's fault is not what is asked
            if current == overlaid(committed, preset)[0]:
                return False
    return True


def overlaid(committed: str, preset: Path) -> tuple[str, list[str]]:
    """The committed params.yaml with the preset's values, comments and form kept, and a line for each that differs.

    Raises ValueError for a preset that is no YAML of sections, or that names a key which params.yaml has not.
    """
    values = _sections(_yaml(), preset.read_text(encoding="utf-8"), str(preset))
    return changed(committed, f"the commit's {PARAMS}", values, str(preset))


def changed(text: str, name: str, changes: dict[str, dict[str, Any]], source: str) -> tuple[str, list[str]]:
    """`text`, a params.yaml that is called `name`, with values that `source` sets, and a line for each that differs.

    Comments and form are kept. Raises ValueError for a text that is no params.yaml, and for a key that it has not.
    """
    yaml = _yaml()
    params, differing = _sections(yaml, text, name), []
    for section, values in changes.items():
        if section not in params:
            raise _unknown(source, section, name, params)
        for key, value in values.items():
            if key not in params[section]:
                raise _unknown(source, f"{section}.{key}", name, (f"{section}.{known}" for known in params[section]))
            if (before := params[section][key]) != value:
                differing.append(f"{section}.{key}: {_shown(before)} -> {_shown(value)}")
                params[section][key] = value
    out = io.StringIO()
    yaml.dump(params, out)
    return out.getvalue(), differing


def _yaml() -> YAML:
    """Reads and writes YAML with its comments, quotes and columns, and null as null."""

    class Representer(RoundTripRepresenter):
        def null(self, value: None) -> ScalarNode:
            return self.represent_scalar("tag:yaml.org,2002:null", "null")

    Representer.add_representer(type(None), Representer.null)
    yaml = YAML()
    yaml.Representer = Representer
    yaml.preserve_quotes = True
    yaml.width = 10_000  # columns; comments are long
    return yaml


def _sections(yaml: YAML, text: str, name: str) -> dict[str, dict[str, Any]]:
    try:
        content = yaml.load(text)
    except YAMLError as error:
        raise ValueError(f"{name} is not valid YAML ({error}); correct it") from error
    if not isinstance(content, dict) or not all(isinstance(values, dict) for values in content.values()):
        raise ValueError(f"{name} is not made of sections with keys, as params.yaml is; correct it")
    return content


def _unknown(source: str, key: str, name: str, known: Iterable[str]) -> ValueError:
    known = list(known)
    remedy = f"did you mean {_near(key, known)}?" if _near(key, known) else f"known here: {', '.join(known)}"
    return ValueError(f"{source} sets {key}, which {name} has not; {remedy}")


def _near(name: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
