"""Every figure is what its definition says, computed once more by hand."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from safetensors.torch import save_file
from torch import Tensor

import pipeline
from pipeline import artifacts, comparison, corpus, durable, evaluation, speed
from pipeline.config import Codec, EvaluateConfig
from pipeline.controls import OracleMoE
from pipeline.discovery import find_ffns
from pipeline.documents import Document
from pipeline.errors import ArtifactError, ConfigError, InputError
from pipeline.ffn import DenseFFN
from pipeline.figures import HEADLINE, control_figures, gap_figures, headline, model_figures
from pipeline.layers import save_layer, write_history
from pipeline.moe import SparseMoE, fit_thresholds
from pipeline.pretrain import train_tokenizer
from pipeline.router import TokenChoice
from pipeline.shape import MoEShape
from pipeline.store import LayerReader
from pipeline.store_writer import LayerWriter

D, LENGTH = 16, 8
SHAPE = MoEShape(D, 32, 16, 4, 2, "silu", True, False, "softmax_topk")
CHOOSING = replace(SHAPE, routing="expert_choice", capacity_factor=1.5)
UNEVEN = replace(SHAPE, expert_widths=(16, 8, 16, 4))


def layer(shape: MoEShape = SHAPE, seed: int = 0) -> SparseMoE:
    generator = torch.Generator().manual_seed(seed)
    moe = SparseMoE(shape).requires_grad_(False)
    for weight in moe.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * D**-0.5)
    for e, width in enumerate(shape.widths):
        moe.get_parameter("gate_up_proj")[e].view(2, -1, D)[:, width:] = 0
        moe.down_proj[e, :, width:] = 0
    fit_thresholds(moe, rows(seed=4))
    return moe


def rows(n: int = 6 * LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def stored(
    path: Path,
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype = torch.float32,
    store_url: str | None = None,
) -> LayerReader:
    """A store whose heldout rows are these; its other splits are something else."""
    writer = LayerWriter.open(
        path,
        rows={"train": LENGTH, "validation": LENGTH, "heldout": len(x)},
        d_model=x.shape[1],
        dtype=dtype,
        sequence_length=LENGTH,
        codec=Codec.compact,
        shard_mb=1,
        chunk_mb=1,
        attributes={},
        store_url=store_url,
    )
    other = torch.full((LENGTH, x.shape[1]), 7.0, dtype=dtype)
    writer.write_shard("train", 0, other, other)
    writer.write_shard("validation", 0, other, other)
    writer.write_shard("heldout", 0, x.to(dtype), y.to(dtype))
    return LayerReader(path, store_url=store_url)


def quantile(values: list[float], share: float) -> float:
    """Between the two nearest, linearly."""
    position = share * (len(values) - 1)
    below = sorted(values)[math.floor(position)]
    return below + (sorted(values)[math.ceil(position)] - below) * (position % 1)


# One layer


def test_layer_metrics_are_those_of_a_double_loop(tmp_path: Path):
    moe, x = layer(), rows()
    y = moe(x) + 0.3 * rows(seed=2)
    y[::LENGTH] *= 5
    found = evaluation.layer_metrics(moe, stored(tmp_path / "a", x, y))

    y_hat, routing = moe.forward_routed(x)
    squares, errors, powers, cosines = 0.0, [], [], []
    for t in range(len(x)):
        error = power = dot = norm = 0.0
        for d in range(D):
            p, q = float(y_hat[t, d]), float(y[t, d])
            error, power = error + (p - q) ** 2, power + q * q
            dot, norm = dot + p * q, norm + p * p
        squares += error
        errors.append(error)
        powers.append(power)
        cosines.append(dot / math.sqrt(norm * power))
    assert found["mse"] == pytest.approx(squares / (len(x) * D), rel=1e-4)
    assert found["relative_mse"] == pytest.approx(sum(errors) / sum(powers), rel=1e-4)
    assert found["cosine_sim"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)
    assert found["cosine_sim_p5"] == pytest.approx(quantile(cosines, 0.05), rel=1e-4)
    first = range(0, len(x), LENGTH)
    assert found["first_token"] == {
        "relative_mse": pytest.approx(
            sum(errors[t] for t in first) / sum(powers[t] for t in first), rel=1e-4
        ),
        "cosine_sim": pytest.approx(sum(cosines[t] for t in first) / len(first), rel=1e-4),
    }
    assert isinstance(routing, TokenChoice)
    counts = [sum(int(e) == k for row in routing.expert_ids for e in row) for k in range(4)]
    total = sum(counts)
    assert found["routing"]["load"] == pytest.approx([c / total for c in counts])
    assert found["routing"]["load_max_over_mean"] == pytest.approx(4 * max(counts) / total)
    entropy = -sum(c / total * math.log(c / total) for c in counts if c)
    assert found["routing"]["load_entropy"] == pytest.approx(entropy / math.log(4))
    assert found["routing"]["dead_experts"] == counts.count(0)


def test_an_exact_layer_has_cosine_one_and_no_error(tmp_path: Path):
    moe, x = layer(), rows()
    found = evaluation.layer_metrics(moe, stored(tmp_path / "a", x, moe(x)))
    assert found["mse"] < 1e-12 and found["relative_mse"] < 1e-10
    assert found["cosine_sim"] == pytest.approx(1, abs=1e-6)
    assert found["cosine_sim_p5"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [SHAPE, CHOOSING], ids=["tokens", "experts"])
def test_layer_metrics_do_not_depend_on_the_tokens_per_pass(tmp_path: Path, shape: MoEShape):
    moe, x = layer(shape), rows()
    reader = stored(tmp_path / "a", x, rows(seed=3))
    expected = evaluation.layer_metrics(moe, reader)
    found = evaluation.layer_metrics(moe, reader, batch_size=5)
    assert found.pop("verdict") == expected.pop("verdict")
    assert found.pop("routing") == expected.pop("routing")
    assert found.pop("first_token") == pytest.approx(expected.pop("first_token"), rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-5)


def test_layer_metrics_of_bf16_rows_are_computed_in_float32(tmp_path: Path):
    moe, x, y = layer(), rows().bfloat16(), rows(seed=3).bfloat16()
    found = evaluation.layer_metrics(moe, stored(tmp_path / "a", x, y, torch.bfloat16))
    error = (moe(x.float()) - y.float()).square().mean()
    assert found["mse"] == pytest.approx(float(error), rel=1e-5)


def finite(value: Any) -> bool:
    return json.loads(json.dumps(value, allow_nan=False)) is not None


def test_tokens_whose_target_is_zero_have_no_cosine(tmp_path: Path):
    moe, x = layer(), rows()
    y = moe(x).detach()
    y[::LENGTH] = 0
    found = evaluation.layer_metrics(moe, stored(tmp_path / "a", x, y))
    assert found["cosine_sim_p5"] == pytest.approx(1)


def test_a_target_of_zeros_has_null_ratios_with_their_reason(tmp_path: Path):
    moe, x = layer(), rows()
    zeros = torch.zeros_like(x).copysign(x)  # of both signs
    found = evaluation.layer_metrics(moe, stored(tmp_path / "a", x, zeros))
    assert finite(found)
    assert found["mse"] == pytest.approx(float(moe(x).square().mean()), rel=1e-5)
    assert found["cosine_sim_p5"] is None
    for part in (found, found["first_token"]):
        assert part["relative_mse"] is part["cosine_sim"] is None
        assert "zero" in part["null_because"]
    assert found["verdict"] is None


def test_a_token_whose_target_is_zero_has_no_cosine_and_counts_in_the_errors(tmp_path: Path):
    moe, x = layer(), rows()
    y = rows(seed=3)
    y[::LENGTH] = 0
    found = evaluation.layer_metrics(moe, stored(tmp_path / "a", x, y))
    assert finite(found) and "null_because" not in found
    others = torch.arange(len(x)) % LENGTH > 0
    cosines = torch.cosine_similarity(moe(x), y, dim=1)[others]
    assert found["cosine_sim"] == pytest.approx(float(cosines.mean()), rel=1e-5)
    assert found["mse"] == pytest.approx(float((moe(x) - y).square().mean()), rel=1e-5)
    assert found["first_token"]["cosine_sim"] is None


def test_a_constant_target_has_finite_metrics(tmp_path: Path):
    x = rows()
    found = evaluation.layer_metrics(layer(), stored(tmp_path / "a", x, torch.full_like(x, 0.5)))
    assert finite(found) and None not in found.values()


@pytest.mark.parametrize(
    ("cosine_sim", "verdict"), [(0.951, "good"), (0.949, "below target"), (-1.0, "below target")]
)
def test_a_layer_is_good_where_its_cosine_is_above_the_target(tmp_path, cosine_sim, verdict):
    moe, x = layer(), rows()
    y = moe(x)
    across = rows(seed=3)
    across -= (across * y).sum(1, keepdim=True) / y.square().sum(1, keepdim=True) * y
    across *= y.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True)
    target = cosine_sim * y + math.sqrt(1 - cosine_sim**2) * across
    found = evaluation.layer_metrics(moe, stored(tmp_path / "a", x, target))
    assert found["cosine_sim"] == pytest.approx(cosine_sim, abs=1e-4)
    assert found["verdict"] == verdict


def test_even_experts_of_which_each_token_takes_top_k_have_the_planned_active_fraction(
    tmp_path: Path,
):
    found = evaluation.layer_metrics(layer(), stored(tmp_path / "a", rows(), rows(seed=3)))
    assert found["active_ffn_fraction"] == SHAPE.active_ffn_fraction == 1


@pytest.mark.parametrize(
    "shape",
    [
        UNEVEN,
        CHOOSING,
        replace(CHOOSING, expert_widths=UNEVEN.expert_widths),
        replace(UNEVEN, d_ff_shared=3),
    ],
)
def test_active_fraction_counts_the_true_neurons_that_worked_on_each_token(
    tmp_path: Path, shape: MoEShape
):
    moe, x = layer(shape), rows()
    if shape.capacity_factor is not None:
        moe.router.threshold.fill_(0.4)  # which is not what its capacity asks for
    found = evaluation.layer_metrics(moe, stored(tmp_path / "a", x, rows(seed=3)))
    weights_TE = moe.eval().route(x).weights_TE()
    neurons = len(x) * shape.d_ff_shared
    for token in weights_TE:
        neurons += sum(width for w, width in zip(token, shape.widths, strict=True) if w > 0)
    assert found["active_ffn_fraction"] == neurons / (len(x) * shape.d_ff)
    assert found["active_ffn_fraction"] != shape.active_ffn_fraction


def test_experts_that_choose_are_judged_with_each_token_decided_alone(tmp_path: Path):
    moe, x = layer(CHOOSING), rows()
    reader = stored(tmp_path / "a", x, rows(seed=3))
    moe.router.threshold.fill_(0.9)  # so that most tokens find nobody
    found = evaluation.layer_metrics(moe.train(), reader)
    scores_TE = moe.router(x).softmax(dim=1)
    served = int((scores_TE >= 0.9).any(dim=1).sum())
    assert 0 < served < len(x) / 2
    assert found["routing"]["unserved_tokens"] == pytest.approx(1 - served / len(x))
    assert found["routing"]["experts_per_token"] == pytest.approx(served / len(x))


def test_a_layer_on_another_models_activations_is_refused(tmp_path: Path):
    other = torch.randn(LENGTH, 24)
    with pytest.raises(ArtifactError, match=r"d_model 16; .* has 24") as refusal:
        evaluation.layer_metrics(layer(), stored(tmp_path / "a", other, other))
    assert refusal.value.exit_code == 5


# The public function


@pytest.fixture
def two_layers(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of layers 2 and 10, and of their captures."""
    layers, captured = tmp_path / "train", tmp_path / "capture"
    captured.mkdir()
    for k in (2, 10):
        (layers / f"layer_{k}").mkdir(parents=True)
        save_layer(layer(seed=k), layers / f"layer_{k}", {"layer": k, "host": "mixtral"})
        stored(captured / f"layer_{k}.zarr", rows(), rows(seed=k))
    (layers / "layer_2.tmp").mkdir()
    return layers, captured


