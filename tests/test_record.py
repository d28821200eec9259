"""What is recorded of models, and where their weights lie."""

import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.record import located


def test_a_model_in_an_installed_package_is_found_and_its_code_is_not_run(tmp_path, monkeypatch):
    folder = tmp_path / "some_weights" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert Path(located("package:some_weights/model")) == folder
    assert "some_weights" not in sys.modules
    assert located("owner/name") == "owner/name" and located("/a/folder") == "/a/folder"


@pytest.mark.parametrize(
    "missing", ["package:no_such_weights/model", "package:json/model", "package:../x", "package:"]
)
def test_a_model_in_no_package_is_refused_with_what_to_install(missing: str):
    with pytest.raises(InputError) as caught:
        located(missing)
    assert caught.value.value == missing and "pip install" in caught.value.remedy
