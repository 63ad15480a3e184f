"""Finished groups by id: the smallest leaves first, at a cost that does not grow with their number.

A heap compares log n ids at every pop. Ids are whole numbers, so bits say which are there: a word
of 1024 bits for every 1024 ids, one for every 1024 words, and so on, as in the trees of van Emde
Boas, of fixed depth. The lowest bit of a word is found at once.
"""

from rollout.types import Group

_BITS = 10
"""2^10 bits a word."""
_LOW = (1 << _BITS) - 1
_LEVELS = 4
_NUM_IDS = 1 << _BITS * _LEVELS


class ReadyGroups:
    """A priority queue of groups; push and pop are O(1)."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}
        # Level 0 has bits of ids, level k those of the words of level k - 1; words are not empty.
        self._levels: list[dict[int, int]] = [{} for _ in range(_LEVELS)]

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, group_id: int) -> bool:
        return group_id in self._groups

    def ids(self) -> list[int]:
        """Of all, in no order."""
        return list(self._groups)

    def groups(self) -> list[Group]:
        """All, by id; they stay."""
        return [self._groups[group_id] for group_id in sorted(self._groups)]

    def push(self, group: Group) -> None:
        """ValueError: the id is there already, or out of range."""
        place = group.group_id
        if not 0 <= place < _NUM_IDS:
            raise ValueError(f"group {place}: ids are from 0 to {_NUM_IDS - 1}")
        if place in self._groups:
            raise ValueError(f"group {place} is there already")
        self._groups[place] = group
        for words in self._levels:
            word, bit = place >> _BITS, 1 << (place & _LOW)
            bits = words.get(word, 0)
            words[word] = bits | bit
            if bits:  # the levels above know of this word
                return
            place = word

    def pop(self) -> Group:
        """The group of the smallest id, which leaves; KeyError: there is none."""
        place = 0
        for words in reversed(self._levels):
            bits = words[place]
            place = place << _BITS | (bits & -bits).bit_length() - 1
        group = self._groups.pop(place)
        for words in self._levels:
            word = place >> _BITS
            bits = words[word]
            words[word] = bits = bits & (bits - 1)
            if bits:
                break
            del words[word]
            place = word
        return group