def test_evaluate_gives_the_metrics_of_every_layer_by_its_index(two_layers: tuple[Path, Path]):
    layers, captured = two_layers
    found = pipeline.evaluate(layers, str(captured))
    assert list(found) == [2, 10]
    for k, metrics in found.items():
        assert metrics.keys() >= {"mse", "cosine_sim", "relative_mse", "cosine_sim_p5", "routing"}
        reader = LayerReader(captured / f"layer_{k}.zarr")
        assert metrics == evaluation.layer_metrics(layer(seed=k), reader)


def test_evaluate_reads_rows_that_lie_in_an_object_store(two_layers: tuple[Path, Path], tmp_path):
    apart, url = tmp_path / "apart", f"file://{tmp_path}/objects"
    apart.mkdir()
    for k in (2, 10):
        stored(apart / f"layer_{k}.zarr", rows(), rows(seed=k), store_url=url)
    with pytest.raises(ConfigError, match=r"capture\.store_url"):
        pipeline.evaluate(two_layers[0], apart)
    assert pipeline.evaluate(two_layers[0], apart, store_url=url) == pipeline.evaluate(*two_layers)


def test_evaluate_of_some_layers_gives_those(two_layers: tuple[Path, Path]):
    assert list(pipeline.evaluate(*two_layers, layers=[10])) == [10]


