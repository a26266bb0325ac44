"""LIBSVM text: `label index:value index:value ...`, labels 0/1 or -1/+1, optionally `qid:n` after the label; `#` starts a comment.

Columns: `label`, `qid` (int64, null where absent), `index` (list of the indices whose value is not 0, in line order), and for every
column `f<index>` that is asked for the value at that index, 0 where absent. An index that is asked for as `f<index>` does not appear in
`index`, and the others must have value 1, since a bag of ids carries no weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ninerank.errors import DataError
from ninerank.features.files import reading

__all__ = ["LibsvmLog"]

LINES_PER_READ = 1 << 15


@dataclass(frozen=True)
class LibsvmLog:
    """A LIBSVM file. numbers: indices that are read as columns `f<index>`."""

    path: Path
    numbers: tuple[int, ...] = ()
    block_rows = (None,)

    @cached_property
    def names(self) -> list[str]:
        return ["label", "qid", "index", *(f"f{index}" for index in self.numbers)]

    def read(self, block: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        row = 0
        with reading(self.path, "LIBSVM text"), pa.input_stream(str(self.path), compression="detect") as stream:
            rest = b""
            while True:
                data = stream.read(1 << 20)
                lines = (rest + data).split(b"\n")
                rest = lines.pop() if data else b""
                kept = [line.split(b"#", 1)[0].strip() for line in lines]
                kept = [line for line in kept if line]
                if kept:
                    batch = self._parse(kept, row)
                    yield batch if columns is None else batch.select(list(columns))
                    row += len(kept)
                if not data:
                    return

    def _parse(self, lines: list[bytes], first_row: int) -> pa.RecordBatch:
        try:
            text = pa.array(lines, pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            raise DataError(f"{self.path}: rows {first_row} .. {first_row + len(lines) - 1} are not UTF-8 text") from None
        tokens = pc.utf8_split_whitespace(text)
        flat, parents = tokens.flatten(), pc.list_parent_indices(tokens).to_numpy()
        starts = tokens.offsets.to_numpy()[:-1] - tokens.offsets[0].as_py()
        is_label = np.zeros(len(flat), bool)
        is_label[starts] = True
        labels = self._cast(flat.filter(pa.array(is_label)), pa.float64(), parents[is_label], first_row, "a label")
        label = labels.to_numpy()
        pairs, rows = flat.filter(pa.array(~is_label)), parents[~is_label]
        parts = pc.split_pattern(pairs, ":", max_splits=1)
        whole = pc.equal(pc.list_value_length(parts), 2)
        if not pc.all(whole, min_count=0).as_py():
            bad = pc.index(whole, False).as_py()
            raise DataError(f"{self.path}: row {first_row + rows[bad]}: {pairs[bad].as_py()!r} is not index:value")
        keys, values = pc.list_element(parts, 0), pc.list_element(parts, 1)
        is_qid = pc.equal(keys, "qid").to_numpy(zero_copy_only=False)
        qid = np.full(len(lines), -1, np.int64)
        qid[rows[is_qid]] = self._cast(values.filter(pa.array(is_qid)), pa.int64(), rows[is_qid], first_row, "a qid").to_numpy()
        rows = rows[~is_qid]
        index = self._cast(keys.filter(pa.array(~is_qid)), pa.int64(), rows, first_row, "an index").to_numpy()
        value = self._cast(values.filter(pa.array(~is_qid)), pa.float64(), rows, first_row, "a value").to_numpy()
        columns = {
            "label": pa.array(np.where(label == -1, 0.0, label)),
            "qid": pa.array(qid, mask=qid < 0),
            "index": self._bags(rows, index, value, len(lines), first_row),
        }
        for number in self.numbers:
            column = np.zeros(len(lines))
            column[rows[index == number]] = value[index == number]
            columns[f"f{number}"] = pa.array(column)
        return pa.record_batch(columns)

    def _bags(self, rows, index, value, count: int, first_row: int) -> pa.ListArray:  # type: ignore[no-untyped-def]
        bag = ~np.isin(index, self.numbers) & (value != 0)
        weighted = np.flatnonzero(bag & (value != 1))
        if len(weighted):
            i = weighted[0]
            raise DataError(
                f"{self.path}: row {first_row + rows[i]}: {index[i]}:{value[i]:g} has a weight; an id in `index` has value 0 or 1, "
                f"a number needs a numeric feature that reads column 'f{index[i]}'"
            )
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[bag], minlength=count))])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(index[bag]))

    def _cast(self, text: pa.Array, wanted: pa.DataType, rows, first_row: int, what: str) -> pa.Array:  # type: ignore[no-untyped-def]
        stripped = pc.utf8_ltrim(text, "+")
        try:
            return stripped.cast(wanted)
        except pa.ArrowInvalid:
            for i, value in enumerate(stripped):
                try:
                    value.cast(wanted)
                except pa.ArrowInvalid:
                    raise DataError(f"{self.path}: row {first_row + rows[i]}: {text[i].as_py()!r} is not {what}") from None
            raise
