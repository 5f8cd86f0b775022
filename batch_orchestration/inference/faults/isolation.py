"""Finds the requests that kill the engine: suspects are tested in groups, apart from the rest.

The requests in flight when the engine died are suspects. They are split into halves, and each half
is tested alone. A half that kills the engine is split again, until a single request kills it alone.
If it was present at few deaths so far, it must do so twice: the cause may lie outside.

With k guilty requests in a window of w, the engine dies at most k·(ceil(log2 w) + 1) + 1 times:
once in the window, at most once per guilty request and halving, and once more for each to confirm.
"""

import math
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Suspect = TypeVar("Suspect", bound=Hashable)


#: In a label, separates the name of a death from the halvings since.
LABEL_END = "-"
#: From this many halvings on no confirmation is needed: an outside cause does not kill the engine
#: so often just when the same suspect is tested. If each of many separate deaths needed a
#: confirmation, the bound above would not hold.
CERTAIN_HALVINGS = 4
#: The same for deaths by memory exhaustion, which a kill from outside does not report.
CERTAIN_HALVINGS_OF_MEMORY = 3
#: The most extra confirmations of a suspect because of deaths without a culprit.
MOST_CONFIRMATIONS = 3
#: Marks labels of suspects that killed the engine alone.
_CONFIRMATION = "!"


def to_confirm(label: str) -> str:
    """Return the label for another test of a suspect that stood alone under this label."""
    return f"{label}{_CONFIRMATION}"


def is_confirmation(label: str, *, exhausted: bool = False, unexplained: int = 0) -> bool:
    """Whether the suspects under this label have killed the engine alone, or often, before.

    Args:
        exhausted: Whether the engine's latest death was by memory exhaustion.
        unexplained: How many groups killed the engine and had no culprit. An engine that dies by
            chance convicts a request only if it dies with the same request again and again.
    """
    halvings = label.partition(LABEL_END)[2].partition(_CONFIRMATION)[0]
    certain = CERTAIN_HALVINGS_OF_MEMORY if exhausted else CERTAIN_HALVINGS
    once_more = len(halvings) < certain
    return label.count(_CONFIRMATION) >= once_more + min(unexplained, MOST_CONFIRMATIONS)


def most_deaths(window: int) -> int:
    """Return the most deaths that a search in a window takes to convict one request."""
    return math.ceil(math.log2(max(window, 1))) + 2


class Isolation(Generic[Suspect]):
    """Groups of suspects that await their test, each with a label that outlives the process."""

    def __init__(self) -> None:
        self._groups: dict[str, list[Suspect]] = {}
        self._order: deque[str] = deque()
        #: Groups that killed the engine in this process; the culprits; groups without a culprit.
        self._split: set[str] = set()
        self._culprits: list[str] = []
        self._unexplained = 0

    def __bool__(self) -> bool:
        return bool(self._order)

    def __len__(self) -> int:
        """Return how many suspects wait."""
        return sum(len(group) for group in self._groups.values())

    def add(self, label: str, suspect: Suspect) -> None:
        """Put a suspect into the group of this label; groups are tested in order of appearance."""
        if label not in self._groups:
            self._groups[label] = []
            self._order.append(label)
        self._groups[label].append(suspect)

    def next_group(self) -> tuple[str, list[Suspect]]:
        """Take the next group to test, with its label.

        Raises:
            IndexError: No group waits.
        """
        label = self._order.popleft()
        return label, self._groups.pop(label)

    def is_certain(self, label: str, *, exhausted: bool = False) -> bool:
        """Whether one more death with a single suspect under this label convicts it.

        See `is_confirmation`.
        """
        return is_confirmation(label, exhausted=exhausted, unexplained=self._unexplained)

    def note_culprit(self, label: str) -> None:
        """Record that the suspect tested under this label is guilty."""
        self._culprits.append(label)

    def note_answered(self, label: str) -> None:
        """Record that all of a group were answered: both halves of its parent may now be innocent.

        In that case no request caused the death of the engine that had the parent group.
        """
        whole = label[:-1]
        known = [*self._culprits, *self._groups]
        if whole in self._split and not any(other.startswith(whole) for other in known):
            self._split.remove(whole)
            self._unexplained += 1

    @property
    def may_convict(self) -> bool:
        """Whether a death in the next test would convict: a suspect alone, and certain."""
        if not self._order:
            return False
        label = self._order[0]
        return len(self._groups[label]) == 1 and self.is_certain(label)

    def split(self, label: str, suspects: Sequence[Suspect]) -> dict[Suspect, str]:
        """Queue the two halves of a group that killed the engine; return each suspect's label.

        The halves go before all waiting groups, so that a search is finished once begun. A half may
        exist already, with members from an earlier process.
        """
        self._split.add(label)
        middle = (len(suspects) + 1) // 2
        halves = {f"{label}0": suspects[:middle], f"{label}1": suspects[middle:]}
        labels: dict[Suspect, str] = {}
        for half, members in reversed(halves.items()):
            if members:
                if half in self._groups:
                    self._order.remove(half)
                self._groups.setdefault(half, []).extend(members)
                self._order.appendleft(half)
                labels |= dict.fromkeys(members, half)
        return labels
