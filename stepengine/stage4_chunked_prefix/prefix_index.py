"""Which block holds the K/V of a given beginning: one question, answered by chained hashes or by a tree of tokens.

A block's K/V depend on its tokens and on every token before them. So both answers speak of a block
together with all that came before it, and both compare token ids before they say yes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol
from zlib import crc32

Tokens = tuple[int, ...]


class Entry:
    """A block that can be found: its tokens, the entry that they continue (None: a beginning), who else has them.

    There is one entry for the same tokens after the same beginning, however many blocks hold them:
    `block`, and the `twins` that others computed at the same time. `block` is 0 once it was removed.
    `children` counts the entries that continue this one. `place` is the index's own: where it is kept.
    """

    __slots__ = ("block", "children", "parent", "place", "salt", "tokens", "twins")

    def __init__(self, block: int, parent: "Entry | None", tokens: Tokens, salt: str, place: Any) -> None:
        self.block = block
        self.parent = parent
        self.tokens = tokens
        self.salt = salt
        self.place = place
        self.twins: list[int] | None = None
        self.children = 0
        if parent is not None:
            parent.children += 1


class Key:
    """What a block is looked up by: its tokens, and the key of the block before it (None: the first one).

    A request keeps the keys of its blocks, and each keeps what was made of it: its chained hash, and
    the entry that it led to. So nothing is hashed twice. `salt` names the cache namespace.
    """

    __slots__ = ("digest", "entry", "parent", "salt", "tokens")

    def __init__(self, parent: "Key | None", tokens: Tokens, salt: str = "") -> None:
        self.parent = parent
        self.tokens = tokens
        self.salt: str = salt if parent is None else parent.salt
        self.digest: int | None = None
        self.entry: Entry | None = None


class PrefixIndex(Protocol):
    """Finds entries by key. No entry is ever there without its parent."""

    def find(self, key: Key) -> Entry | None:
        """The entry with exactly these tokens after exactly this beginning, or None."""

    def add(self, key: Key, block: int) -> Entry | None:
        """That entry, or else a new one for `block`; None where its parent is missing or it has no place."""

    def remove(self, entry: Entry) -> None:
        """Forget an entry that no other continues."""


class _Index(ABC):
    """Goes from the nearest beginning whose entry is known and still there: as a rule, the parent's."""

    def find(self, key: Key) -> Entry | None:
        entry, above = key.entry, key.parent
        if entry is not None and entry.block:
            return entry
        unknown: list[Key] = []
        while above is not None and (above.entry is None or not above.entry.block):
            unknown.append(above)
            above = above.parent
        if unknown and any(self._look(step) is None for step in reversed(unknown)):
            return None
        return self._look(key)

    def add(self, key: Key, block: int) -> Entry | None:
        above = self.find(key.parent) if key.parent is not None else None
        if above is None and key.parent is not None:
            return None
        entry = self._look(key)
        if entry is None:
            entry = key.entry = self._put(key, block, above)
        return entry

    @abstractmethod
    def _look(self, key: Key) -> Entry | None:
        """The entry of `key`, whose parent has just been found; sets `key.entry`."""

    @abstractmethod
    def _put(self, key: Key, block: int, above: Entry | None) -> Entry | None:
        """A new entry for a key that was just looked for in vain; None where it has no place."""


class HashPrefixIndex(_Index):
    """One table from chained hash to entry, as in vLLM: a lookup costs one hash of one block's tokens.

    Two beginnings may have the same hash. So tokens are compared, and the parent must be the one that
    was found before: by induction an entry is found only for its own beginning. A beginning whose hash
    is taken has no place. `digest` hashes the pair (hash of what came before, tokens).
    """

    def __init__(self, digest: Callable[[tuple[int, Tokens]], int] = hash) -> None:
        self._digest = digest
        self._table: dict[int, Entry] = {}

    def _look(self, key: Key) -> Entry | None:
        parent, digest = key.parent, key.digest
        if digest is None:
            before = crc32(key.salt.encode()) if parent is None else parent.digest
            assert before is not None  # a parent was looked up first
            digest = key.digest = self._digest((before, key.tokens))
        entry = self._table.get(digest)
        if entry is not None:
            above = parent.entry if parent is not None else None
            if entry.parent is not above or entry.tokens != key.tokens or entry.salt != key.salt:
                entry = None
        key.entry = entry
        return entry

    def _put(self, key: Key, block: int, above: Entry | None) -> Entry | None:
        assert key.digest is not None  # looking made it
        if key.digest in self._table:
            return None
        entry = self._table[key.digest] = Entry(block, above, key.tokens, key.salt, key.digest)
        return entry

    def remove(self, entry: Entry) -> None:
        del self._table[entry.place]
        entry.block = 0
        if entry.parent is not None:
            entry.parent.children -= 1


class RadixPrefixIndex(_Index):
    """A radix tree over tokens, as in SGLang: an entry knows by their tokens the entries that continue it.

    An edge is one block of tokens, for that is what can be shared and evicted. So nothing is hashed but
    the block's own tokens, and no two beginnings can collide. (SGLang joins edges that do not branch.)
    """

    def __init__(self) -> None:
        self._first: dict[str, dict[Tokens, Entry]] = {}  # by salt

    def _look(self, key: Key) -> Entry | None:
        parent = key.parent
        edges = self._first.get(key.salt) if parent is None else parent.entry.place  # type: ignore[union-attr]
        entry: Entry | None = edges.get(key.tokens) if edges else None
        key.entry = entry
        return entry

    def _put(self, key: Key, block: int, above: Entry | None) -> Entry | None:
        entry = Entry(block, above, key.tokens, key.salt, None)
        if above is None:
            self._first.setdefault(key.salt, {})[key.tokens] = entry
        else:
            above.place = above.place or {}
            above.place[key.tokens] = entry
        return entry

    def remove(self, entry: Entry) -> None:
        entry.block = 0
        if entry.parent is not None:
            entry.parent.children -= 1
            del entry.parent.place[entry.tokens]
            return
        del self._first[entry.salt][entry.tokens]
        if not self._first[entry.salt]:
            del self._first[entry.salt]
