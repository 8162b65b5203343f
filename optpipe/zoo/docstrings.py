"""The docstrings of Python's own standard library, and a text encoder of 1.4 M parameters that tells their topics."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from optpipe.progress import say
from optpipe.task import Task, top1_accuracy
from optpipe.training import Schedule, fit
from optpipe.zoo.weights import trained_once

# Top-level modules of each topic. Left out are those that some distributions package apart, such as tkinter.
TOPICS = {
    "internet": "email http urllib mailbox imaplib nntplib smtplib ftplib poplib telnetlib ssl socket socketserver "
    "wsgiref xmlrpc cgi webbrowser ipaddress netrc",
    "concurrency": "asyncio multiprocessing threading concurrent queue sched selectors subprocess signal contextlib",
    "numbers and time": "_pydecimal decimal fractions statistics datetime _pydatetime calendar random _strptime "
    "numbers zoneinfo heapq bisect _pylong operator",
    "language": "importlib inspect ast dis typing types enum dataclasses functools abc _py_abc collections copy "
    "weakref _weakrefset tokenize pkgutil runpy code codeop symtable ctypes _collections_abc pickle pickletools",
    "testing and logs": "unittest doctest pdb bdb trace cProfile profile pstats timeit traceback warnings logging "
    "tracemalloc faulthandler pydoc argparse optparse cmd getopt",
    "files and text": "tarfile zipfile pathlib shutil _pyio tempfile encodings codecs xml configparser csv json re "
    "difflib string textwrap os posixpath ntpath fileinput gzip bz2 lzma glob fnmatch plistlib shelve dbm html "
    "locale gettext stringprep sre_parse",
}
LENGTH = 64  # tokens of a text; longer ones are cut
VOCABULARY = 4096  # the most frequent words of the training texts; 0 is padding, 1 any other word
TEST_TEXTS, VALIDATION_TEXTS, CALIBRATION_TEXTS = 1500, 600, 256
EPOCHS = 8
WORD = re.compile(r"[a-z]+|\d|[^\w\s]")


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017). (n, length, width), mask (n, 1, 1, length) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        out: Tensor = x + self.dropout(self.down(self.act(self.up(self.norm2(x)))))
        return out


class TextEncoder(nn.Module):
    """Tokens (n, LENGTH), int64, 0 for padding -> logits (n, topics).

    embedding_width: of the words' vectors, which a linear layer takes to `width` (Lan et al. 2020); 0 is `width`.
    """

    def __init__(
        self, width: int = 128, heads: int = 4, layers: int = 4, dropout: float = 0.2, embedding_width: int = 0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embedding_width or width, padding_idx=0)
        self.widen = nn.Linear(embedding_width, width) if embedding_width else nn.Identity()
        self.position = nn.Parameter(torch.zeros(LENGTH, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(TOPICS))

    def forward(self, tokens: Tensor) -> Tensor:
        known = (tokens != 0).float()
        mask = (1 - known)[:, None, None, :] * -1e4
        x = self.dropout(self.widen(self.embedding(tokens)) + self.position)
        for block in self.blocks:
            x = block(x, mask)
        weights = known.unsqueeze(2)
        pooled = (self.norm(x) * weights).sum(1) / weights.sum(1)
        logits: Tensor = self.head(self.dropout(pooled))
        return logits


@cache
def texts() -> tuple[list[str], list[int]]:
    """Every docstring of at least four words in the modules of TOPICS, once, and the number of its topic."""
    topic_of = {module: i for i, modules in enumerate(TOPICS.values()) for module in modules.split()}
    found: dict[str, int] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).with_suffix("")
        if inside.parts[0] not in topic_of or {"test", "tests"} & set(inside.parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text.split()) >= 4:
                    found.setdefault(text, topic_of[inside.parts[0]])
    return list(found), list(found.values())


def task() -> Task:
    """Tokens (n, LENGTH) of docstrings and their topics; the same for equal versions of Python."""
    from sklearn.model_selection import train_test_split

    documents, topics = texts()
    words = [WORD.findall(document.lower())[:LENGTH] for document in documents]
    every = list(range(len(documents)))
    rest, test = train_test_split(every, test_size=TEST_TEXTS, stratify=topics, random_state=0)
    train, validation = train_test_split(
        rest, test_size=VALIDATION_TEXTS, stratify=[topics[i] for i in rest], random_state=0
    )
    counts = Counter(word for i in train for word in words[i])
    numbers = {word: i + 2 for i, (word, _) in enumerate(sorted(counts.items(), key=_rank)[: VOCABULARY - 2])}
    tokens = torch.zeros(len(words), LENGTH, dtype=torch.long)
    for i, line in enumerate(words):
        tokens[i, : len(line)] = torch.tensor([numbers.get(word, 1) for word in line] or [1])
    labels = torch.tensor(topics)

    def batches(indices: list[int], *, size: int = 64, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(tokens[indices], labels[indices]), batch_size=size, shuffle=shuffle)

    return Task(
        train=batches(train, size=32, shuffle=True),
        validation=batches(validation),
        calibration=batches(train[:CALIBRATION_TEXTS]),
        test=batches(test),
        example_inputs=tokens[train[:16]],
        metric=top1_accuracy(),
        fingerprint=f"docstrings {hashlib.sha256(repr((documents, topics)).encode()).hexdigest()[:16]}, split 0",
        input_names=["tokens"],
        output_names=["logits"],
        class_names=list(TOPICS),
        slices={"length": lambda tokens, _: ["short" if n < 24 else "long" for n in (tokens != 0).sum(1).tolist()]},
    )


def _rank(item: tuple[str, int]) -> tuple[int, str]:
    """Of a word and its count: the most frequent first, equal ones in the order of the alphabet."""
    return -item[1], item[0]


def trained(seed: int = 0) -> TextEncoder:
    """The baseline. The first call on a machine trains it; later ones read the weights that it kept."""
    name = f"docstrings_{seed}_{EPOCHS}_{str(task().fingerprint).split()[1].rstrip(',')}"
    torch.manual_seed(seed)
    return trained_once(name, TextEncoder(), train)


def train(model: TextEncoder) -> None:
    """Train `model` in place on the docstrings."""
    say("Training the reference text encoder on docstrings (once; the weights are kept)")
    docstrings = task()
    fit(
        model,
        docstrings.train,
        lambda inputs, outputs, target: docstrings.loss(outputs, target),
        Schedule(epochs=EPOCHS, learning_rate=1e-3),
        description="training docstrings",
    )
