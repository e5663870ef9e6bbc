"""The Open Inference Protocol v2: requests and answers as bytes, JSON or binary. Pure.

Sources: the protocol's REST specification, and Triton's extensions for binary tensor data,
classification and schedule policy.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from maestro_core.artifact import Tensor
from server.answers import top_classes
from server.errors import BadRequestError, InvalidError
from server.inputs import MAX_DIMENSIONS, json_object, numbers, shaped
from server.schemas import MAX_LATENCY_MS

Floats = NDArray[np.float32]

JSON_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "statistics")
_DTYPES = {
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_NOT_IN_JSON = ("FP16",)
# Those of a request that are ours. Others are the protocol's, or its clients': not ours to check.
PARAMETERS = ("max_latency_ms", "min_accuracy", "on_miss", "point", "priority")
_MAX_TIMEOUT_US = 2**63


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an inference asks, and how the output is to be written."""

    id: str
    x: Floats  # (n, …)
    parameters: dict[str, Any]  # ours
    timeout_ms: float | None
    is_binary: bool
    classes: int  # 0: the output itself; else the k most likely classes


def read(body: bytes, json_length: str | None, tensor: Tensor, output: Tensor) -> Wanted:
    """Return what a request asks.

    `json_length` is the header JSON_LENGTH: how much of the body is JSON, the rest being tensors.

    Raises:
        BadRequestError: the body is not what its headers or its JSON say.
        InvalidError: the input or a parameter is not what the model takes.
    """
    text, binary = _split(body, json_length)
    if json_length is not None and not text:
        return Wanted("", _raw(binary, tensor), {}, None, is_binary=True, classes=0)
    request = json_object(text)
    given = _mapping(request, "parameters")
    check_names(given)
    x = _input(request, binary, tensor)
    is_binary, classes = _output(request, given, output)
    return Wanted(
        id=_text(request, "id"),
        x=x,
        parameters=_ours(given),
        timeout_ms=_timeout_ms(given),
        is_binary=is_binary,
        classes=classes,
    )


def check_names(names: Iterable[str]) -> None:
    """Refuse a parameter that the protocol has another way for.

    Raises:
        InvalidError: there is one.
    """
    if "top_k" in names:
        raise InvalidError("top_k: is of /infer; here the output takes `classification`")


def write(
    wanted: Wanted,
    model: str,
    version: str,
    tensor: Tensor,
    result: Floats,
    facts: dict[str, Any],
    labels: tuple[str, ...] | None,
) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of the answer; `facts` become its parameters."""
    entry: dict[str, Any] = {"name": tensor.name}
    data: bytes | None = None
    if wanted.classes:
        texts = [
            f"{c['score']}:{c['index']}" + (f":{c['label']}" if labels else "")
            for row in top_classes(labels, result, wanted.classes)
            for c in row
        ]
        entry |= {"datatype": "BYTES", "shape": [len(result), len(texts) // len(result)]}
        if wanted.is_binary:
            data = b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)
        else:
            entry["data"] = texts
    else:
        entry |= {"datatype": "FP32", "shape": list(result.shape)}
        if wanted.is_binary:
            data = np.ascontiguousarray(result, "<f4").tobytes()
        else:
            entry["data"] = np.ascontiguousarray(result).reshape(-1)
    if data is not None:
        entry["parameters"] = {"binary_data_size": len(data)}
    answer = {
        "model_name": model,
        "model_version": version,
        **({"id": wanted.id} if wanted.id else {}),
        "parameters": facts,
        "outputs": [entry],
    }
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if data is None:
        return text, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", JSON_LENGTH: str(len(text))}
    return text + data, headers


def _split(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    if json_length is None:
        return body, b""
    if not (json_length.isascii() and json_length.isdigit() and len(json_length) < 20):
        raise BadRequestError(f"{JSON_LENGTH}: '{json_length[:40]}' is not a number of bytes")
    length = int(json_length)
    if length > len(body):
        raise BadRequestError(f"{JSON_LENGTH}: {length}, but the body has {len(body)} bytes")
    return body[:length], body[length:]


def _mapping(holder: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = holder.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidError(f"{name}: must be an object")
    return value


def _text(holder: Mapping[str, Any], name: str) -> str:
    value = holder.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidError(f"{name}: must be a string")
    return value


def _whole(holder: Mapping[str, Any], name: str, largest: int) -> int:
    value = holder.get(name)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= largest:
        raise InvalidError(f"{name}: must be a whole number in 0..{largest}, not {value!r:.40}")
    return value


def _ours(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that are ours. Priority 0 or null says nothing: it is the default."""
    ours = {name: given[name] for name in PARAMETERS if name in given}
    if _whole(given, "priority", 2**32 - 1) == 0:
        ours.pop("priority", None)
    return ours


