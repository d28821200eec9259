"""What may not be loaded is refused before it is; a tokenizer is loaded without a model."""

import subprocess
import sys
from pathlib import Path

import pytest
from small import write_dense
from test_dense import tiny

from pipeline import dense, pretrained
from pipeline.errors import ConfigError, InputError


def test_a_tokenizer_is_loaded_without_the_import_of_models(tmp_path: Path):
    write_dense(tmp_path)
    code = (
        "import sys\n"
        "from pipeline import corpus, pretrained\n"
        f"print(len(pretrained.load_tokenizer({str(tmp_path)!r})))\n"
        "print('transformers.modeling_utils' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, models = done.stdout.split()
    assert int(size) > 256 and models == "False"


def test_a_model_without_tokenizer_is_refused(tmp_path: Path):
    tiny("Llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        pretrained.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "link"])
def test_weights_outside_the_folder_are_refused_before_loading(tmp_path: Path, name: str):
    folder = tmp_path / "model"
    tiny("Llama").save_pretrained(folder, max_shard_size="20KB")
    index = folder / pretrained.INDEX
    (first, *_) = sorted(folder.glob("*.safetensors"))
    outside = first.rename(tmp_path / "outside.safetensors")
    if name == "link":
        first.symlink_to(outside)
    else:
        index.write_text(index.read_text().replace(first.name, name))
    with pytest.raises(InputError, match="outside its folder"):
        dense.load_model(str(folder))


def test_remote_code_needs_a_pinned_revision():
    with pytest.raises(ConfigError, match="pinned commit"):
        dense.load_model("some/model", trust_remote_code=True)