@pytest.mark.parametrize("knobs", [{"batch_size": 7, "max_batches": 2}, {"max_batches": 1}])
def test_evaluate_judges_the_first_rows_that_batch_size_and_max_batches_allow(
    two_layers: tuple[Path, Path], tmp_path: Path, knobs: dict[str, int]
):
    found = pipeline.evaluate(*two_layers, layers=[2], **knobs)[2]
    n = knobs["max_batches"] * knobs.get("batch_size", evaluation.ROWS)
    reader = stored(tmp_path / "first", rows()[:n], rows(seed=2)[:n])
    expected = evaluation.layer_metrics(layer(seed=2), reader)
    assert found["mse"] == pytest.approx(expected["mse"], rel=1e-5)
    assert found["routing"] == expected["routing"]
    of_all = pipeline.evaluate(*two_layers, layers=[2])[2]
    assert (found["mse"] == of_all["mse"]) == (n >= len(rows()))


@pytest.mark.parametrize("knob", ["batch_size", "max_batches"])
def test_evaluate_of_no_rows_is_refused(two_layers: tuple[Path, Path], knob: str):
    with pytest.raises(ConfigError, match=f"{knob}=0"):
        pipeline.evaluate(*two_layers, **{knob: 0})


def test_evaluate_of_a_folder_without_layers_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no trained layers"):
        pipeline.evaluate(tmp_path, tmp_path)


# The whole model


def llama(seed: int = 0, **changes: Any) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        **{"vocab_size": 300, "hidden_size": D, "intermediate_size": 32}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 299}
        | changes
    )
    return tf.LlamaForCausalLM(config).eval()


def mixtral(shape: MoEShape, **changes: Any) -> tf.PreTrainedModel:
    torch.manual_seed(2)
    config = tf.MixtralConfig(
        **{"vocab_size": 300, "hidden_size": D, "intermediate_size": shape.d_ff_expert}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"num_local_experts": shape.n_experts, "num_experts_per_tok": shape.top_k}
        | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 299}
        | changes
    )
    return tf.MixtralForCausalLM(config).eval()