def _timeout_ms(given: Mapping[str, Any]) -> float | None:
    """Return the protocol's timeout, which is in microseconds; 0 means none."""
    return min(_whole(given, "timeout", _MAX_TIMEOUT_US) / 1e3, MAX_LATENCY_MS) or None


def _only(request: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    entries = request.get(name)
    if entries is None:
        return None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidError(f"{name}: must be a list of objects")
    if len(entries) != 1:
        raise InvalidError(f"{name}: has {len(entries)} entries; this model has one")
    return cast(dict[str, Any], entries[0])


def _input(request: Mapping[str, Any], binary: bytes, tensor: Tensor) -> Floats:
    entry = _only(request, "inputs")
    if entry is None:
        raise InvalidError("inputs: missing")
    if entry.get("name") != tensor.name:
        raise InvalidError(f"inputs: the model's input is '{tensor.name}'")
    datatype, shape = entry.get("datatype"), entry.get("shape")
    if not isinstance(datatype, str) or datatype not in _DTYPES:
        raise InvalidError(f"inputs: datatype must be one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(s) is int and 0 < s < 2**31 for s in shape):
        raise InvalidError("inputs: shape must be a list of whole numbers, each at least 1")
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidError(f"inputs: shape has {len(shape)} dimensions; {MAX_DIMENSIONS} at most")
    size = _mapping(entry, "parameters").get("binary_data_size")
    if size is None:
        if binary:
            raise BadRequestError(
                f"inputs: {len(binary)} bytes follow the JSON, "
                f"but '{tensor.name}' has no binary_data_size"
            )
        return shaped(_from_json(entry, datatype, shape), tensor)
    if type(size) is not int or size != len(binary):
        raise BadRequestError(
            f"inputs: binary_data_size is {size!r:.40}, but {len(binary)} bytes follow the JSON"
        )
    if "data" in entry:
        raise BadRequestError(f"inputs: '{tensor.name}' has both data and binary_data_size")
    return shaped(_from_bytes(binary, datatype, shape), tensor)


def _from_json(entry: Mapping[str, Any], datatype: str, shape: list[int]) -> NDArray[Any]:
    if datatype in _NOT_IN_JSON:
        raise InvalidError(f"inputs: {datatype} has no form in JSON; send it as binary data")
    if "data" not in entry:
        raise InvalidError("inputs: data is missing")
    values = numbers(entry["data"], "inputs: data")
    if values.size != prod(shape):
        raise InvalidError(f"inputs: shape {shape} does not hold {values.size} numbers")
    if np.dtype(_DTYPES[datatype]).kind != "f":
        _check_whole(values, datatype, entry["name"])
    return values.reshape(shape)


def _check_whole(values: NDArray[Any], datatype: str, name: str) -> None:
    """Refuse numbers that a type of whole numbers doesn't hold. 2.0 is whole: JSON has one kind."""
    ends = np.iinfo(_DTYPES[datatype])
    fits = (values >= ends.min) & (values <= ends.max) & (values % 1 == 0)
    if not fits.all():
        raise InvalidError(
            f"inputs: data of '{name}' is {datatype}, whole numbers in {ends.min}..{ends.max}, "
            f"not {values[~fits].item(0)}"
        )


def _from_bytes(binary: bytes, datatype: str, shape: list[int]) -> NDArray[Any]:
    dtype = np.dtype(_DTYPES[datatype])
    if prod(shape) * dtype.itemsize != len(binary):
        raise BadRequestError(
            f"inputs: shape {shape} of {datatype} is {prod(shape) * dtype.itemsize} bytes, "
            f"not {len(binary)}"
        )
    return np.frombuffer(binary, dtype).reshape(shape)


def _raw(binary: bytes, tensor: Tensor) -> Floats:
    """Return a raw binary request: the bytes of one sample, and no JSON."""
    shape = [1, *tensor.shape[1:]]
    return shaped(_from_bytes(binary, "FP32", shape), tensor)


def _output(
    request: Mapping[str, Any], given: Mapping[str, Any], output: Tensor
) -> tuple[bool, int]:
    """Return whether the output is to be binary, and how many classes are asked for."""
    is_binary = given.get("binary_data_output") is True
    entry = _only(request, "outputs") if request.get("outputs") else None
    if entry is None:
        return is_binary, 0
    if entry.get("name") != output.name:
        raise InvalidError(f"outputs: the model's output is '{output.name}'")
    wishes = _mapping(entry, "parameters")
    if "binary_data" in wishes:
        is_binary = wishes["binary_data"] is True
    classes = _whole(wishes, "classification", 1000)
    if classes and len(output.shape) != 2:
        raise InvalidError(
            f"classification: '{output.name}' has shape {list(output.shape)}, and no classes"
        )
    return is_binary, classes
