"""Small corpora with fixed seeds, and quick preparations of them."""

import gzip
import json
import random
from pathlib import Path

from remoe.lab.data import Dataset, PrepareOptions, Split

WORDS = ["the", "a", "of", "ReLU", "router", "expert", "gate", "model", "déjà", "你好", "🙂", "x=1;", "return\n"]


def make_texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """`count` different texts of about `words` words."""
    generator = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(generator.choices(WORDS, k=words)) for i in range(count)]


def write_jsonl(path: Path, texts: list[str], domain: str | None = None) -> Path:
    own = {} if domain is None else {"domain": domain}
    return write_json_rows(path, [{"text": text} | own for text in texts])


def write_json_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Rows of text and domain, in the format that the suffix of `path` names."""
    content = b"".join(json.dumps({"text": text, "domain": domain}).encode() + b"\n" for text, domain in rows)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [r[0] for r in rows], "domain": [r[1] for r in rows]}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        import zstandard

        half = len(content) // 2  # two frames, as appending compressors write them
        path.write_bytes(zstandard.compress(content[:half]) + zstandard.compress(content[half:]))
    else:
        path.write_bytes(content)
    return path


def small_options(out: Path, *sources: Path | str, **changes: object) -> PrepareOptions:
    """Options for a preparation that takes a fraction of a second."""
    settings: dict = {"vocab_size": 300, "shard_tokens": 2000, "validation_fraction": 0.1, "quiet": True}
    return PrepareOptions(sources=tuple(str(name) for name in sources), out=out, **(settings | changes))


def document_texts(dataset: Dataset, split: Split) -> list[tuple[str, str]]:
    """Domain and decoded text of each document, in order; checks that each ends with EOS."""
    tokenizer = dataset.load_tokenizer()
    found = []
    for shard in split.shards:
        for number, domain in enumerate(shard.document_domain.tolist()):
            first, last = shard.document_offsets[number : number + 2].tolist()
            tokens = shard.tokens[first:last].tolist()
            assert tokens[-1] == dataset.eos_token_id
            assert dataset.eos_token_id not in tokens[:-1]
            found.append((dataset.domains[domain], tokenizer.decode(tokens[:-1])))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file below `folder`, by its path from there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
