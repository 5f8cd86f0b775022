"""Deaths of an engine in a row: of some request, or whatever it is asked?"""

#: So many deaths without one answer between them, the last one of a control, are no request's;
#: of an engine that has answered something before, one more: chance may kill it now and then.
HOPELESS_DEATHS = 3
#: After so many a control is asked before anything else.
DOUBTFUL_DEATHS = 2


class DeathCount:
    """Counts deaths between two answers.

    Attributes:
        in_a_row: Deaths since the engine answered anything.
        proven: Whether the engine has answered anything since it was started: only then the
            death of it with one request alone says something about that request.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self.proven = False
        self._patience = DOUBTFUL_DEATHS
        self._has_answered = False

    @property
    def is_doubtful(self) -> bool:
        """Whether the engine may die of whatever it is asked."""
        return self.in_a_row >= self._patience

    @property
    def is_hopeless(self) -> bool:
        """Whether the engine is to be given up, if it died of a control at last."""
        return self.in_a_row >= HOPELESS_DEATHS + self._has_answered

    def note_start(self) -> None:
        """Take note that the engine was started."""
        self.proven = False

    def note_answer(self) -> None:
        """Take note that a request was answered."""
        self.in_a_row, self.proven, self._patience = 0, True, DOUBTFUL_DEATHS
        self._has_answered = True

    def note_control(self, *, within: int) -> None:
        """Take note that a control was answered: the search may go on to its end without another.

        Args:
            within: How many deaths that takes at most.
        """
        self.note_answer()
        self._patience = max(DOUBTFUL_DEATHS, within)

    def note_death(self) -> None:
        """Take note that it died, of something else than want of memory that can be helped."""
        self.in_a_row += 1
