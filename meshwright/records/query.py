"""Which Records are wanted, and what a store holds of each sort."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from meshwright.records.layout import Group
from meshwright.records.record import Machine

__all__ = ["Query", "machine_words"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Conditions that must all hold; those that are None always do."""

    kind: str | None = None
    name: str | None = None
    device: str | None = None
    dtype: str | None = None
    """``extra``'s ``dtype``, or its ``precision`` where the kind has that."""
    machine: str | None = None
    """Part of the machine's processor, accelerators, system or driver; upper case is lower case."""

    @property
    def is_open(self) -> bool:
        """Whether every Record is wanted."""
        return self == Query()

    def accepts(self, group: Group) -> bool:
        """Whether Records of this kind, name, device, dtype and machine are wanted."""
        wanted = (self.kind, self.name, self.device, self.dtype)
        if any(want is not None and want != has for want, has in zip(wanted, group, strict=False)):
            return False
        return self.machine is None or self.machine.casefold() in machine_words(group[4]).casefold()


def machine_words(text: str) -> str:
    """What names a machine in the JSON text of one: processor, accelerators, system, driver.

    The text itself where it is damaged: nothing that may be wanted is passed over.
    """
    try:
        machine = msgspec.json.decode(text, type=Machine)
    except msgspec.MsgspecError:
        return text
    words = (machine.processor, *machine.accelerators, machine.system, machine.driver)
    return ", ".join(word for word in words if word)
