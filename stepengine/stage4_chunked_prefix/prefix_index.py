"""Which block holds the K/V of a given beginning: one question, answered by chained hashes or by a tree of tokens.

A block's K/V depend on its tokens and on every token before them. So both answers speak of a block
together with all that came before it, and both compare token ids before they say yes.
"""

from collections.abc import Callable
from typing import Protocol
from zlib import crc32

Tokens = tuple[int, ...]


class Entry:
    """A block that can be found: its tokens, the entry that they continue (None: a beginning), who else has them.

    There is one entry for the same tokens after the same beginning, however many blocks hold them:
    `block`, and the `twins` that others computed at the same time. `block` is 0 once it was removed.
    `children` counts the entries that continue this one.
    """

    __slots__ = ("block", "children", "parent", "salt", "tokens", "twins")

    def __init__(self, block: int, parent: "Entry | None", tokens: Tokens, salt: str) -> None:
        self.block = block
        self.parent = parent
        self.tokens = tokens
        self.salt = salt
        self.twins: list[int] = []
        self.children = 0


class Key:
    """What a block is looked up by: its tokens, and the key of the block before it (None: the first one).

    A request keeps the keys of its blocks, and each keeps what was made of it: its chained hash, and
    the entry that it led to. So nothing is hashed twice. `salt` names the cache namespace.
    """

    __slots__ = ("digest", "entry", "parent", "salt", "tokens")

    def __init__(self, parent: "Key | None", tokens: Tokens, salt: str = "") -> None:
        self.parent = parent
        self.tokens = tokens
        self.salt = salt if parent is None else parent.salt
        self.digest: int | None = None
        self.entry: Entry | None = None


class PrefixIndex(Protocol):
    """Finds entries by key. What a prefix cache needs to know of one: an entry is never there without its parent."""

    def find(self, key: Key) -> Entry | None:
        """The entry with exactly these tokens after exactly this beginning, or None."""

    def add(self, key: Key, block: int) -> Entry | None:
        """A new entry for `block`, or None (and nothing changed) where its parent is missing or it has no place."""

    def remove(self, entry: Entry) -> None:
        """Forget an entry that no other continues."""


def resolve(key: Key, below: Callable[[Key, Entry | None], Entry | None]) -> Entry | None:
    """The entry of `key`; `below(key, parent)` looks for it among those that continue `parent`.

    Starts at the nearest beginning whose entry is known and still there: as a rule the parent.
    """
    entry = key.entry
    if entry is not None and entry.block:
        return entry
    path = [key]
    while (above := path[-1].parent) is not None and not (above.entry is not None and above.entry.block):
        path.append(above)
    for step in reversed(path):
        step.entry = below(step, step.parent.entry if step.parent is not None else None)
        if step.entry is None:
            return None
    return key.entry


def chained(parent: int, tokens: Tokens) -> int:
    """Hash of a block's tokens and of everything before them."""
    return hash((parent, tokens))


class HashPrefixIndex:
    """One table from chained hash to entry, as in vLLM: a lookup costs one hash of one block's tokens.

    Two beginnings may have the same hash. The tokens are compared and the parent must be the one that
    was found before, so by induction an entry is found only for its own beginning; a beginning whose
    hash is taken has no place.
    """

    def __init__(self, digest: Callable[[int, Tokens], int] = chained) -> None:
        self._digest = digest
        self._table: dict[int, Entry] = {}
        self._digests: dict[Entry, int] = {}

    def find(self, key: Key) -> Entry | None:
        return resolve(key, self._below)

    def _below(self, key: Key, parent: Entry | None) -> Entry | None:
        entry = self._table.get(self._hash(key))
        if entry is None or entry.parent is not parent or entry.tokens != key.tokens or entry.salt != key.salt:
            return None
        return entry

    def _hash(self, key: Key) -> int:
        path = [key]
        while path[-1].digest is None and (above := path[-1].parent) is not None:
            path.append(above)
        for step in reversed(path):
            if step.digest is None:
                before = crc32(step.salt.encode()) if step.parent is None else step.parent.digest
                assert before is not None
                step.digest = self._digest(before, step.tokens)
        assert key.digest is not None
        return key.digest

    def add(self, key: Key, block: int) -> Entry | None:
        parent = self.find(key.parent) if key.parent is not None else None
        digest = self._hash(key)
        if digest in self._table or (key.parent is not None and parent is None):
            return None
        entry = key.entry = self._table[digest] = Entry(block, parent, key.tokens, key.salt)
        self._digests[entry] = digest
        if parent is not None:
            parent.children += 1
        return entry

    def remove(self, entry: Entry) -> None:
        del self._table[self._digests.pop(entry)]
        entry.block = 0
        if entry.parent is not None:
            entry.parent.children -= 1


class RadixPrefixIndex:
    """A radix tree over tokens, as in SGLang: each entry knows the entries that continue it by their tokens.

    An edge is one block of tokens, for that is what can be shared and evicted; so there are no hashes
    of whole beginnings, and none that could collide. (SGLang joins edges that do not branch.)
    """

    def __init__(self) -> None:
        self._first: dict[tuple[str, Tokens], Entry] = {}
        self._next: dict[Entry, dict[Tokens, Entry]] = {}

    def find(self, key: Key) -> Entry | None:
        return resolve(key, self._below)

    def _below(self, key: Key, parent: Entry | None) -> Entry | None:
        if parent is None:
            return self._first.get((key.salt, key.tokens))
        edges = self._next.get(parent)
        return edges.get(key.tokens) if edges is not None else None

    def add(self, key: Key, block: int) -> Entry | None:
        parent = self.find(key.parent) if key.parent is not None else None
        if self._below(key, parent) is not None or (key.parent is not None and parent is None):
            return None
        entry = key.entry = Entry(block, parent, key.tokens, key.salt)
        if parent is None:
            self._first[key.salt, key.tokens] = entry
        else:
            self._next.setdefault(parent, {})[key.tokens] = entry
            parent.children += 1
        return entry

    def remove(self, entry: Entry) -> None:
        parent = entry.parent
        entry.block = 0
        if parent is None:
            del self._first[entry.salt, entry.tokens]
            return
        parent.children -= 1
        del self._next[parent][entry.tokens]
        if not self._next[parent]:
            del self._next[parent]
