from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankRequest(_message.Message):
    __slots__ = ("request_id", "model_name", "model_version", "user", "num_candidates", "candidate_ids", "item_features", "top_k", "timeout_ms", "propensities")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    ITEM_FEATURES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    PROPENSITIES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_name: str
    model_version: str
    user: _containers.RepeatedCompositeFieldContainer[Column]
    num_candidates: int
    candidate_ids: Column
    item_features: _containers.RepeatedCompositeFieldContainer[Column]
    top_k: int
    timeout_ms: int
    propensities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., user: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., num_candidates: _Optional[int] = ..., candidate_ids: _Optional[_Union[Column, _Mapping]] = ..., item_features: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., top_k: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., propensities: _Optional[_Iterable[float]] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("name", "int64_values", "float32_values", "float64_values", "string_values", "list_offsets", "validity")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INT64_VALUES_FIELD_NUMBER: _ClassVar[int]
    FLOAT32_VALUES_FIELD_NUMBER: _ClassVar[int]
    FLOAT64_VALUES_FIELD_NUMBER: _ClassVar[int]
    STRING_VALUES_FIELD_NUMBER: _ClassVar[int]
    LIST_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    VALIDITY_FIELD_NUMBER: _ClassVar[int]
    name: str
    int64_values: bytes
    float32_values: bytes
    float64_values: bytes
    string_values: Strings
    list_offsets: bytes
    validity: bytes
    def __init__(self, name: _Optional[str] = ..., int64_values: _Optional[bytes] = ..., float32_values: _Optional[bytes] = ..., float64_values: _Optional[bytes] = ..., string_values: _Optional[_Union[Strings, _Mapping]] = ..., list_offsets: _Optional[bytes] = ..., validity: _Optional[bytes] = ...) -> None: ...

class Strings(_message.Message):
    __slots__ = ("data", "offsets")
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    offsets: bytes
    def __init__(self, data: _Optional[bytes] = ..., offsets: _Optional[bytes] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("request_id", "model_name", "model_version", "scores", "order", "tasks", "timings", "defaults")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model_name: str
    model_version: str
    scores: _containers.RepeatedScalarFieldContainer[float]
    order: _containers.RepeatedScalarFieldContainer[int]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskScores]
    timings: Timings
    defaults: Defaults
    def __init__(self, request_id: _Optional[str] = ..., model_name: _Optional[str] = ..., model_version: _Optional[str] = ..., scores: _Optional[_Iterable[float]] = ..., order: _Optional[_Iterable[int]] = ..., tasks: _Optional[_Iterable[_Union[TaskScores, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., defaults: _Optional[_Union[Defaults, _Mapping]] = ...) -> None: ...

class TaskScores(_message.Message):
    __slots__ = ("name", "scores")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    name: str
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_us", "decode_us", "cache_us", "transform_us", "lookup_us", "compute_us", "total_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    CACHE_US_FIELD_NUMBER: _ClassVar[int]
    TRANSFORM_US_FIELD_NUMBER: _ClassVar[int]
    LOOKUP_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    decode_us: int
    cache_us: int
    transform_us: int
    lookup_us: int
    compute_us: int
    total_us: int
    def __init__(self, queue_us: _Optional[int] = ..., decode_us: _Optional[int] = ..., cache_us: _Optional[int] = ..., transform_us: _Optional[int] = ..., lookup_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class Defaults(_message.Message):
    __slots__ = ("user_columns", "item_columns", "unknown_candidates")
    USER_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ITEM_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    user_columns: _containers.RepeatedScalarFieldContainer[str]
    item_columns: _containers.RepeatedScalarFieldContainer[str]
    unknown_candidates: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, user_columns: _Optional[_Iterable[str]] = ..., item_columns: _Optional[_Iterable[str]] = ..., unknown_candidates: _Optional[_Iterable[int]] = ...) -> None: ...
