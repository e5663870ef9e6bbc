"""Made-up parallel sentences that can be learnt: the target is the source, backwards."""

import gzip
from pathlib import Path
from random import Random

NOUNS = ("hund", "katze", "vogel", "fisch", "pferd", "maus", "kuh", "wolf")
THINGS = ("dog", "cat", "bird", "fish", "horse", "mouse", "cow", "wolf")
SPLITS = {"train": 160, "val": 60, "test": 80}


def pairs(n: int, seed: int) -> list[tuple[str, str]]:
    rng = Random(seed)
    found = []
    for _ in range(n):
        words = [rng.randrange(len(NOUNS)) for _ in range(rng.randint(1, 5))]
        source, target = (NOUNS[i] for i in words), (THINGS[i] for i in reversed(words))
        found.append((f"ein {' und '.join(source)}.", f"a {' and '.join(target)}."))
    return found


def write_text(path: Path, seed: int = 0) -> Path:
    """Write the folder; the training files are compressed."""
    path.mkdir(parents=True, exist_ok=True)
    for at, (split, n) in enumerate(SPLITS.items()):
        sides = zip(*pairs(n, seed + at), strict=True)
        for language, lines in zip(("de", "en"), sides, strict=True):
            content = "".join(f"{line}\n" for line in lines).encode()
            file = path / f"{split}.{language}"
            if split == "train":
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
            else:
                file.write_bytes(content)
    return path
