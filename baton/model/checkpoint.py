"""What lies in a model directory's safetensors files: names, shapes, dtypes, byte ranges. No torch.

File format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors, "Format"). Everything here reads headers only, so a
missing, truncated or contradictory shard is named before any weight is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import ModelLoadError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 1024
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a shard. `dtype` is the format's name (F32, BF16, F16, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model directory. `identity` is the same for the same bytes anywhere."""

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    identity: str


def read_checkpoint(model_dir: Path) -> Checkpoint:
    """Read the headers of a single-file or sharded checkpoint.

    Raises ModelLoadError, naming the file, when one is missing, truncated, not safetensors, or
    when the shards do not hold what the index says.
    """
    index_path = model_dir / INDEX_FILE
    if (model_dir / SINGLE_FILE).is_file():  # wins over an index, as in transformers
        weight_map, names = None, [SINGLE_FILE]
    elif index_path.is_file():
        weight_map = _read_weight_map(index_path)
        names = sorted(set(weight_map.values()))
    else:
        raise ModelLoadError(
            f"no weights in {model_dir}: expected {SINGLE_FILE} or {INDEX_FILE} with its shards "
            "(checkpoints in PyTorch's .bin format must be converted to safetensors first)"
        )
    tensors: dict[str, TensorEntry] = {}
    identity = hashlib.blake2b(digest_size=16)
    for name in names:
        path = model_dir / name
        found, digest = _read_shard(path)
        tensors.update(found)
        identity.update(name.encode() + b"\0" + digest)
    if weight_map is not None:
        _check_index(index_path, weight_map, tensors)
    return Checkpoint(tuple(model_dir / name for name in names), tensors, identity.hexdigest())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelLoadError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _read_weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index_path} has no weight_map")
    for name in set(weight_map.values()):
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelLoadError(f"{index_path} names a shard outside its directory: {name!r}")
    return weight_map


def _read_shard(path: Path) -> tuple[dict[str, TensorEntry], bytes]:
    """The tensors of one file, and a digest of its size, header and samples of its data.

    Fine-tunes of one model have identical headers, so the digest also covers `_SAMPLES_PER_FILE`
    small pieces spread over the data: cheap for any size, and different for different weights.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise ModelLoadError(
                    f"{path} is truncated or not a safetensors file ({size} bytes): "
                    "download it again"
                )
            header = file.read(header_bytes)
            digest = hashlib.blake2b(size.to_bytes(8, "little") + header, digest_size=16)
            data_begin, data_bytes = 8 + header_bytes, size - 8 - header_bytes
            for sample in range(_SAMPLES_PER_FILE):
                file.seek(data_begin + data_bytes * sample // _SAMPLES_PER_FILE)
                digest.update(file.read(_SAMPLE_BYTES))
    except FileNotFoundError:
        raise ModelLoadError(f"shard {path} is missing: download the model again") from None
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from error
    return _parse_header(path, header, data_bytes), digest.digest()


def _parse_header(path: Path, header: bytes, data_bytes: int) -> dict[str, TensorEntry]:
    try:
        raw = json.loads(header)
        entries = {
            name: (
                str(entry["dtype"]),
                tuple(int(size) for size in entry["shape"]),
                int(entry["data_offsets"][0]),
                int(entry["data_offsets"][1]),
            )
            for name, entry in raw.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelLoadError(f"{path} has a broken safetensors header: {error!r}") from error
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if end > data_bytes:
            raise ModelLoadError(
                f"{path} is truncated: tensor {name} ends at byte {end} of its data, "
                f"the file has {data_bytes}: download it again"
            )
        count = 1
        for extent in shape:
            count *= extent
        if dtype in _DTYPE_BYTES and end - begin != count * _DTYPE_BYTES[dtype]:
            raise ModelLoadError(f"{path} has a broken safetensors header: size of tensor {name}")
        tensors[name] = TensorEntry(path, dtype, shape)
    return tensors


def _check_index(
    index_path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    for name, shard in weight_map.items():
        entry = tensors.get(name)
        if entry is None or entry.file.name != shard:
            where = "no shard has it" if entry is None else f"it is in {entry.file.name}"
            raise ModelLoadError(
                f"{index_path.parent / shard} does not match {index_path.name}: "
                f"the index puts tensor {name} there, but {where}"
            )
