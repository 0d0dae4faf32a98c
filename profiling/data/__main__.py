"""``python -m meshwright.profiling.data STORE...``: puts Records into the package, with the card.

The Records of the stores are added to those that are there (the same one is kept once), joined into
one file, and the card is written anew. ``--fresh`` begins with none; no STORE only writes the card.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from meshwright.profiling.data import CARD_PATH, packaged_records
from meshwright.profiling.data.card import card
from meshwright.records import RecordStore
from meshwright.strict_json import write_text_atomically

__all__ = ["main", "pack"]

_MAX_FILE_BYTES = 10 * 10**6


def pack(stores: Sequence[Path], folder: Path, *, fresh: bool = False) -> None:
    """Put the Records of ``stores`` into ``folder`` as one file.

    Raises:
        BadRequest: a store cannot be read.
    """
    if fresh:
        for path in folder.glob("*.parquet"):
            path.unlink()
    kept = RecordStore(folder)
    for store in stores:
        kept.merge(RecordStore(store))
    kept.compact()
    for path in folder.glob("*.parquet"):
        size_bytes = path.stat().st_size
        assert size_bytes < _MAX_FILE_BYTES, f"{path.name} has {size_bytes} bytes"
    for name in ("store.lock", "index.json"):
        (folder / name).unlink(missing_ok=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stores", nargs="*", type=Path)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    pack(options.stores, CARD_PATH.parent, fresh=options.fresh)
    write_text_atomically(card(packaged_records()), CARD_PATH)


if __name__ == "__main__":
    main()