def blocks(n: int = 5, vocabulary: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(vocabulary, (n, LENGTH), generator=generator)


def compared(dense: tf.PreTrainedModel, sparse: tf.PreTrainedModel, **changes: Any):
    given = {"text_bytes": 100, "batch_size": 2} | changes
    return comparison.compare_on_text(dense, sparse, given.pop("blocks", blocks()), **given)


def test_a_model_compared_with_itself_loses_nothing():
    model = llama()
    found = compared(model, model)
    assert torch.equal(found.kl, torch.zeros(5 * (LENGTH - 1)))
    assert found.top1_agreement == 1
    assert found.perplexity[0] == found.perplexity[1]
    assert found.byte_perplexity[0] == found.byte_perplexity[1]
    metrics = model_figures(
        {0: judged()}, {0: SHAPE}, {"heldout": found, "shifted": found}, 1, 1, "mixtral"
    )
    assert metrics["perplexity_ratio"] == {"heldout": 1, "shifted": 1}
    both = {"heldout": 0, "shifted": 0}
    assert metrics["kl"] == {"mean": 0, "p99": 0, "by_text": both}


def test_perplexity_is_that_of_transformers_loss():
    models = llama(0), llama(1)
    with torch.inference_mode():
        losses = [float(m(input_ids=blocks(), labels=blocks()).loss) for m in models]
    found = compared(*models)
    assert found.perplexity == pytest.approx([math.exp(loss) for loss in losses], rel=1e-5)
    # 100 bytes in 40 tokens of which 35 are predicted.
    per_byte = [math.exp(loss * 35 / (100 * 35 / 40)) for loss in losses]
    assert found.byte_perplexity == pytest.approx(per_byte, rel=1e-5)


def test_kl_and_agreement_are_those_of_a_loop_over_tokens():
    models = llama(0), llama(1)
    found = compared(*models)
    with torch.inference_mode():
        p, q = (m(input_ids=blocks()).logits.double().softmax(dim=-1) for m in models)
    kl, same = [], 0
    for sequence in range(5):
        for t in range(LENGTH - 1):
            a, b = p[sequence, t], q[sequence, t]
            kl.append(sum(float(a[v] * (a[v] / b[v]).log()) for v in range(300)))
            same += int(a.argmax() == b.argmax())
    assert found.kl.tolist() == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert found.top1_agreement == same / len(kl) < 1
    text = {"heldout": found, "shifted": found}
    metrics = model_figures({0: judged()}, {0: SHAPE}, text, 1, 1, "mixtral")
    assert metrics["kl"]["mean"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert metrics["kl"]["p99"] == pytest.approx(quantile(kl, 0.99), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_does_not_change_the_comparison(batch_size: int):
    expected, found = (compared(llama(0), llama(1), batch_size=n) for n in (2, batch_size))
    torch.testing.assert_close(found.kl, expected.kl, rtol=1e-4, atol=1e-6)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-5)


@pytest.mark.parametrize(
    ("knobs", "n"), [((2, None), 5), ((2, 3), 5), ((2, 1), 2), ((1, 1), 1), ((1, 3), 3)]
)
def test_comparison_reads_the_first_blocks_that_both_knobs_allow(knobs, n: int):
    """Bytes are those of the whole text, of which the judged blocks have their share."""
    batch_size, max_batches = knobs
    models = llama(0), llama(1)
    found = compared(*models, batch_size=batch_size, max_batches=max_batches)
    alone = compared(*models, blocks=blocks()[:n], text_bytes=20 * n)
    assert found.tokens == alone.tokens == n * LENGTH
    assert len(found.kl) == n * (LENGTH - 1)
    assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert found.byte_perplexity == pytest.approx(alone.byte_perplexity, rel=1e-5)
    whole = compared(*models)
    assert (found.perplexity == pytest.approx(whole.perplexity, rel=1e-5)) == (n == 5)


@pytest.mark.parametrize(
    ("max_batches", "expected"), [(None, [(16, 40), (32, 40), (40, 40)]), (1, [(16, 16)])]
)
def test_comparison_reports_every_judged_token_as_progress(max_batches, expected):
    seen = []
    compared(
        llama(),
        llama(),
        max_batches=max_batches,
        progress=lambda done, total, note: seen.append((done, total)),
    )
    assert seen == expected


# The figures


def judged(**changes: Any) -> dict[str, Any]:
    metrics = {"mse": 0.1, "relative_mse": 0.2, "cosine_sim": 0.9, "cosine_sim_p5": 0.8}
    metrics |= {"verdict": "below target", "active_ffn_fraction": 1.0}
    return metrics | {"first_token": {}, "routing": {}} | changes


def text(dense: float = 2.0, sparse: float = 3.0) -> comparison.TextLoss:
    return comparison.TextLoss((dense, sparse), (1.5, 1.75), torch.arange(101.0), 0.5, 777)


def figures(
    layers: dict[int, dict[str, Any]],
    shapes: dict[int, MoEShape],
    host: str = "mixtral",
    **counts: int,
):
    counts = {"dense_parameters": 100, "sparse_parameters": 10**6} | counts
    texts = {"heldout": text(), "shifted": text(4, 8)}
    return model_figures(layers, shapes, texts, **counts, host=host)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (6, 2), (2, 2)])
