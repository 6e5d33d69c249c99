import json
import re

import pytest

from tracking.golden import bits_environment, differences, file_name, load_goldens, nearest

HERE = {
    **dict.fromkeys(("torch", "numpy", "tiktoken", "tokenizers", "safetensors", "libc", "machine"), "1"),
    "python": "3.11.7",
    "cpu": "A",
    "system": "Linux 6",
    "dvc": "3",
}


def environment(determinism="portable", **changes):
    return bits_environment(HERE | changes, {"determinism": determinism, "threads": 2, "torch": "1"})


def test_what_cannot_change_bits_is_not_part_of_the_name():
    for name, value in {"python": "3.11.9", "cpu": "B", "system": "Linux 7", "dvc": "4"}.items():
        assert file_name(environment(**{name: value})) == file_name(environment()), name


@pytest.mark.parametrize("name", ["torch", "numpy", "tiktoken", "tokenizers", "safetensors", "libc", "machine"])
def test_what_can_change_bits_is_part_of_the_name(name):
    assert file_name(environment(**{name: "2"})) != file_name(environment())
    assert differences(environment(), environment(**{name: "2"})) == [f"{name} 1 -> 2"]


def test_the_file_name_shows_the_environment():
    name = r"python3\.11-torch1-{}-[0-9a-f]{{8}}\.json"
    assert re.fullmatch(name.format("portable"), file_name(environment(torch="1+cpu")))
    assert re.fullmatch(name.format("machine-2threads"), file_name(environment("machine", torch="1+cpu")))


def test_the_cpu_counts_unless_determinism_is_portable():
    assert file_name(environment("machine", cpu="B")) != file_name(environment("machine"))
    assert file_name(environment("machine")) != file_name(environment())
    assert file_name(environment(python="3.12.0")) != file_name(environment())


def golden(folder, steps=(1,), **changes):
    content = {"environment": environment(**changes), "steps": list(steps), "metrics": {"val_loss": 1.0}}
    path = folder / file_name(content["environment"])
    path.write_text(json.dumps(content))
    return path


def test_the_golden_file_of_this_environment_is_preferred_or_the_nearest_one(tmp_path):
    for changes in ({}, {"torch": "2"}, {"torch": "2", "libc": "2"}):
        golden(tmp_path, **changes)
    found = load_goldens(tmp_path)
    assert nearest(found, environment())["environment"] == environment()
    assert nearest(found, environment(torch="2", libc="2", numpy="2"))["environment"] == environment(
        torch="2", libc="2"
    )


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"environment": {}}', '{"environment": {}, "steps": [1], "metrics": {}}']
)
def test_a_damaged_golden_file_is_named_with_the_remedy(tmp_path, damage):
    path = golden(tmp_path)
    path.write_text(damage)
    with pytest.raises(ValueError, match=rf"{path} is damaged .*`git checkout {path}`, or `make golden`"):
        load_goldens(tmp_path)
