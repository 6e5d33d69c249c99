"""Writes params.yaml for a preset experiment: `python -m tools preset NAME`; without a name, lists the presets."""

import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from nanogpt.files import write_text
from nanogpt.params import Params, parse_params
from nanogpt.params_errors import suggestion
from tools.command import command
from tracking.git import git_or_none

PARAMS, PRESETS = Path("params.yaml"), Path("presets")
Layer = tuple[str, dict[str, dict[str, Any]]]  # the file that sets values, and the values by section


@command()
@click.argument("name", required=False)
@click.option("--force", is_flag=True, help="Overwrite uncommitted edits of params.yaml.")
def main(name: str | None, force: bool) -> None:
    """Writes params.yaml for a preset, or lists the presets.

    The new params.yaml is the committed one with the values of presets/NAME.yaml; other edits of it are discarded.
    Without NAME, lists the presets.
    """
    click.echo(listing() if name is None else apply(name, force))


def presets() -> dict[str, Path]:
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def listing() -> str:
    """All presets, each with the first line of its comment."""
    found = presets()
    width = max(map(len, found), default=0)
    lines = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in found.items()}
    return "\n".join(f"{name:{width}}  {line.lstrip('# ')}" for name, line in lines.items())


def apply(name: str, force: bool) -> str:
    """Writes params.yaml and returns what differs from the committed one. Raises ValueError before it writes."""
    preset, committed = find(name), committed_params()
    text, changes = overlaid(committed, preset)
    if not force and is_edited(committed):
        raise ValueError(
            f"{PARAMS} has uncommitted edits, which would be lost (`git diff {PARAMS}` shows them); "
            "commit them, or give --force"
        )
    checked(text, preset)
    write_text(PARAMS, text)
    return "\n".join([f"{PARAMS} is now the committed one with {preset}:", *(f"  {line}" for line in changes)])


def preset_params(name: str) -> Params:
    """The parameters of a preset with the current params.yaml; writes nothing. Raises ValueError."""
    preset = find(name)
    return checked(overlaid(PARAMS.read_text(encoding="utf-8"), preset)[0], preset)


def checked(text: str, preset: Path) -> Params:
    """Checks a params.yaml with the preset. Raises ValueError; it names the file that sets the invalid value."""
    try:
        return parse_params(text, Path(f"{PARAMS} with {preset}"))
    except ValueError as error:
        setters = {key: source for source, sections in layers(preset) for key in flat(sections)}
        where = (f"{key} is set in {source}" for key, source in setters.items() if f"{key} = " in str(error))
        raise ValueError("; ".join((str(error), *where))) from error


def find(name: str, wanted: str = "") -> Path:
    """The path of a preset. Raises ValueError; it begins with `wanted` and suggests a similar name."""
    found = presets()
    if name not in found:
        remedy = suggestion(name, found) if found else f"{PRESETS}/ is empty"
        raise ValueError(f"{wanted}there is no preset {name}; {remedy}")
    return found[name]


def committed_params() -> str:
    """params.yaml in git's HEAD. Raises ValueError if it has none."""
    text = git_or_none(Path.cwd(), "show", f"HEAD:./{PARAMS}")
    if not text:
        raise ValueError(
            f"HEAD has no {PARAMS} to which to apply a preset; commit it first (`git init` if this is not a "
            f"repository, `git add {PARAMS}`, `git commit`)"
        )
    return text + "\n"


def is_edited(committed: str) -> bool:
    """Whether params.yaml differs from the committed one with any preset or none."""
    if not PARAMS.exists():
        return False
    current = PARAMS.read_bytes().decode(errors="replace").rstrip("\n") + "\n"
    if current == committed:
        return False
    for preset in presets().values():
        with suppress(ValueError):  # another preset may be invalid
            if current == overlaid(committed, preset)[0]:
                return False
    return True


def overlaid(committed: str, preset: Path) -> tuple[str, list[str]]:
    """The committed params.yaml with the preset's values, and a line for each that differs; keeps comments.

    Raises ValueError for a preset that is not made of sections, extends itself, or has unknown keys.
    """
    return changed(committed, f"the committed {PARAMS}", *layers(preset))


def layers(preset: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The values of the presets that it extends, then its own. Raises ValueError."""
    if preset in above:
        circle = " -> ".join(path.stem for path in (*above, preset))
        raise ValueError(
            f"{above[-1]} extends {preset.stem}, which forms a circle ({circle}); remove `extends` from one of them"
        )
    values = _sections(_yaml(), preset.read_text(encoding="utf-8"), str(preset), besides="extends")
    below = []
    if "extends" in values:
        base = str(values.pop("extends"))
        below = layers(find(base, f"{preset} extends {base}: "), (*above, preset))
    return [*below, (str(preset), values)]


def changed(text: str, name: str, *overlays: Layer) -> tuple[str, list[str]]:
    """Sets the overlays' values in `text`, a params.yaml; returns it with a line for each value that differs.

    The last overlay wins; comments are kept. name: of `text`, in errors. Raises ValueError for unknown keys and for a
    text that is not made of sections.
    """
    yaml, after = _yaml(), dict[str, Any]()
    params = _sections(yaml, text, name)
    keys = {*params, *flat(params)}
    for source, sections in overlays:
        if unknown := next((key for key in (*map(str, sections), *flat(sections)) if key not in keys), ""):
            names = list(params[unknown.partition(".")[0]] if "." in unknown else params)
            raise ValueError(f"{source} sets {unknown}, which {name} does not have; {suggestion(unknown, names)}")
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
    """Reads and writes YAML with its comments, quotes and columns; None becomes nothing, as DVC writes it."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 10_000  # columns; comments are long
    return yaml


def _sections(yaml: YAML, text: str, name: str, besides: str = "") -> dict[str, Any]:
    """The sections of a YAML text; the value of the key `besides` may be anything. Raises ValueError."""
    try:
        content = yaml.load(text)
    except YAMLError as error:
        raise ValueError(f"{name} is not valid YAML ({error}); correct it") from error
    if not isinstance(content, dict) or not all(isinstance(content[key], dict) for key in content if key != besides):
        raise ValueError(f"{name} does not consist of sections with keys, like params.yaml; correct it")
    return content


def flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
