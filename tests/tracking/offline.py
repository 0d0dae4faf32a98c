"""Reads what W&B keeps of an offline run: LevelDB's log format with a protobuf Record in each.

The file begins with ``:W&B``, a magic number and a version (7 bytes). Then come blocks of 32 KiB,
each a run of pieces: CRC-32 (4 bytes), length (2), type (1: whole, 2: first, 3: middle, 4: last). A
block ends in zeros where fewer than 7 bytes are left.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["ended_records_of", "records_of", "run_and_artifacts"]

_BLOCK_BYTES = 2**15
_HEAD_BYTES = 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records_of(path: Path) -> list[Any]:
    """Every Record of the file, parsed."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in _messages(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def ended_records_of(path: Path) -> list[Any]:
    """Records of a run that has ended; the service of W&B may still be writing the last."""
    for _ in range(100):
        records = records_of(path)
        if "exit" in [record.WhichOneof("record_type") for record in records]:
            return records
        time.sleep(0.1)
    raise AssertionError("the run has no end")


def run_and_artifacts(records: list[Any]) -> tuple[Any, dict[str, Any]]:
    """The run, and its artifacts by name."""
    run = next(one.run for one in records if one.WhichOneof("record_type") == "run")
    artifacts = [one.artifact for one in records if one.WhichOneof("record_type") == "artifact"]
    return run, {one.name: one for one in artifacts}


def _messages(data: bytes) -> Iterator[bytes]:
    assert b":W&B" == data[:4]
    position, parts = _HEAD_BYTES, b""
    while position + _HEAD_BYTES <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEAD_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += _HEAD_BYTES
        if position + length > len(data):
            return  # Still being written.
        piece = data[position : position + length]
        position += length
        parts = piece if kind in (_WHOLE, _FIRST) else parts + piece
        if kind in (_WHOLE, _LAST):
            yield parts
