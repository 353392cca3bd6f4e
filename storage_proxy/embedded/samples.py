"""The files of the main job: a small model directory and a dataset, the same bytes for the same seed.

Names are chosen to hurt: spaces, letters outside ASCII, and every sign that has a meaning in a URL, a shell or a query.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024
BIG_BYTES = 200 * MIB
SUMS = "SHA256SUMS"
BIG = "weights/model-00001-of-00001.safetensors"

_LAYERS = 38
_HARD_NAMES = (
    "names/with spaces/a file with spaces.txt",
    "names/größe und ärger.txt",
    "names/日本語/モデル.json",
    "names/ship 🚢.txt",
    "names/a+b c+d.txt",
    "names/100%.txt",
    "names/%41%2F%00.txt",
    "names/#1 of #2.txt",
    'names/it\'s "quoted" `here`.txt',
    "names/a&b=c;d?e@f:g,h.txt",
    "names/$HOME ~ !x (y) [z] {w} <v> |u^.txt",
    "names/-rf",
    "names/.hidden",
    "names/" + "long" * 50 + ".txt",
)


@dataclass(frozen=True, slots=True)
class SampleFile:
    """One file, defined by its seed, path and size (bytes)."""

    path: str
    size: int
    seed: int

    def blocks(self) -> Iterator[bytes]:
        """Its content in blocks of at most 1 MiB; no two blocks of a file are the same."""
        base = random.Random(f"{self.seed}:{self.path}").randbytes(min(self.size, MIB))
        left, number = self.size, 0
        while left > 0:
            block = number.to_bytes(8, "big") + base[8:] if number else base
            yield block[:left]
            left -= min(left, len(block))
            number += 1


@dataclass(frozen=True, slots=True)
class SampleTree:
    """Files with their sha256 (hex), and the text of `SHA256SUMS`, which is a file of the tree itself."""

    files: dict[str, int]
    digests: dict[str, str]
    sums: bytes

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def model_files(seed: int, big_bytes: int = BIG_BYTES) -> list[SampleFile]:
    sizes = random.Random(seed)
    plain = {
        "config.json": 1_214,
        "tokenizer/tokenizer.json": 2_306_117,
        "tokenizer/vocab.txt": 231_508,
        "tokenizer/special.empty": 0,
        "a/b/c/d/e/f/g/deep.bin": 77,
        "checkpoint/optimizer.bin": 6 * MIB + 1,  # over the smallest part of a multipart upload
        BIG: big_bytes,
    }
    plain |= {f"layers/{number:02}/weight.bin": sizes.randrange(1, 200_000) for number in range(_LAYERS)}
    plain |= {name: sizes.randrange(1, 5_000) for name in _HARD_NAMES}
    return [SampleFile(path, size, seed) for path, size in sorted(plain.items())]


def dataset_files(seed: int) -> list[SampleFile]:
    sizes = random.Random(seed + 1)
    names = [f"train/part {number:02}.csv" for number in range(6)] + ["labels/größen+namen.json", "labels/none.txt"]
    return [SampleFile(name, 0 if name.endswith("none.txt") else sizes.randrange(1, 900_000), seed) for name in names]


def write_tree(root: Path, files: list[SampleFile]) -> SampleTree:
    """Writes the files and their `SHA256SUMS` below `root`. Blocking. Raises OSError (disk full)."""
    digests: dict[str, str] = {}
    for file in files:
        target = root / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with target.open("wb") as out:
            for block in file.blocks():
                digest.update(block)
                out.write(block)
        digests[file.path] = digest.hexdigest()
    sums = "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items())).encode()
    (root / SUMS).write_bytes(sums)
    sizes = {file.path: file.size for file in files} | {SUMS: len(sums)}
    return SampleTree(sizes, digests | {SUMS: hashlib.sha256(sums).hexdigest()}, sums)
