"""Finding the requests that kill the engine: suspects are tested in groups, apart from the rest.

What was in flight when the engine died is suspect. It is split in halves, and each half is tested
alone; a half that kills the engine is split again, until a request stands alone and kills it. If it
was there at few deaths so far, it must do so twice: somebody else may have killed the engine.

With k guilty requests in a window of w, the engine dies once in the window, then at most once per
guilty request and halving, and once more for each to be sure: the promised
k·(ceil(log2 w) + 1) + 1 times.
"""

import math
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Suspect = TypeVar("Suspect", bound=Hashable)


#: Between what names a death in a label and the halvings since.
LABEL_END = "-"
#: Nobody from outside kills the engine so often just when the same suspect is tested; and with a
#: confirmation for each of many deaths far apart the promise would not hold.
CERTAIN_HALVINGS = 4
#: The same where the engine tells of exhausted memory: a kill from outside says no such thing.
CERTAIN_HALVINGS_OF_MEMORY = 3
#: Of a suspect, because of deaths without a culprit.
MOST_CONFIRMATIONS = 3
#: In labels of suspects that killed the engine when they stood alone.
_CONFIRMATION = "!"


def to_confirm(label: str) -> str:
    """Return the label for the test of a suspect that stood alone under this one."""
    return f"{label}{_CONFIRMATION}"


def is_confirmation(label: str, *, exhausted: bool = False, unexplained: int = 0) -> bool:
    """Whether what is tested under this label has killed the engine alone, or often, before.

    Args:
        exhausted: Whether the engine told of exhausted memory at last.
        unexplained: How many groups killed the engine and had no culprit: one that dies by chance
            is believed only if it does so again and again with the same request.
    """
    halvings = label.partition(LABEL_END)[2].partition(_CONFIRMATION)[0]
    certain = CERTAIN_HALVINGS_OF_MEMORY if exhausted else CERTAIN_HALVINGS
    once_more = len(halvings) < certain
    return label.count(_CONFIRMATION) >= once_more + min(unexplained, MOST_CONFIRMATIONS)


def most_deaths(window: int) -> int:
    """Return how often a search in a window makes the engine die, to convict one request."""
    return math.ceil(math.log2(max(window, 1))) + 2


class Isolation(Generic[Suspect]):
    """Groups of suspects that wait for their test, each with a label that outlives the process."""

    def __init__(self) -> None:
        self._groups: dict[str, list[Suspect]] = {}
        self._order: deque[str] = deque()
        #: Groups that killed the engine here; the guilty; and how many groups had none.
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
            IndexError: None waits.
        """
        label = self._order.popleft()
        return label, self._groups.pop(label)

    def is_certain(self, label: str, *, exhausted: bool = False) -> bool:
        """Whether the engine's death with a suspect alone under this label is enough.

        See `is_confirmation`.
        """
        return is_confirmation(label, exhausted=exhausted, unexplained=self._unexplained)

    def note_culprit(self, label: str) -> None:
        """Take note that the suspect who was tested under this label is guilty."""
        self._culprits.append(label)

    def note_answered(self, label: str) -> None:
        """Take note that all of a group were answered: both halves of it may be innocent now.

        Then it was no request that killed the engine when it had the whole.
        """
        whole = label[:-1]
        known = [*self._culprits, *self._groups]
        if whole in self._split and not any(other.startswith(whole) for other in known):
            self._split.remove(whole)
            self._unexplained += 1

    @property
    def may_convict(self) -> bool:
        """Whether the next test is one whose death convicts: of a suspect alone, to be sure."""
        if not self._order:
            return False
        label = self._order[0]
        return len(self._groups[label]) == 1 and self.is_certain(label)

    def split(self, label: str, suspects: Sequence[Suspect]) -> dict[Suspect, str]:
        """Queue the two halves of a group that killed the engine; return each suspect's label.

        The halves come next, before groups that wait: a search once begun is ended. A half may
        be there already, with members that an earlier process put into it.
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
