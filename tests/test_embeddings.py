"""Sentence embeddings of two encoders are compared text by text and by their neighbours."""

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.nn import functional as F

from pipeline import embeddings
from pipeline.embeddings import compare_embeddings, embed, figures, is_encoder


def bert(seed: int = 0) -> tf.BertModel:
    torch.manual_seed(seed)
    config = tf.BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    return tf.BertModel(config).eval()


def blocks(n: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(50, (n, 7), generator=torch.Generator().manual_seed(seed))


def test_only_what_generates_no_text_is_an_encoder():
    config = tf.LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    assert is_encoder(bert()) and not is_encoder(tf.LlamaForCausalLM(config))


@torch.no_grad()
def test_an_embedding_is_the_mean_over_tokens_at_length_one():
    model, ids = bert(), blocks()
    found = embed(model, ids, batch_size=4)
    for text, embedding in zip(ids, found, strict=True):
        hidden = model(input_ids=text[None]).last_hidden_state[0]
        torch.testing.assert_close(embedding, F.normalize(hidden.mean(dim=0), dim=0))


def test_an_encoder_compared_with_itself_is_the_same():
    match = compare_embeddings(bert(), bert(), blocks(), batch_size=4)
    torch.testing.assert_close(match.cosine_N, torch.ones(9))
    assert (match.neighbour_agreement, match.neighbour_overlap, match.tokens) == (1, 1, 63)


@torch.no_grad()
def test_neighbours_are_those_of_a_loop_over_pairs(monkeypatch):
    monkeypatch.setattr(embeddings, "NEIGHBOURS", 3)
    ids, models = blocks(12), (bert(0), bert(1))
    match = compare_embeddings(*models, ids, batch_size=5)
    nearest, cosines = [], []
    sides = [embed(model, ids, 12) for model in models]
    for side in sides:
        of = []
        for i in range(12):
            others = sorted(
                (j for j in range(12) if j != i), key=lambda j: -float(side[i] @ side[j])
            )
            of.append(others[:3])
        nearest.append(of)
    cosines = [float(a @ b) for a, b in zip(*sides, strict=True)]
    pairs = list(zip(*nearest, strict=True))
    assert match.neighbour_agreement == pytest.approx(sum(a[0] == b[0] for a, b in pairs) / 12)
    shared = sum(len(set(a) & set(b)) for a, b in pairs) / 36
    assert match.neighbour_overlap == pytest.approx(shared)
    assert 0 < shared < 1
    assert match.cosine_N.tolist() == pytest.approx(cosines, abs=1e-6)
    found = figures({"heldout": match})
    assert found["embedding_cosine"]["heldout"] == pytest.approx(sum(cosines) / 12, abs=1e-6)
    assert found["embedding_cosine_p5"]["heldout"] < found["embedding_cosine"]["heldout"]


def test_max_batches_bounds_what_is_judged():
    match = compare_embeddings(bert(), bert(1), blocks(), batch_size=2, max_batches=2)
    assert len(match.cosine_N) == 4 and match.tokens == 28
