"""Names of what lies in Redis.

    ninerank:item:ID             the packed value of an item        ninerank:item:{17}:ID   the same in a cluster: 17 names the tag
    ninerank:item!loaded         mark of the loader, beside them    ninerank:item:{17}!loaded
    ninerank:item!about          what was loaded, as JSON           ninerank:item!changes   stream of ids that changed
    ninerank:item!progress       how far a load has come            ninerank:item!updates   stream of rows to be written

Redis lays keys of a cluster by what stands in braces: all keys of a tag are one node's, and one MGET may ask for them.
"""

import zlib

from ninerank.predictor.cache.endpoint import RedisEndpoint

__all__ = ["KINDS", "NUM_SLOTS", "Keys", "slot_of"]

KINDS = ("item", "user")
NUM_SLOTS = 16_384


class Keys:
    """Names for one kind of entity at one endpoint."""

    def __init__(self, endpoint: RedisEndpoint, kind: str) -> None:
        base = f"{endpoint.prefix}:{kind}".encode()
        self.num_tags = endpoint.tags if endpoint.kind == "cluster" else 1
        names = _tag_names(self.num_tags) if endpoint.kind == "cluster" else []
        tags = [b"{%s}" % name for name in names]
        self._starts = [base + b":" + tag + b":" for tag in tags] or [base + b":"]
        self._marks = [base + b":" + tag + b"!loaded" for tag in tags] or [base + b"!loaded"]
        self._mark_of = dict(zip(self._starts, self._marks, strict=True))
        self.slots = [slot_of(name) for name in names] or [0]
        self.about, self.progress = base + b"!about", base + b"!progress"
        self.changes, self.updates = base + b"!changes", base + b"!updates"

    def tag(self, key: bytes) -> int:
        """The part of the keys that an id belongs to."""
        return zlib.crc32(key) % self.num_tags if self.num_tags > 1 else 0

    def of(self, key: bytes) -> bytes:
        """Name of an id's value."""
        return self._starts[self.tag(key)] + key

    def mark(self, tag: int) -> bytes:
        """Name of the loader's mark of a tag."""
        return self._marks[tag]

    def marks(self) -> list[bytes]:
        """Names of all marks."""
        return self._marks

    def mark_beside(self, name: bytes) -> bytes:
        """The mark on the node of the value `name`."""
        if self.num_tags == 1:
            return self._marks[0]
        return self._mark_of[name[: name.index(b"}") + 2]]


def _tag_names(count: int) -> list[bytes]:
    """The smallest number for each of `count` equal ranges of slots: whichever nodes share the slots, they share the tags alike."""
    names: dict[int, bytes] = {}
    number = 0
    while len(names) < count:
        name = b"%d" % number
        names.setdefault(slot_of(name) * count // NUM_SLOTS, name)
        number += 1
    return [names[part] for part in range(count)]


def slot_of(tag: bytes) -> int:
    """Slot of a key whose part in braces is `tag`: CRC-16/XMODEM mod 16384, as the specification of Redis Cluster has it.

    >>> slot_of(b"foo"), slot_of(b"123456789")
    (12182, 12739)
    """
    crc = 0
    for byte in tag:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x1021 if crc & 0x8000 else crc << 1
        crc &= 0xFFFF
    return crc % NUM_SLOTS
