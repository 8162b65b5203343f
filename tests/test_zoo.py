"""The reference tasks: real data that every machine has, split without overlap. No network is trained here."""

from __future__ import annotations

import torch

from optpipe.zoo import docstrings


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


def _rows(batches) -> list[tuple[int, ...]]:
    return [tuple(row) for inputs, _ in batches for row in inputs.tolist()]
