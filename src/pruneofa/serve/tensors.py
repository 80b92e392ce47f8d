"""Tensors of the Open Inference Protocol: as lists in JSON, or as bytes behind it."""

import math
import struct
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pruneofa.serve.bodies import Body, Many
from pruneofa.serve.refusal import invalid

TYPES = {
    "BOOL": "?",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP32": "<f4",
}
_MOST = 10_000_000  # elements of a tensor; its shape is only a claim
_DIMENSIONS = 8


class Tensor(Body):
    """A tensor; without `data` it is among the bytes behind the JSON, `binary_data_size` of them."""

    name: str
    shape: Many[Annotated[int, Field(ge=0, le=_MOST)]] = Field(max_length=_DIMENSIONS)
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


def shapes(tensors: list[Tensor]) -> dict[str, list[int]]:
    """The shape that the request gives for each tensor, by name. Raises Refused for one that no tensor can have."""
    found: dict[str, list[int]] = {}
    for tensor in tensors:
        if tensor.name in found:
            raise invalid(f"the input {tensor.name} is given twice")
        if math.prod(size or 1 for size in tensor.shape) > _MOST:  # NumPy has no shape of that size, empty or not
            raise invalid(f"{tensor.name}: shape is {tensor.shape}, wanted at most {_MOST} elements")
        found[tensor.name] = tensor.shape
    return found


def read(tensors: list[Tensor], binary: bytes) -> dict[str, NDArray[Any]]:
    """Arrays by name, in shapes that `shapes` has checked; texts as objects.

    Raises Refused for tensors that are not what they say.
    """
    found: dict[str, NDArray[Any]] = {}
    at = 0
    for tensor in tensors:
        count = math.prod(tensor.shape)
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is not None and tensor.data is not None:
            raise invalid(f"{tensor.name}: has data and binary_data_size, wanted one of them")
        if size is None:
            values: Any = _from_json(tensor)
        else:
            if type(size) is not int or not 0 <= size <= len(binary) - at:
                raise invalid(f"{tensor.name}: binary_data_size does not fit the body")
            values = _from_bytes(tensor, binary[at : at + size])
            at += size
        if len(values) != count:
            raise invalid(f"{tensor.name}: has {len(values)} elements, but the shape {tensor.shape}")
        found[tensor.name] = values.reshape(tensor.shape)
    if at < len(binary):
        raise invalid(f"{len(binary) - at} bytes behind the JSON are of no input; give their binary_data_size")
    return found


def _from_json(tensor: Tensor) -> NDArray[Any]:
    flat = _flat(tensor)
    if tensor.datatype == "BYTES":
        if not all(isinstance(value, str) for value in flat):
            raise invalid(f"{tensor.name}: wanted strings")
        return _texts(flat)
    dtype = _dtype(tensor)
    kinds = {"f": (int, float), "b": (bool,)}.get(dtype.kind, (int,))
    if not all(type(value) in kinds for value in flat):
        raise invalid(f"{tensor.name}: wanted values of type {tensor.datatype}")
    try:
        return np.array(flat, dtype)
    except (OverflowError, ValueError):
        raise invalid(f"{tensor.name}: a number is out of the range of {tensor.datatype}") from None


def _flat(tensor: Tensor) -> list[Any]:
    """The elements row by row. Raises Refused for data that is nested, but not in the tensor's shape."""
    rows: list[Any] = [tensor.data or []]
    count = math.prod(tensor.shape)
    if len(rows[0]) > count:  # nothing is looked at that the shape has no place for
        raise invalid(f"{tensor.name}: {len(rows[0])} values, but the shape {tensor.shape} has {count}")
    if not any(isinstance(value, list) for value in rows[0]):
        return rows[0]
    for size in tensor.shape:
        if not all(isinstance(row, list) and len(row) == size for row in rows):
            raise invalid(f"{tensor.name}: data is neither flat nor nested in the shape {tensor.shape}")
        rows = [value for row in rows for value in row]
    return rows


def _from_bytes(tensor: Tensor, content: bytes) -> NDArray[Any]:
    if tensor.datatype != "BYTES":
        dtype = _dtype(tensor)
        if len(content) % dtype.itemsize:
            raise invalid(f"{tensor.name}: {len(content)} bytes are no {tensor.datatype} numbers")
        values = np.frombuffer(content, dtype)
        return values.view(np.uint8) != 0 if dtype.kind == "b" else values  # any other byte is true too
    texts = []
    at = 0
    while at < len(content):
        begin = at + 4
        end = begin + struct.unpack("<I", content[at:begin])[0] if begin <= len(content) else begin
        if end > len(content):
            raise invalid(f"{tensor.name}: its last element is cut off")
        try:
            texts.append(content[begin:end].decode())
        except UnicodeDecodeError:
            raise invalid(f"{tensor.name}: element {len(texts)} is not UTF-8") from None
        at = end
    return _texts(texts)


def _texts(values: list[str]) -> NDArray[Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _dtype(tensor: Tensor) -> "np.dtype[Any]":
    if tensor.datatype not in TYPES:
        raise invalid(f"{tensor.name}: datatype is not one of BYTES, {', '.join(TYPES)}")
    return np.dtype(TYPES[tensor.datatype])


def datatype(array: NDArray[Any]) -> str:
    """The protocol's name for the type of an array."""
    return "BYTES" if array.dtype == object else next(name for name, type_ in TYPES.items() if array.dtype == type_)


def to_bytes(array: NDArray[Any]) -> bytes:
    """The elements, row by row: numbers little-endian, texts each behind its length."""
    if array.dtype != object:
        return array.astype(array.dtype.newbyteorder("<")).tobytes()
    encoded = [text.encode() for text in array.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)
