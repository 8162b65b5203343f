"""The reference tasks: real data that every machine has, split without overlap. No network is trained here."""

from __future__ import annotations

import torch

from optpipe.zoo import docstrings, propositions


def test_docstrings_are_texts_of_every_topic_split_without_overlap() -> None:
    documents, topics = docstrings.texts()
    assert len(documents) == len(set(documents)) == len(topics) > 4000
    assert set(topics) == set(range(len(docstrings.TOPICS)))
    task = docstrings.task()
    assert docstrings.task().fingerprint == task.fingerprint
    seen = {split: _rows(getattr(task, split)) for split in ("train", "validation", "test")}
    assert len(seen["test"]) == docstrings.TEST_TEXTS and len(seen["validation"]) == docstrings.VALIDATION_TEXTS
    assert len(seen["train"]) + docstrings.TEST_TEXTS + docstrings.VALIDATION_TEXTS == len(documents)
    calibration = set(_rows(task.calibration))
    assert calibration <= set(seen["train"])


def test_padding_does_not_change_what_a_text_is_taken_for() -> None:
    torch.manual_seed(0)
    model = docstrings.TextEncoder().eval()
    tokens = torch.zeros(2, docstrings.LENGTH, dtype=torch.long)
    tokens[:, :5] = torch.tensor([7, 8, 9, 10, 11])
    with torch.no_grad():
        together = model(tokens)
        model.position[5:] = 100.0
        again = model(tokens)
    assert together.shape == (2, len(docstrings.TOPICS))
    assert torch.allclose(together, again, atol=1e-5)


def test_the_truth_of_propositions_is_known_and_nothing_is_on_the_edge_of_it() -> None:
    numbers, truth = propositions.draw(500, 7)
    again, _ = propositions.draw(500, 7)
    assert torch.equal(numbers, again) and truth.shape == (500, len(propositions.PROPOSITIONS))
    names = list(propositions.PROPOSITIONS)
    for (a, b, c, d), said in zip(numbers.tolist(), truth.bool().tolist(), strict=True):
        assert said[names.index("a + b > c")] == (a + b > c)
        assert said[names.index("they ascend")] == ([a, b, c, d] == sorted([a, b, c, d]))
        assert said[names.index("two or more are negative")] == (sum(n < 0 for n in (a, b, c, d)) >= 2)
        assert said[names.index("b lies between a and c")] == (min(a, c) < b < max(a, c))
        assert said[names.index("a and d have one sign")] == (a * d > 0)
    for margin in propositions.PROPOSITIONS.values():
        assert margin(*numbers.unbind(1)).abs().min() > propositions.MARGIN
    assert 0.02 < truth.mean(dim=0).min() and truth.mean(dim=0).max() < 0.98


def test_the_splits_of_propositions_do_not_overlap() -> None:
    task = propositions.task(train=512)
    assert task.fingerprint != propositions.task().fingerprint
    splits = [task.train, task.validation, task.calibration, task.test]
    rows = [set(_rows(split)) for split in splits]
    assert len(set().union(*rows)) == sum(map(len, rows))
    assert len(rows[-1]) == propositions.TEST


def _rows(batches) -> list[tuple[int, ...]]:
    return [tuple(row) for inputs, _ in batches for row in inputs.tolist()]
