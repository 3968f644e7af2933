"""Named arrays as one Flower record, and back without a copy."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import DTypeLike, NDArray

from strategies.adapters import Arrays

_PACKED = "bouquet-arrays"
_LENGTH_BYTES = 8
_ALIGNMENT = 16
"""Arrays begin at a multiple of so many bytes, as the memory of a Python ``bytes`` does: they are read in place."""


def to_record(arrays: Arrays) -> ArrayRecord:
    """Named arrays as Flower carries them: in one piece, since each piece costs several requests on its way.

    The piece is the length of the layout (8 bytes, big-endian), the layout (JSON: name, dtype and shape of each array,
    then spaces up to ``_ALIGNMENT``) and the arrays' values, little-endian.
    """
    if not arrays:
        return ArrayRecord()
    layout = json.dumps([(name, array.dtype.name, array.shape) for name, array in arrays.items()]).encode()
    layout += b" " * (-(_LENGTH_BYTES + len(layout)) % _ALIGNMENT)
    values = (np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data for array in arrays.values())
    content = b"".join([len(layout).to_bytes(_LENGTH_BYTES, "big"), layout, *values])
    return ArrayRecord({_PACKED: Array(dtype="uint8", shape=(len(content),), stype=_PACKED, data=content)})


def to_arrays(record: ArrayRecord, dtype: DTypeLike = np.float32) -> dict[str, NDArray[Any]]:
    """Named arrays out of a Flower record: read-only views of its bytes.

    Raises:
        ValueError: If the record is no such piece, or an array is not of ``dtype``: a float64 that no float32 can hold
            would become infinite later.
        LookupError: If the record is another app's.
    """
    if not record:
        return {}
    content, expected = record[_PACKED].data, np.dtype(dtype).newbyteorder("<")
    expected_name = expected.name  # put together at every look
    offset = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "big")
    arrays = {}
    for name, declared, shape in json.loads(content[_LENGTH_BYTES:offset]):
        if declared != expected_name:
            raise ValueError(f"{name} must be {expected_name}, got {declared}")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ValueError(f"{name} has the shape {shape}")
        count = math.prod(shape)
        if count * expected.itemsize > len(content) - offset:
            raise ValueError(f"{name} has the shape {shape}, but the record ends before it does")
        arrays[str(name)] = np.frombuffer(content, expected, count, offset).reshape(shape)
        offset += count * expected.itemsize
    if offset != len(content):
        raise ValueError(f"{len(content) - offset} bytes of a record belong to no array")
    return arrays
