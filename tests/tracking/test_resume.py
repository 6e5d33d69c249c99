"""Whether DVC has stored a finished training's model, so that the user wants to see it reproduced."""

import pytest

from tracking.resume import is_in_dvc

MD5 = "0123456789abcdef0123456789abcdef.dir"
RESULT = {"model_md5": MD5, "model_sha256": "a" * 64}


@pytest.mark.parametrize("cache", [".dvc/cache", "elsewhere"])
def test_a_model_is_in_dvc_if_it_is_in_its_cache_wherever_that_is(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "settings"))
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config.local").write_text(f"[cache]\n    dir = {tmp_path / cache}\n")
    (tmp_path / "dvc.lock").write_text(f"stages: {{train: {{outs: [{{path: model, md5: {MD5}}}]}}}}\n")
    assert not is_in_dvc(RESULT)  # dvc.lock is a commit's, and DVC was killed before it stored anything
    (tmp_path / cache / "files/md5" / MD5[:2]).mkdir(parents=True)
    (tmp_path / cache / "files/md5" / MD5[:2] / MD5[2:]).write_text("[]")
    assert is_in_dvc(RESULT)
    assert not is_in_dvc({**RESULT, "model_md5": "f" * 32 + ".dir"})
