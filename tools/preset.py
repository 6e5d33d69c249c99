"""params.yaml for a known experiment: `python -m tools preset NAME`; without a name, the list of presets."""

import difflib
import io
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from nanogpt.files import write_text
from nanogpt.params import Params, parse_params
from tools.command import command
from tracking.git import git_or_none

PARAMS, PRESETS = Path("params.yaml"), Path("presets")
Layer = tuple[str, dict[str, dict[str, Any]]]  # the file that sets values, and the values by section


@command()
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
    """All presets, each with the first line of its comment.

    None exists only to be extended, and so none is left out: as in nanoGPT, where train.py's defaults are a GPT-2
    (124M) that can be trained, and the other configurations say what differs from it.
    """
    known = presets()
    width = max(map(len, known), default=0)
    lines = (path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in known.values())
    return "\n".join(f"{name:{width}}  {line}" for name, line in zip(known, lines, strict=True))


def apply(name: str, force: bool) -> str:
    """Rewrites params.yaml and says what differs from the commit's. Raises ValueError, and then nothing is changed."""
    preset, committed = find(name), committed_params()
    text, changes = overlaid(committed, preset)
    if not force and is_edited(committed):
        raise ValueError(
            f"{PARAMS} has uncommitted edits, which would be lost (`git diff {PARAMS}` shows them); "
            "commit them, or give --force"
        )
    checked(text, preset)
    write_text(PARAMS, text)
    return "\n".join([f"{PARAMS} is that of the commit with {preset} on it:", *(f"  {line}" for line in changes)])


def preset_params(name: str) -> Params:
    """The parameters of a preset on the params.yaml that is here; nothing is written. Raises ValueError."""
    preset = find(name)
    return checked(overlaid(PARAMS.read_text(encoding="utf-8"), preset)[0], preset)


def checked(text: str, preset: Path) -> Params:
    """The parameters of a params.yaml with the preset on it. Raises ValueError that names who sets the wrong value."""
    try:
        return parse_params(text, Path(f"{PARAMS} with {preset} on it"))
    except ValueError as error:
        setters = {key: source for source, sections in layers(preset) for key in flat(sections)}
        where = (f"{key} is set in {source}" for key, source in setters.items() if f"{key} = " in str(error))
        raise ValueError("; ".join((str(error), *where))) from error


def find(name: str, wanted: str = "") -> Path:
    """The preset of that name. Raises ValueError that begins with `wanted` and has the name that may be meant."""
    known = presets()
    if name in known:
        return known[name]
    near = f"{_near(name, known)} known: {', '.join(known) or f'none in {PRESETS}/'}".lstrip()
    raise ValueError(f"{wanted}there is no preset {name}; {near}")


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

    Raises ValueError for a preset that is not made of sections, that extends itself, or that names what is unknown.
    """
    return changed(committed, f"the commit's {PARAMS}", *layers(preset))


def layers(preset: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The preset's values and, before them, those of the presets that it extends. Raises ValueError."""
    if preset in above:
        circle = " -> ".join(path.stem for path in (*above, preset))
        raise ValueError(f"{above[-1]} extends {preset.stem}, a circle ({circle}); remove extends from one of them")
    values = _sections(_yaml(), preset.read_text(encoding="utf-8"), str(preset), besides="extends")
    below = []
    if "extends" in values:
        base = str(values.pop("extends"))
        below = layers(find(base, f"{preset} extends {base}: "), (*above, preset))
    return [*below, (str(preset), values)]


def changed(text: str, name: str, *overlays: Layer) -> tuple[str, list[str]]:
    """`text`, a params.yaml that is called `name`, with the overlays' values, and a line for each value that differs.

    The last overlay wins; comments and form are kept. Raises ValueError for a text that is no params.yaml, and for an
    unknown key.
    """
    yaml, after = _yaml(), dict[str, Any]()
    params = _sections(yaml, text, name)
    known = [*params, *flat(params)]
    for source, sections in overlays:
        if unknown := [key for key in (*map(str, sections), *flat(sections)) if key not in known]:
            raise ValueError(f"{source} sets {unknown[0]}, which {name} does not have; {_remedy(unknown[0], known)}")
        after |= flat(sections)
    differing = []
    for key, before in flat(params).items():
        if (value := after.get(key, before)) != before:
            differing.append(f"{key}: {_shown(before)} -> {_shown(value)}")
            section, _, entry = key.partition(".")
            params[section][entry] = value
    out = io.StringIO()
    yaml.dump(params, out)
    return out.getvalue(), differing


def _yaml() -> YAML:
    """Reads and writes YAML with its comments, quotes and columns, and null as null."""

    class Representer(RoundTripRepresenter):
        """Of its own, as what is added would count for every one of this class."""

    Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml = YAML()
    yaml.Representer = Representer
    yaml.preserve_quotes = True
    yaml.width = 10_000  # columns; comments are long
    return yaml


def _sections(yaml: YAML, text: str, name: str, besides: str = "") -> dict[str, Any]:
    """The sections of a text, and what it has under the key `besides`. Raises ValueError."""
    try:
        content = yaml.load(text)
    except YAMLError as error:
        raise ValueError(f"{name} is not valid YAML ({error}); correct it") from error
    if not isinstance(content, dict) or not all(isinstance(content[key], dict) for key in content if key != besides):
        raise ValueError(f"{name} is not made of sections with keys, as params.yaml is; correct it")
    return content


def flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _remedy(key: str, known: list[str]) -> str:
    """The key that may be meant, or all beside it."""
    beside = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    return _near(key, beside) or f"use one of {', '.join(beside)}"


def _near(name: str, known: Iterable[str]) -> str:
    return "".join(f"did you mean {near}?" for near in difflib.get_close_matches(name, known, n=1))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