def test_parameter_counts_are_those_of_the_real_sparse_model(n_experts, top_k, tied):
    shape = MoEShape(D, 32, 16, n_experts, top_k, "silu", True, False, "softmax_topk")
    model = mixtral(shape, tie_word_embeddings=tied)
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for name, parameter in model.named_parameters():
        if "experts." in name:
            assert parameter.shape[0] == n_experts
            idle += (n_experts - top_k) * parameter[0].numel()
    found = figures(
        {0: judged(), 1: judged()},
        {0: shape, 1: shape},
        dense_parameters=llama().num_parameters(),
        sparse_parameters=model.num_parameters(),
    )
    assert found["sparse"]["parameters"] == {"total": total, "active": total - idle}
    assert found["dense"]["parameters"] == sum(p.numel() for p in llama().parameters())


def test_experts_that_choose_are_active_as_often_as_their_capacity_says():
    found = figures({0: judged()}, {0: CHOOSING})["sparse"]["parameters"]
    per_expert = 3 * D * 16
    assert found == {"total": 10**6, "active": 10**6 - (4 * per_expert - 1.5 * per_expert)}


@pytest.mark.parametrize("pad_to", [16, 24], ids=["of the layer", "of all layers"])
def test_padding_of_uneven_experts_is_stored_and_neither_true_nor_active(pad_to: int):
    model, dense = mixtral(replace(SHAPE, d_ff_expert=pad_to)), llama()
    shapes = {0: UNEVEN, 1: replace(SHAPE, expert_widths=(pad_to, 8, 8, 8), d_ff_expert=pad_to)}
    found = figures(
        {0: judged(), 1: judged()},
        shapes,
        dense_parameters=dense.num_parameters(),
        sparse_parameters=model.num_parameters(),
    )["sparse"]["parameters"]
    neurons = [sum(shape.widths) for shape in shapes.values()]
    padding = sum(4 * pad_to - n for n in neurons) * 3 * D
    assert found["total"] == model.num_parameters()
    assert found["unpadded"] == model.num_parameters() - padding
    # Two of four experts work on a token: half of the neurons.
    assert found["active"] == found["unpadded"] - sum(neurons) / 2 * 3 * D


def test_dynamic_experts_that_stayed_even_have_no_padding_to_tell_apart():
    model, dense = mixtral(SHAPE), llama()
    even = replace(SHAPE, expert_widths=(16,) * 4)
    counts = {"dense_parameters": dense.num_parameters()}
    counts |= {"sparse_parameters": model.num_parameters()}
    layers = {0: judged(), 1: judged()}
    found = figures(layers, {0: even, 1: even}, **counts)["sparse"]["parameters"]
    assert found == figures(layers, {0: SHAPE, 1: SHAPE}, **counts)["sparse"]["parameters"]
    assert "unpadded" not in found


def test_a_narrow_layer_padded_to_the_width_of_another_runs_no_padding():
    model, dense = mixtral(replace(SHAPE, d_ff_expert=32)), llama()
    found = figures(
        {0: judged(), 1: judged()},
        {0: replace(SHAPE, d_ff_expert=32), 1: SHAPE},
        dense_parameters=dense.num_parameters(),
        sparse_parameters=model.num_parameters(),
    )["sparse"]["parameters"]
    assert found["total"] == model.num_parameters()
    assert found["unpadded"] == model.num_parameters() - 4 * 16 * 3 * D
    # Two experts of 32 neurons in the one, two of 16 in the other, a router in both.
    others = dense.num_parameters() - 2 * 32 * 3 * D
    assert found["active"] == others + (2 * 32 + 2 * 16) * 3 * D + 2 * 4 * D


def test_a_shared_expert_padded_to_the_width_of_another_layers_runs_no_padding():
    shapes = {k: replace(SHAPE, d_ff_shared=width) for k, width in enumerate((16, 8))}
    layers = {0: judged(), 1: judged()}
    found = figures(layers, shapes, host="granitemoeshared")["sparse"]["parameters"]
    unpadded = 10**6 - 8 * 3 * D
    idle = 2 * 2 * 16 * 3 * D
    assert found == {"total": 10**6, "unpadded": unpadded, "active": unpadded - idle}
    found = figures(layers, shapes, host="custom")["sparse"]["parameters"]
    assert found == {"total": 10**6, "active": 10**6 - idle}


def test_active_fractions_are_those_that_were_measured_weighted_by_width():
    wide = MoEShape(D, 64, 16, 4, 1, "silu", True, False, "softmax_topk")
    measured = {0: judged(active_ffn_fraction=0.75), 1: judged(active_ffn_fraction=0.25)}
    found = figures(measured, {0: SHAPE, 1: wide})
    assert found["active_ffn_fraction"] == pytest.approx((24 + 16) / (32 + 64))
    # The router's 4 x D products are 4/3 neurons' worth, of three projections each.
    assert found["active_flops_fraction"] == pytest.approx((24 + 16 + 2 * 4 / 3) / (32 + 64))


