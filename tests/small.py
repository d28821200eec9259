"""A checkout of this project whose defaults are small, to run the documents' own commands in."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch
import transformers as tf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

PROJECT = Path(__file__).parent.parent
TEXT = (PROJECT / "pipeline" / "dense.py").read_text()
FAMILIES = {"llama": tf.LlamaConfig, "smollm2": tf.LlamaConfig, "qwen2": tf.Qwen2Config}
LAYERS = 4


def write_dense(folder: Path, family: str = "llama", layers: int = 2) -> None:
    """A tiny random causal LM with a tokenizer trained on a text that is at hand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
        folder
    )
    config = FAMILIES[family](
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


class SmallCheckout:
    """What git would clone, with pico's sizes for defaults and tiny models under the hub's names.

    A command reads as it does in the real project: `model=smollm2-135m` is a random Llama of two
    layers in the folder `HuggingFaceTB/SmolLM2-135M`, `data=wikitext2` is a local file.
    """

    def __init__(self, root: Path, python: Path) -> None:
        self.root, self.python = root, python
        self.queued: set[str] = set()
        for name in self._tracked():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, root / name)
        self._environment()
        self._shrink()
        self._stand_in()
        self.run("python -m pipeline compose && git init -q -b main && git add -A")
        self.run("git commit -q -m state")

    @staticmethod
    def _tracked() -> list[str]:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=PROJECT, check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        left = ("tests/", "benchmarks/", "dvc.lock")
        return [n for n in listed if not n.startswith(left) and (PROJECT / n).is_file()]

    def _environment(self) -> None:
        """What `make` takes for a finished `.venv`, around the python that is given."""
        commands = self.root / ".venv" / "bin"
        commands.mkdir(parents=True)
        (commands / "python").symlink_to(self.python)
        for name in ("dvc", "tensorboard"):
            (commands / name).symlink_to(Path(sys.executable).parent / name)
        (commands / "lm_eval").write_text('#!/bin/sh\nexec python -m lm_eval "$@"\n')
        (commands / "lm_eval").chmod(0o755)
        (commands / "activate").write_text(f"export PATH={commands}:$PATH\n")
        (self.root / ".venv" / "ready").touch()

    def _shrink(self) -> None:
        pico = yaml.safe_load((self.root / "conf/experiment/pico.yaml").read_text())
        del pico["defaults"]
        pico["train"]["epochs"] = 1
        for group, changes in pico.items():
            for path in (self.root / "conf" / group).glob("*.yaml"):
                edit(path, changes)
        model = yaml.safe_load((self.root / "conf/model/pico.yaml").read_text())
        model |= {"name": "tiny", "layers": [*range(LAYERS)]}
        model["embedded"]["n_layers"] = LAYERS
        (self.root / "conf/model/tiny.yaml").write_text(yaml.safe_dump(model))

    def _stand_in(self) -> None:
        """Tiny models where a hub id would be looked for, and a file in WikiText's place."""
        for path in (self.root / "conf/model").glob("*.yaml"):
            entry = yaml.safe_load(path.read_text())
            family = re.match("llama|smollm2|qwen2", entry["name"])
            if family:
                write_dense(self.root / entry["id"], family[0])
                edit(path, {"layers": [0, 1]})
        sources = [path.read_text() for path in sorted((PROJECT / "pipeline").glob("*.py"))]
        rows = [part for text in sources for part in re.split(r"\n(?=def |class )", text)]
        lines = [json.dumps({"text": part.strip()}) + "\n" for part in rows]
        (self.root / "wikitext.jsonl").write_text("".join(lines))
        source = {"source": "files", "dataset": None, "subset": None, "files": ["wikitext.jsonl"]}
        edit(self.root / "conf/data/wikitext2.yaml", source)

    def wait_for_queue(self) -> None:
        """Until the experiments of `dvc queue start` have ended, all well."""
        for _ in range(600):
            status = self.run("dvc queue status")
            if "Queued" not in status and "Running" not in status:
                break
            time.sleep(1)
        assert "Success" in status and "Failed" not in status, status

    def run(self, script: str, expect: int = 0) -> str:
        """What a shell says that stops at the first failure; no network, one thread."""
        names = {
            f"GIT_{who}_{what}": "a@b"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")}
        path = f"{self.root}/.venv/bin:{Path(sys.executable).parent}:{inherited['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", textwrap.dedent(script)],
            cwd=self.root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=inherited | names | {"PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        )  # fmt: skip
        assert done.returncode == expect, f"{script}\nexit {done.returncode}\n{done.stdout}"
        return done.stdout


def edit(path: Path, changes: dict) -> None:
    entry = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        entry[key] = entry[key] | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(entry, sort_keys=False))
