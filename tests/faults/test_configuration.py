"""A mistake in the configuration ends a command with 2 and says what is allowed.

Rows 1 to 4, 6 and 32 of docs/reliability.md, by the stages as commands; the words of each refusal
are tested in tests/test_compose.py.
"""

import pytest
import yaml
from injection import Stand


@pytest.mark.parametrize(
    ("stage", "overrides", "said"),
    [
        # 1
        ("train@0", ["moe.n_expert=8"], ["moe.n_expert=8", "moe.n_experts"]),
        ("train@0", ["+moe.n_expert=8"], ["moe.n_expert", "in section moe", "moe.n_experts"]),
        ("train@0", ["++trian.epochs=8"], ["trian.epochs", "train.epochs"]),
        ("train@0", ["~moe.n_experts"], ["moe.n_experts"]),
        ("dense", ["model=tinny"], ["model=tinny", "tiny"]),
        # 2
        ("train@0", ["moe.n_experts=many"], ["moe.n_experts=many", "an integer"]),
        ("train@0", ["moe.n_experts=1.5"], ["moe.n_experts=1.5", "an integer"]),
        ("train@0", ["moe.host=gpt5"], ["moe.host=gpt5", "mixtral"]),
        ("train@0", ["train.epochs=-1"], ["train.epochs", "-1", "at least 0"]),
        ("train@0", ["train.learning_rate=nan"], ["train.learning_rate", "nan", "finite"]),
        ("train@0", ["train.weight_decay=inf"], ["train.weight_decay", "inf", "finite"]),
        # 3
        ("budget", ["moe.n_experts=2", "moe.top_k=3"], ["moe.top_k=3", "moe.n_experts=2"]),
        ("budget", ["moe.top_k=0"], ["moe.top_k", "at least 1"]),
        # 4
        ("budget", ["moe.d_ff_expert=0.3"], ["0.3 x 64 = 19.2", "moe.d_ff_expert=19"]),
        ("budget", ["moe.d_ff_expert=7"], ["moe.d_ff_expert", "7 is neither", "moe.d_ff_expert=8"]),
        # 6: what can be said without the model
        ("capture", ["model.layers=[0,0]"], ["model.layers", "none twice"]),
        ("capture", ["model.layers=[-1]"], ["model.layers", "counted from 0"]),
        # 31, 32
        ("dense", ["model.name=${oc.env:HOME}"], ["model.name", "environment"]),
        ("dense", ["+model._target_=os.system"], ["_target_"]),
        ("dense", ["model.name=../up"], ["model.name", "../up"]),
        ("dense", ["model.name='a;b'"], ["model.name", "a;b"]),
    ],
)
def test_a_mistake_ends_a_stage_with_2(
    stand: Stand, stage: str, overrides: list[str], said: list[str]
):
    ended = stand.run(stage, overrides).check(2)
    assert all(words in ended.said for words in [*said, "rule:", "remedy:"]), ended.said
    assert "Traceback" not in ended.said
    assert not list((stand.root / ".scratch").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("moe", "n_expert", 8, "moe.n_experts"),
        ("moe", "n_experts", "many", "an integer"),
        ("train", "learning_rate", float("nan"), "finite"),
        ("model", "name", "a/b", "model.name"),
    ],
)
def test_a_mistake_in_params_yaml_ends_a_stage_with_2(
    stand: Stand, section: str, key: str, value: object, said: str
):
    params = yaml.safe_load((stand.root / "params.yaml").read_text())
    params[section][key] = value
    (stand.root / "params.yaml").write_text(yaml.safe_dump(params))
    ended = stand.run("train@0").check(2)
    assert said in ended.said and f"{section}.{key}" in ended.said and "remedy:" in ended.said