def test_the_tail_of_more_tokens_than_torch_takes_for_a_quantile_is_found():
    """It refuses more than 2**24."""
    kl = torch.zeros(2**24 + 100)
    kl[: len(kl) // 50] = 1.0
    texts = {"heldout": replace(text(), kl=kl), "shifted": text()}
    found = model_figures({0: judged()}, {0: SHAPE}, texts, 100, 10**6, "mixtral")
    assert found["kl"]["p99"] == 1.0


def apart(kl: float) -> comparison.TextLoss:
    return replace(text(), kl=torch.full((4,), kl))


def test_the_divergence_is_that_of_the_heldout_text():
    texts = {"heldout": apart(1.0), "shifted": apart(3.0)}
    found = model_figures({0: judged()}, {0: SHAPE}, texts, 100, 10**6, "mixtral")["kl"]
    assert found["mean"] == 1.0 and found["by_text"] == {"heldout": 1.0, "shifted": 3.0}


def test_the_worst_layer_of_a_control_is_that_of_the_largest_error():
    layers = {
        0: {"relative_mse": 0.2, "cosine_sim": 0.9, "active_ffn_fraction": 0.5},
        1: {"relative_mse": 0.6, "cosine_sim": 0.5, "active_ffn_fraction": 1.0},
    }
    shapes = {0: SHAPE, 1: replace(SHAPE, d_ff=64)}
    found = control_figures(layers, shapes, {"heldout": apart(1.0), "shifted": apart(1.0)})
    assert found["active_ffn_fraction"] == pytest.approx((16 + 64) / 96)
    assert found["relative_mse"]["worst"] == 0.6 and found["cosine_sim"]["worst"] == 0.5


def test_the_worst_layer_recovers_least_of_its_gap():
    def control(error: float) -> dict[str, Any]:
        return {"layers": {name: {"relative_mse": error} for name in "01"}}

    layers = {0: {"relative_mse": 0.2}, 1: {"relative_mse": 0.4}}
    found = gap_figures(layers, {"static": control(0.5), "oracle": control(0.1)})["gap_recovery"]
    assert found["worst"] == pytest.approx(0.25) and found["mean"] == pytest.approx(0.5)


def test_figures_name_each_text_side_and_layer():
    layers = {0: judged(verdict="good"), 10: judged(cosine_sim=0.5, relative_mse=0.6)}
    found = figures(layers, {0: SHAPE, 10: SHAPE})
    assert found["dense"]["perplexity"] == {"heldout": 2, "shifted": 4}
    assert found["sparse"]["perplexity"] == {"heldout": 3, "shifted": 8}
    assert found["dense"]["byte_perplexity"] == {"heldout": 1.5, "shifted": 1.5}
    assert found["sparse"]["byte_perplexity"] == {"heldout": 1.75, "shifted": 1.75}
    assert found["perplexity_ratio"] == {"heldout": 1.5, "shifted": 2}
    assert found["kl"]["mean"] == 50 and found["kl"]["p99"] == 99
    assert found["top1_agreement"] == 0.5
    assert found["cosine_sim"] == {"mean": pytest.approx(0.7), "worst": 0.5}
    assert found["relative_mse"] == {"mean": pytest.approx(0.4), "worst": 0.6}
    assert found["good_layers"] == {"good": 1, "of": 2, "cosine_above": 0.95}
    assert found["judged_tokens"] == {"heldout": 777, "shifted": 777}
    assert found["layers"] == {str(k): metrics for k, metrics in layers.items()}


def test_figures_leave_null_layers_out_and_are_null_when_all_are():
    null = judged(cosine_sim=None, relative_mse=None)
    some = figures({0: judged(), 1: null}, {0: SHAPE, 1: SHAPE})
    assert some["cosine_sim"] == {"mean": 0.9, "worst": 0.9}
    none = figures({0: null}, {0: SHAPE})
    assert none["relative_mse"] == none["cosine_sim"] == {"mean": None, "worst": None}
    assert finite(some) and finite(none)


# Text


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Document("a", "Return the number of items. " * 20)], 300)


def test_continuation_is_the_prompt_and_the_models_first_choices(tokenizer):
    model = llama()
    ids = tokenizer("Return the").input_ids
    for _ in range(6):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert comparison.continuation(model, tokenizer, "Return the", 6) == expected


def test_continuation_by_no_tokens_is_the_prompt(tokenizer):
    assert comparison.continuation(llama(), tokenizer, "Return", 0) == "Return"


def test_continuation_of_an_empty_prompt_begins_a_document(tokenizer):
    model = llama(seed=1)
    after_end = comparison.continuation(model, tokenizer, tokenizer.eos_token, 5)
    assert comparison.continuation(model, tokenizer, "", 5) == after_end != ""


# All together


@pytest.fixture
def parts(tmp_path: Path, tokenizer) -> dict[str, Any]:
    """What `measure` takes: 3 blocks of heldout and 2 of shifted text, layers 0 and 1."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    counts = {}
    for name, n in {"train": 4, "validation": 2, "heldout": 3, "shifted": 2}.items():
        save_file({"tokens": blocks(n).int()}, tokens / f"{name}.safetensors")
        counts[name] = {"blocks": n, "tokens": n * LENGTH, "bytes": 50 * n, "budget": 99}
    durable.write_json(tokens / corpus.RECORD, {"sequence_length": LENGTH, "splits": counts})
    layers, stores = {}, {}
    for k in (0, 1):
        layers[k] = tmp_path / f"layer_{k}"
        layers[k].mkdir()
        save_layer(layer(seed=k), layers[k], {"layer": k, "host": "mixtral"})
        write_history(layers[k], [{"step": 0, "validation_relative_mse": 0.5 + k}])
        stores[k] = stored(tmp_path / f"layer_{k}.zarr", rows(), rows(seed=k))
    models = {"dense": llama(), "sparse": mixtral(SHAPE)}
    given = {"tokenizer": tokenizer, "tokens": tokens, "layers": layers, "stores": stores}
    given |= {"controls": {}, "static_norms": {}}
    return models | given


@pytest.mark.parametrize(
    ("batch_size", "max_batches", "judged"), [(1, 2, (2, 2)), (1, 1, (1, 1)), (2, 1, (2, 2))]
)
def test_measure_judges_so_many_batches_of_each_text(
    parts: dict[str, Any], batch_size: int, max_batches: int, judged: tuple[int, int]
):
    cfg = EvaluateConfig(batch_size, max_batches, prompt="Return", new_tokens=0)
    metrics = evaluation.measure(**parts, cfg=cfg)["metrics"]
    assert tuple(n / LENGTH for n in metrics["judged_tokens"].values()) == judged
    for name, n in zip(("heldout", "shifted"), judged, strict=True):
        text = corpus.read_blocks(parts["tokens"], name)[:n]
        alone = compared(parts["dense"], parts["sparse"], blocks=text, text_bytes=50 * n)
        found = metrics["sparse"]["byte_perplexity"][name]
        assert found == pytest.approx(alone.byte_perplexity[1], rel=1e-5)


def test_measure_gives_everything_that_the_report_tells(parts: dict[str, Any]):
    tokens, stores, tokenizer = parts["tokens"], parts["stores"], parts["tokenizer"]
    dense, sparse = parts["dense"], parts["sparse"]
    counts = artifacts.read_json(tokens / corpus.RECORD)["splits"]
    cfg = EvaluateConfig(batch_size=2, prompt="Return", new_tokens=3)
    found = evaluation.measure(**parts, cfg=cfg)
    assert found.keys() == {"metrics", "layers", "history", "samples", "tokens"}
    metrics = found["metrics"]
    assert finite(metrics)
    assert metrics["judged_tokens"] == {name: counts[name]["tokens"] for name in evaluation.TEXTS}
    for name in ("heldout", "shifted"):
        text = corpus.read_blocks(tokens, name)
        alone = compared(dense, sparse, blocks=text, text_bytes=counts[name]["bytes"])
        assert metrics["dense"]["perplexity"][name] == alone.perplexity[0]
        assert metrics["sparse"]["byte_perplexity"][name] == alone.byte_perplexity[1]
    assert metrics["layers"]["1"] == evaluation.layer_metrics(layer(seed=1), stores[1])
    assert metrics["sparse"]["parameters"]["total"] == sparse.num_parameters()
    assert found["history"] == {
        k: [{"step": 0, "validation_relative_mse": 0.5 + k}] for k in (0, 1)
    }
    assert found["layers"][1]["host"] == "mixtral" and found["tokens"] == counts
    for side, model in (("dense", dense), ("sparse", sparse)):
        said = comparison.continuation(model, tokenizer, "Return", 3)
        assert found["samples"][side] == said


def ffns() -> dict[int, DenseFFN]:
    return {slot.index: slot.weights() for slot in find_ffns(llama())}


def test_controls_are_judged_as_the_sparse_model_is(parts: dict[str, Any]):
    """In the FFNs' places of the same dense model, on the same rows and the same text."""
    static = {k: layer(seed=5 + k) for k in (0, 1)}
    oracle = {k: OracleMoE(layer(seed=k), ffn) for k, ffn in ffns().items()}
    controls = {"static": static, "oracle": oracle}
    cfg = EvaluateConfig(batch_size=2, prompt="Return", new_tokens=0)
    before = [p.clone() for p in parts["dense"].parameters()]
    metrics = evaluation.measure(**parts | {"controls": controls}, cfg=cfg)["metrics"]
    assert finite(metrics)
    assert all(map(torch.equal, before, parts["dense"].parameters()))
    for name, modules in controls.items():
        found, model = metrics["controls"][name], llama()
        for k, slot in enumerate(find_ffns(model)):
            slot.replace(modules[k])
            alone = evaluation.layer_metrics(modules[k], parts["stores"][k])
            assert found["layers"][str(k)]["relative_mse"] == alone["relative_mse"]
        for text in ("heldout", "shifted"):
            read = corpus.read_blocks(parts["tokens"], text)
            loss = compared(parts["dense"], model, blocks=read)
            wanted = loss.perplexity[1] / loss.perplexity[0]
            assert found["perplexity_ratio"][text] == pytest.approx(wanted, rel=1e-5)
            assert found["kl"]["by_text"][text] == pytest.approx(float(loss.kl.mean()), rel=1e-4)
    ours, best = (
        {k: found["relative_mse"] for k, found in of.items()}
        for of in (metrics["layers"], metrics["controls"]["oracle"]["layers"])
    )
    plain = metrics["controls"]["static"]["layers"]
    for k, recovered in metrics["gap_recovery"]["layers"].items():
        gap = plain[k]["relative_mse"] - best[k]
        wanted = (plain[k]["relative_mse"] - ours[k]) / gap if gap > 0 else None
        assert recovered == (None if wanted is None else pytest.approx(wanted))


def test_the_layers_are_judged_where_the_embedding_is_offloaded(parts: dict[str, Any]):
    cfg = EvaluateConfig(batch_size=2, prompt="Return", new_tokens=0)
    wanted = evaluation.measure(**parts, cfg=cfg)["metrics"]
    cpu_offload(parts["dense"].model.embed_tokens, "cpu")
    assert parts["dense"].device.type == "meta"
    found = evaluation.measure(**parts, cfg=cfg)["metrics"]
    assert found["layers"] == wanted["layers"] and found["kl"] == wanted["kl"]


def test_without_both_controls_no_gap_is_told(parts: dict[str, Any]):
    cfg = EvaluateConfig(batch_size=2, prompt="Return", new_tokens=0)
    static = {"static": {k: layer(seed=5 + k) for k in (0, 1)}}
    metrics = evaluation.measure(**parts | {"controls": static}, cfg=cfg)["metrics"]
    assert metrics["controls"].keys() == {"static"} and "gap_recovery" not in metrics


def test_controls_of_a_bfloat16_model_compute_in_bfloat16(parts: dict[str, Any]):
    dense = parts["dense"].bfloat16()
    copied = comparison.replaced(dense, {0: layer()})
    logits = copied(blocks(1)).logits
    assert logits.dtype == torch.bfloat16
    assert copied.get_input_embeddings().weight is dense.get_input_embeddings().weight


def test_a_healed_static_control_brings_its_norms(parts: dict[str, Any]):
    """And the dense model keeps its own."""
    dense, static = parts["dense"], {k: layer(seed=5 + k) for k in (0, 1)}
    name = "model.norm.weight"
    healed = {name: torch.full_like(dense.get_parameter(name), 1.5)}
    before = dense.get_parameter(name).clone()
    copied = comparison.replaced(dense, static, healed)
    assert torch.equal(copied.get_parameter(name), healed[name])
    assert torch.equal(dense.get_parameter(name), before)
    cfg = EvaluateConfig(batch_size=2, prompt="Return", new_tokens=0)
    given = parts | {"controls": {"static": static}}
    plain, changed = (
        evaluation.measure(**given | {"static_norms": norms}, cfg=cfg)["metrics"]["controls"]
        for norms in ({}, healed)
    )
    assert plain["static"]["perplexity_ratio"] != changed["static"]["perplexity_ratio"]


# Speed


class Slowed(torch.nn.Module):
    """Takes its time before it does what another module does."""

    def __init__(self, module: torch.nn.Module, seconds: float) -> None:
        super().__init__()
        self.module, self.seconds = module, seconds

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(self.seconds)
        return self.module(*args, **kwargs)


def slowed(seconds: float) -> tf.PreTrainedModel:
    model = llama()
    model.set_submodule(
        "model.layers.0.mlp", Slowed(model.get_submodule("model.layers.0.mlp"), seconds)
    )
    return model


@pytest.mark.parametrize("slow", ["dense", "sparse"])
def test_the_ratio_is_of_the_sparse_models_speed_over_the_dense_ones(slow: str):
    sides = {"dense": llama(), "sparse": llama()} | {slow: slowed(0.05)}
    found = speed.compare(sides["dense"], sides["sparse"], blocks(3))
    assert list(found["work"]) == ["prefill_1", "prefill_16", "decode"]
    for of in found["work"].values():
        assert of["least"] <= of["ratio"] <= of["most"]
        assert (of["ratio"] < 0.8) if slow == "sparse" else (of["ratio"] > 1.25)
        assert (of["sparse"] < of["dense"]) == (slow == "sparse")
    assert found["dtype"] == "float32" and found["threads"] == torch.get_num_threads()
    assert 9 * 0.05 < LENGTH / found["work"]["prefill_1"][slow] * 9 < 60


def test_a_model_without_a_head_is_timed_without_writing():
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 1}
    config = tf.BertConfig(vocab_size=300, num_attention_heads=2, **sizes)
    model = tf.BertModel(config).eval()
    assert list(speed.compare(model, model, blocks(20))["work"]) == ["prefill_1", "prefill_16"]


def test_the_headline_leaves_out_what_is_not_there_and_keeps_every_name():
    metrics = {"kl": {"mean": 0.5, "p99": 2.0}, "gap_recovery": {"mean": None}, "layers": {}}
    assert headline(metrics, {}) == {"kl": {"mean": 0.5}}
    timed = {"work": {"decode": {"ratio": 0.9, "least": 0.8}}, "rounds": 9}
    assert headline(metrics, timed)["speed"] == {"decode": 0.9}
    assert len(set(HEADLINE)) == len(HEADLINE) <= 16
